"""The lab's experiment on merging: what an update costs that is kept apart, and what is lost when it is merged."""

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from lit_llama.generation import Sampling, generate
from lit_llama.lora import LoRAConfig, add_lora, lora_state_dict, merge_lora, remove_lora
from lit_llama.model import LLaMA
from lit_llama.storage.files import read_file

import torch
from comparison_report import COLORS
from lab_report import mean, table
from lab_runs import Lab, Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RUN = Run(n_steps=30, at=(5, 15, 30), details=True)
ROUNDS, N_TOKENS = 3, 40
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def merging(lab: Lab, figure: "Figure") -> str:
    """Speed apart and merged, and what rounding does to a merged weight."""
    lab.make([RUN])
    speeds: dict[str, float] = lab.kept("merging: speed", lambda: measure_speed(lab))
    updates = {name: B @ A for name, (B, A) in lab.factors(RUN, RUN.n_steps).items()}
    rows: list[list[object]] = []
    for title, dtype in DTYPES.items():
        rounded = {name: lab.weights[name].to(dtype).float() for name in updates}
        merged = {name: (rounded[name] + update).to(dtype).float() for name, update in updates.items()}
        lost = mean(float((merged[name] == rounded[name]).float().mean()) for name in updates)
        errors = [float((merged[name] - rounded[name] - dW).norm() / dW.norm()) for name, dW in updates.items()]
        apart = {name: rounded[name] + update - lab.weights[name] for name, update in updates.items()}
        merged = {name: weight - lab.weights[name] for name, weight in merged.items()}
        losses = []
        for how, added in (("apart", apart), ("merged", merged)):
            losses.append(lab.kept(f"merging: {title}, {how}", lambda added=added: loss_with(lab, added)))
        rows.append([title, f"{lost:.1%}", f"{mean(errors):.1%}", *(f"{loss:.4f}" for loss in losses)])
    ratios = [(update / lab.weights[name]).abs().flatten()[::50] for name, update in updates.items()]
    sizes = torch.cat(ratios).clamp(2**-16, 2**4).log2()
    axes = figure.subplots()
    axes.hist(sizes.numpy(), bins=60, color=COLORS["lora"])
    axes.axvline(-9, color="black", linestyle="--")
    axes.text(
        -9.2,
        0.9 * axes.get_ylim()[1],
        f"below 1/512 of the weight:\n{float((sizes < -9).float().mean()):.0%}, lost in bfloat16",
        ha="right",
    )
    axes.set(title="Size of an update's entries, relative to their weights", xlabel="|dW / W|", yticks=[])
    axes.set_xticks(range(-16, 5, 4), [f"{2.0**power:.2g}" for power in range(-16, 5, 4)])
    costs = table(["", f"median of {ROUNDS} rounds"], [[title, f"{value:.1f}"] for title, value in speeds.items()])
    titles = ["base in", "entries that stay as they were", "error, of the norm of dW", "loss, apart", "loss, merged"]
    return f"{costs}\n\n{table(titles, rows)}"


def loss_with(lab: Lab, added: dict[str, torch.Tensor]) -> float:
    with lab.updated(added) as model:
        return lab.validation_loss(model)


def measure_speed(lab: Lab) -> dict[str, float]:
    """Milliseconds of an update, and tokens/s with it: the median of a few rounds, taken in turn."""
    (prompt, _), found = lab.dataset(split="validation").last_answer(0), {}
    state = read_file(lab.factors_file(RUN, RUN.n_steps))

    def load_lora(model: LLaMA) -> None:
        add_lora(model, LoRAConfig(RUN.r, RUN.alpha, 0.0, RUN.targets))
        for name, tensor in lora_state_dict(model).items():
            tensor.copy_(state[name])

    for _ in range(ROUNDS):
        model = lab.load_base()
        rounds = {
            "base, tokens/s": tokens_per_second(model, prompt),
            "load the update, ms": milliseconds(load_lora, model),
            "update apart, tokens/s": tokens_per_second(model, prompt),
            "remove it again, ms": milliseconds(remove_lora, model),
        }
        load_lora(model)
        rounds |= {
            "merge it, ms": milliseconds(merge_lora, model),
            "merged, tokens/s": tokens_per_second(model, prompt),
        }
        for title, value in rounds.items():
            found.setdefault(title, []).append(value)
    return {title: statistics.median(values) for title, values in found.items()}


def milliseconds(action: Callable[..., object], *arguments: object) -> float:
    start = time.perf_counter()
    action(*arguments)
    return 1000 * (time.perf_counter() - start)


def tokens_per_second(model: LLaMA, prompt: list[int]) -> float:
    """Of one answer, whether or not it has come to an end."""
    tokens = generate(model, prompt, Sampling(N_TOKENS, temperature=0))
    return 1000 * N_TOKENS / milliseconds(list, tokens)
