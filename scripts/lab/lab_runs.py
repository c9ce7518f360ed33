"""The trainings of lora_lab.py. Each is made once, and what was measured in it is kept in the lab's folder.

All runs train with torch's AdamW, in float32, the same matrices: those of the blocks, either through LoRA or, as
"full", each of their entries. A seed is a sample and order of records, the same in all arms, and the values that A
starts with.
"""

import itertools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lit_llama.data.batches import Batch, BatchSchedule, Dataset, loss_sum, single_step
from lit_llama.data.preparation import Encoder, prepare
from lit_llama.data.records import Fields
from lit_llama.finetuned import skeleton
from lit_llama.formats.peft import parts
from lit_llama.generation import Sampling, generate_batch
from lit_llama.lora import LoRAConfig, add_lora, lora_state_dict, mark_only_lora_as_trainable
from lit_llama.model import LLaMA
from lit_llama.model_folder import load_model
from lit_llama.progress import say
from lit_llama.prompt import Message, encode, stop_ids
from lit_llama.storage.files import read_file, read_json, write_file, write_tensors
from lit_llama.tokenizer import Tokenizer, find_tokenizer
from lit_llama.training.optimizer import LearningRate

import torch
from lora_measures import rank_of_energy, svd, truncate
from torch import Tensor

Record = dict[str, str]  # instruction, input and output
BLOCK_SIZE, BATCH_SIZE, WARMUP = 512, 4, 2
ATTENTION, MLP = ("query", "key", "value", "projection"), ("mlp",)
RANKS = (1, 2, 4, 8, 16, 64)
N_ANSWER = 40  # tokens of an answer to an ordinary question, at most
N_FEW = 24  # records of the run that is to overfit
RECORDS = Path(__file__).parents[2] / "data" / "ml_questions"
ORDINARY = RECORDS / "ordinary.txt"


@dataclass(frozen=True)
class Run:
    """One training: what the lab varies, each with the value that it has where something else is varied."""

    kind: str = "lora"  # or full: all entries of the same matrices
    r: int = 8
    alpha: float = 16
    rate: float = 2e-3
    seed: int = 1
    n_steps: int = 10
    at: tuple[int, ...] = (10,)  # the steps before which it is measured
    targets: tuple[str, ...] = ATTENTION + MLP
    few: bool = False  # N_FEW records over and over at a constant rate, to overfit
    details: bool = field(default=False, compare=False)  # measure more than the validation loss

    @property
    def name(self) -> str:
        lora = f"r {self.r}, alpha {self.alpha:g}, {' '.join(self.targets)}" if self.kind == "lora" else "all entries"
        return f"{lora}, rate {self.rate:g}, {self.n_steps} steps, seed {self.seed}{', few records' * self.few}"


