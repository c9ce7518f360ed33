"""The lab's experiment on merging: what an update costs that is kept apart, and what is lost when it is merged."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lit_llama.data.batches import Dataset
from lit_llama.finetuned import read_finetuned
from lit_llama.generation import Sampling, generate
from lit_llama.lora import merge_lora, remove_lora
from lit_llama.model import LLaMA

import torch
from comparison_report import COLORS
from lab_report import mean, table
from lab_runs import BLOCK_SIZE, Lab, scaled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RUN = scaled(8)
ROUNDS, N_TOKENS = 3, 40
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def merging(lab: Lab, figure: "Figure") -> str:
    """Speed apart and merged, and what rounding does to a merged weight."""
    speeds: dict[str, float] = lab.kept("merging: speed", lambda: measure_speed(lab))
    updates = lab.updates(RUN)
    rows: list[list[object]] = []
    for title, dtype in DTYPES.items():
        rounded = {name: lab.weights[name].to(dtype).float() for name in updates}
        merged = {name: (rounded[name] + update).to(dtype).float() for name, update in updates.items()}
        lost = mean(float((merged[name] == rounded[name]).float().mean()) for name in updates)
        wrong = mean(
            float((merged[name] - rounded[name] - update).norm() / update.norm()) for name, update in updates.items()
        )
        apart = {name: rounded[name] + update - lab.weights[name] for name, update in updates.items()}
        merged = {name: weight - lab.weights[name] for name, weight in merged.items()}
        losses = []
        for how, added in (("apart", apart), ("merged", merged)):
            losses.append(lab.kept(f"merging: {title}, {how}", lambda added=added: loss_with(lab, added)))
        rows.append([title, f"{lost:.1%}", f"{wrong:.1%}", *(f"{loss:.4f}" for loss in losses)])
    draw(figure, lab, speeds)
    costs = table(["", "median of 3 rounds"], [[title, f"{value:.1f}"] for title, value in speeds.items()])
    titles = ["base in", "entries that stay as they were", "error, of the norm of dW", "loss, apart", "loss, merged"]
    return f"{costs}\n\n{table(titles, rows)}"


def loss_with(lab: Lab, added: dict[str, torch.Tensor]) -> float:
    with lab.updated(added) as model:
        return lab.response_loss(model)


def load_lora(model: LLaMA, path: Path) -> None:
    read_finetuned(path, "lora").add_to(model)


def measure_speed(lab: Lab) -> dict[str, float]:
    """Milliseconds and megabytes of an update, and tokens/s with it: the median of a few rounds, taken in turn."""
    path, (prompt, _) = lab.train(RUN), Dataset(lab.data_dir, "validation", BLOCK_SIZE).last_answer(0)
    found: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        model = lab.load_base()
        rounds = {
            "base, tokens/s": tokens_per_second(model, prompt),
            "load the update, ms": milliseconds(load_lora, model, path),
            "update apart, tokens/s": tokens_per_second(model, prompt),
            "remove it again, ms": milliseconds(remove_lora, model),
        }
        load_lora(model, path)
        rounds |= {
            "merge it, ms": milliseconds(merge_lora, model),
            "merged, tokens/s": tokens_per_second(model, prompt),
        }
        for title, value in rounds.items():
            found.setdefault(title, []).append(value)
    sizes = {"the update's file, MB": path, "the base model's file, MB": lab.pretrained_path}
    medians = {title: statistics.median(values) for title, values in found.items()}
    return {**{title: file.stat().st_size / 1e6 for title, file in sizes.items()}, **medians}


def milliseconds(action: Callable[..., object], *arguments: object) -> float:
    start = time.perf_counter()
    action(*arguments)
    return 1000 * (time.perf_counter() - start)


@torch.no_grad()
def tokens_per_second(model: LLaMA, prompt: list[int]) -> float:
    """Of one answer, as generate_lora.py would write it, whether or not it has come to an end."""
    tokens = generate(model, prompt, Sampling(N_TOKENS, temperature=0))
    return 1000 * N_TOKENS / milliseconds(list, tokens)


def draw(figure: "Figure", lab: Lab, speeds: dict[str, float]) -> None:
    """Tokens/s as bars, and how large the entries of an update are, next to what bfloat16 can add."""
    left, right = figure.subplots(1, 2)
    titles = ["base", "merged", "update apart"]
    values = [speeds[f"{title}, tokens/s"] for title in titles]
    left.bar_label(left.bar(titles, values, color=[COLORS["base"], *[COLORS["lora"]] * 2]), fmt="%.1f")
    left.set(title="Generation", ylabel="tokens/s")
    ratios = [(update / lab.weights[name]).abs().flatten()[::50] for name, update in lab.updates(RUN).items()]
    sizes = torch.cat(ratios).clamp_min(2**-24).log2()
    right.hist(sizes.clamp(-16, 4).numpy(), bins=60, color=COLORS["lora"])
    right.axvline(-9, color="black", linestyle="--", label="1/512: left of it, bfloat16 loses the update")
    right.set(title="Size of an update's entry, relative to its weight", xlabel="log2 |dW / W|", yticks=[])
    right.legend(fontsize=8, loc="lower center")