class Lab:
    """The base model, the data and the folder in which all results are kept."""

    def __init__(self, pretrained_path: Path, data_dir: Path, out_dir: Path) -> None:
        self.pretrained_path, self.data_dir, self.out_dir = pretrained_path, data_dir, out_dir

    @cached_property
    def base(self) -> LLaMA:
        return self.load_base()

    def load_base(self) -> LLaMA:
        return load_model(self.pretrained_path, torch.float32).eval()

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """Each matrix of the base model's blocks by the name of PEFT: query, key and value apart."""
        return self.matrices({name: tensor.detach() for name, tensor in self.base.named_parameters()})

    def matrices(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The rows of the fused layer cut into query, key and value."""
        every = LoRAConfig(targets=ATTENTION + MLP)
        return {part.module: tensors[f"{part.layer}.weight"][part.rows_B] for part in parts(self.base.config, every)}

    def kept(self, name: str, measure: Callable[[], Any]) -> Any:
        """A figure that is measured once and then kept in figures.json."""
        if name not in self.figures:
            value = measure()  # which may keep other figures
            write_file(self.out_dir / "figures.json", json.dumps({**self.figures, name: value}, indent=1))
        return self.figures[name]

    @property
    def figures(self) -> dict[str, Any]:
        path = self.out_dir / "figures.json"
        return read_json(path) if path.is_file() else {}

    def losses(self, run: Run) -> dict[int, dict[str, Any]]:
        """What is measured in a run, by step."""
        found = self.kept(run.name, lambda: {step: self.measure(run, model, step) for step, model in self.train(run)})
        return {int(step): values for step, values in found.items()}

    def make(self, runs: Iterable[Run]) -> None:
        """Train those of the runs that have not been, and say how long it will take."""
        missing = [run for run in runs if run.name not in self.figures]
        start, costs = time.perf_counter(), [run.n_steps * (1 if run.kind == "lora" else 2) for run in missing]
        for i, run in enumerate(missing):
            pace = (time.perf_counter() - start) / (60 * sum(costs[:i]) or 1)  # minutes for each LoRA step
            left = f", about {pace * sum(costs[i:]):.0f} minutes left" * (i > 0)
            say(f"run {i + 1} of {len(missing)}{left}: {run.name}")
            self.losses(run)

    def last_loss(self, run: Run) -> float:
        return self.losses(run)[run.n_steps]["loss"]

    def base_losses(self) -> dict[str, Any]:
        return self.kept(
            "base", lambda: {"loss": self.validation_loss(self.base), "ordinary": self.ordinary_losses(self.base)}
        )

    def validation_loss(self, model: LLaMA) -> float:
        return mean_loss(model, self.dataset(split="validation"))

    def train(self, run: Run) -> Iterator[tuple[int, LLaMA]]:
        """The model before each step of `run.at`; the last of these may be after the last step."""
        model = self.start(run)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, weight_decay=0.0)
        schedule = BatchSchedule(self.dataset("few" if run.few else ""), BATCH_SIZE, BATCH_SIZE * BLOCK_SIZE, run.seed)
        rate = LearningRate(run.rate, WARMUP, "constant" if run.few else "linear", run.n_steps)
        for step in range(run.n_steps + 1):
            if step in run.at:
                yield step, model
            if step == run.n_steps:
                return
            optimizer.param_groups[0]["lr"] = rate.at(step)
            self.backward(model, schedule.dataset, schedule.step(step).records)
            optimizer.step()
            optimizer.zero_grad()

    def start(self, run: Run) -> LLaMA:
        """The model as a run finds it, with what it trains."""
        torch.manual_seed(run.seed)
        model = self.load_base()
        if run.kind == "lora":
            add_lora(model, LoRAConfig(run.r, run.alpha, 0.0, run.targets))
            mark_only_lora_as_trainable(model)
        else:
            for name, parameter in model.named_parameters():
                parameter.requires_grad = parameter.dim() == 2 and ".h." in name
        return model

    def gradients(self, records: Sequence[int]) -> dict[str, Tensor]:
        """Of the mean loss of these training records, taken at the base model, for each matrix of its blocks."""
        model = self.load_base()
        for some in torch.tensor(records).split(BATCH_SIZE):
            self.backward(model, self.dataset(), some.numpy())
        return self.matrices(
            {name: tensor.grad for name, tensor in model.named_parameters() if tensor.grad is not None}
        )

    @torch.no_grad()
    def training_loss(self, records: Sequence[int]) -> float:
        batch = self.dataset().batch(records)
        return float(loss_sum(self.base, batch)) / len(batch.targets)

    def backward(self, model: LLaMA, data: Dataset, records: Any) -> None:
        """Add the gradients of the mean loss over the targets of these records."""
        batch = data.batch(records)
        (loss_sum(model, batch) / len(batch.targets)).backward()

    def measure(self, run: Run, model: LLaMA, step: int) -> dict[str, Any]:
        """The validation loss; in a run with details, what was forgotten as well, and what has changed."""
        if run.few:
            few, new_topics = self.dataset("few"), self.dataset("new-topics", "validation")
            sets = {"few": few, "twins": self.dataset("few", "validation"), "new topics": new_topics}
            return {title: mean_loss(model, data) for title, data in sets.items()}
        found: dict[str, Any] = {"loss": self.validation_loss(model)}
        if run.details:
            found["ordinary"] = self.ordinary_losses(model)
            if run.kind == "lora":
                write_tensors(self.factors_file(run, step), lora_state_dict(model))
            elif step == run.n_steps:
                found |= self.cut(model)
        return found

    def dataset(self, name: str = "", split: str = "train") -> Dataset:
        return Dataset(self.prepare(name) if name else self.data_dir, split, BLOCK_SIZE)

    def prepare(self, name: str) -> Path:
        """A folder of data: a few records to train on, and to validate on either their twins or new topics."""
        folder = self.out_dir / "data" / name
        if not (folder / "meta.json").is_file():
            train, validation, new_topics = (
                json.loads((RECORDS / f"{file}.json").read_text(encoding="utf-8"))
                for file in ("train", "validation", "validation_new_topics")
            )
            few, twins = closest(train, validation, N_FEW)
            files = {"train": few, "validation": twins if name == "few" else new_topics}
            paths = {split: folder.with_name(f"{name}-{split}.json") for split in files}
            for split, records in files.items():
                write_file(paths[split], json.dumps(records))
            prepare(folder, paths, Encoder(self.tokenizer, self.style, Fields()), num_workers=1)
        return folder

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return find_tokenizer(self.pretrained_path)

    @cached_property
    def style(self) -> str:
        return self.dataset().prompt_style

    @cached_property
    def ordinary(self) -> list[Batch]:
        """Ordinary questions, each with an answer that was drawn from the base model, token by token."""
        questions = ORDINARY.read_text(encoding="utf-8").splitlines()
        prompts = [encode(self.style, [Message("user", question)], self.tokenizer).ids for question in questions]

        def draw() -> list[list[int]]:
            torch.manual_seed(0)
            return generate_batch(self.base, prompts, Sampling(N_ANSWER, temperature=1, top_k=None))

        stop = stop_ids(self.style, self.tokenizer)
        batches = []
        for prompt, answer in zip(prompts, self.kept("answers of the base model", draw), strict=True):
            end = next((i + 1 for i, token in enumerate(answer) if token in stop), len(answer))
            tokens = torch.tensor(prompt + answer[:end])
            select = torch.arange(len(prompt) - 1, len(tokens) - 1)
            batches.append(Batch(tokens[None, :-1], [len(tokens) - 1], select, tokens[len(prompt) :]))
        return batches

    @torch.no_grad()
    def ordinary_losses(self, model: LLaMA) -> list[float]:
        """Of the base model's own answers, in nats a token, question by question.

        Since the answers are drawn from the base model, the mean of what this is above the base model's own estimates
        the Kullback-Leibler divergence of the trained model from the base model.
        """
        return [float(loss_sum(model, batch)) / len(batch.targets) for batch in self.ordinary]

    def factors_file(self, run: Run, step: int) -> Path:
        return self.out_dir / "runs" / f"{run.name}, step {step}.pth"

    def factors(self, run: Run, step: int) -> dict[str, tuple[Tensor, Tensor]]:
        """B and A of each matrix that a LoRA run has updated, the scale alpha / r within B."""
        return self.split_factors(read_file(self.factors_file(run, step)), run)

    def split_factors(self, state: Mapping[str, Tensor], run: Run) -> dict[str, tuple[Tensor, Tensor]]:
        lora = LoRAConfig(run.r, run.alpha, 0.0, run.targets)
        return {
            part.module: (
                lora.alpha / lora.r * state[f"{part.layer}.lora_B"][part.rows_B],
                state[f"{part.layer}.lora_A"][part.rows_A],
            )
            for part in parts(self.base.config, lora)
        }

    def initial_A(self, run: Run) -> dict[str, Tensor]:
        """What A of a LoRA run starts with."""
        return {name: A for name, (_, A) in self.split_factors(lora_state_dict(self.start(run)), run).items()}

    def cut(self, model: LLaMA) -> dict[str, Any]:
        """Of the change of all entries: how many directions hold it, and the loss with only the first r of them."""
        changed = self.matrices({name: tensor.detach() for name, tensor in model.named_parameters()})
        changes = {name: svd(changed[name] - weight) for name, weight in self.weights.items()}
        losses = {r: self.loss_with({name: truncate(change, r) for name, change in changes.items()}) for r in RANKS}
        return {"cut": losses, "rank 90%": {name: rank_of_energy(change.S, 0.9) for name, change in changes.items()}}

    @contextmanager
    def updated(self, updates: Mapping[str, Tensor]) -> Iterator[LLaMA]:
        """The base model with something added to the matrices of its blocks."""
        before = {name: self.weights[name].clone() for name in updates}
        for name, update in updates.items():
            self.weights[name].add_(update)
        yield self.base
        for name, weight in before.items():
            self.weights[name].copy_(weight)

    def loss_with(self, updates: Mapping[str, Tensor]) -> float:
        with self.updated(updates) as model:
            return self.validation_loss(model)

    def n_parameters(self, r: int, targets: tuple[str, ...]) -> int:
        """How many parameters LoRA trains."""
        _, shapes = skeleton(self.base.config, LoRAConfig(r, targets=targets))
        return sum(shape.numel() for shape in shapes.values())


@torch.no_grad()
def mean_loss(model: LLaMA, data: Dataset) -> float:
    """Of all records, in nats a target."""
    batches = single_step(data, 8 * BLOCK_SIZE).share(0, 1)
    return sum(float(loss_sum(model, batch)) for batch in batches) / data.n_targets(range(len(data)))


def closest(train: list[Record], validation: list[Record], n: int) -> tuple[list[Record], list[Record]]:
    """The n pairs of a training and a validation record that have most words in common, each record once."""

    def words(record: Record) -> set[str]:
        return set(re.findall(r"\w+", " ".join(record.values()).lower()))

    def shared(pair: tuple[int, int]) -> float:
        a, b = words(train[pair[0]]), words(validation[pair[1]])
        return len(a & b) / len(a | b)

    pairs = sorted(itertools.product(range(len(train)), range(len(validation))), key=shared, reverse=True)
    few: dict[int, int] = {}
    for i, j in pairs:
        if len(few) < n and i not in few and j not in few.values():
            few[i] = j
    return [train[i] for i in few], [validation[j] for j in few.values()]
