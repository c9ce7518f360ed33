"""The trainings of lora_lab.py: what they vary, and their results, each made once and kept in the lab's folder."""

import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from lit_llama.data.batches import Dataset
from lit_llama.data.evaluation import response_loss, text_loss
from lit_llama.finetuned import read_finetuned, skeleton
from lit_llama.formats.peft import parts
from lit_llama.lora import LoRAConfig, remove_lora
from lit_llama.model import LLaMA
from lit_llama.model_folder import load_model
from lit_llama.storage.files import read_file, read_json, write_file
from lit_llama.tokenizer import find_tokenizer
from lit_llama.training.state import STATE_FILE

import torch
from compare_methods import RESULTS, call
from lora_measures import svd
from torch import Tensor

Split = Literal["train", "validation"]
Record = dict[str, str]  # instruction, input and output
BLOCK_SIZE = 512
ATTENTION, MLP = "query,key,value,projection", "mlp"
ALL = f"{ATTENTION},{MLP}"
N_STEPS, BATCH_SIZE, WARMUP = 20, 4, 2
N_FEW = 24  # records of the run that is to overfit
RECORDS = Path(__file__).parents[2] / "data" / "ml_questions"
TEXT = RECORDS / "unrelated.txt"
SPLITS = ("train", "validation", "validation_new_topics")


@dataclass(frozen=True)
class Run:
    """One training: what the lab varies, each with the value that it has where something else is varied."""

    kind: Literal["lora", "full"] = "lora"
    r: int = 8
    alpha: float = 16
    targets: str = ALL
    rate: float = 2e-3
    seed: int = 1

    @property
    def name(self) -> str:
        """The name of its folder."""
        lora = ["r", self.r, "alpha", f"{self.alpha:g}", *self.targets.split(",")] if self.kind == "lora" else []
        return "-".join(map(str, [self.kind, *lora, "rate", f"{self.rate:g}", "seed", self.seed]))

    @property
    def flags(self) -> tuple[object, ...]:
        """The flags of its training script."""
        lora = ("--lora_r", self.r, "--lora_alpha", f"{self.alpha:g}", "--lora_targets", self.targets)
        method = (*lora, "--lora_dropout", 0) if self.kind == "lora" else ("--activation_checkpointing", "false")
        return (*method, "--learning_rate", self.rate, "--seed", self.seed)


def scaled(r: int, **other: object) -> Run:
    """LoRA of rank r with alpha = 2 r, so that the update is scaled by 2 whatever r is."""
    return Run(r=r, alpha=2 * r, **other)  # pyrefly: ignore[bad-argument-type]


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
        """Each matrix of the blocks by the name of PEFT: query, key and value apart."""
        return self.split(self.base.state_dict())

    @cached_property
    def directions(self) -> dict[str, Tensor]:
        """The left singular vectors of the matrices of every third block."""
        return {name: svd(weight).U for name, weight in self.weights.items() if int(name.split(".")[2]) % 3 == 0}

    def split(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The matrices of the blocks in a state dict, the rows of the fused layer cut into query, key and value."""
        every = LoRAConfig(targets=tuple(ALL.split(",")))
        return {part.module: state[f"{part.layer}.weight"][part.rows_B] for part in parts(self.base.config, every)}

    def train(self, run: Run) -> Path:
        """The result of a run, which is trained now if it has not been."""
        folder = self.out_dir / "runs" / run.name
        if not (folder / RESULTS[run.kind]).is_file():
            steps = ("--num_epochs", 1, "--max_steps", N_STEPS, "--warmup_steps", WARMUP, "--lr_schedule", "linear")
            self.call_script(run, self.data_dir, folder, *steps)
            (folder / STATE_FILE).unlink()  # 1.1 GB if all weights were trained
        return folder / RESULTS[run.kind]

    def call_script(self, run: Run, data_dir: Path, folder: Path, *flags: object) -> None:
        """Train, or go on where a run was cut off. It is evaluated here, not by the script."""
        places = ("--pretrained_path", self.pretrained_path, "--data_dir", data_dir, "--out_dir", folder)
        batches = ("--batch_size", BATCH_SIZE, "--block_size", BLOCK_SIZE, "--resume", (folder / STATE_FILE).is_file())
        rarely = ("--eval_records", 1, "--eval_interval", 10**9, "--save_interval", 10**9, "--log_interval", 10)
        print(f"# {folder.name}", file=sys.stderr)
        call(f"finetune_{run.kind}.py", *places, *batches, *rarely, *run.flags, *flags)

    @contextmanager
    def model(self, run: Run | None) -> Iterator[LLaMA]:
        """The model that a run has made; None: the base model."""
        if run is None:
            yield self.base
        elif run.kind == "full":
            yield load_model(self.train(run), torch.float32).eval()
        else:
            read_finetuned(self.train(run), "lora").add_to(self.base)
            yield self.base
            remove_lora(self.base)

    @contextmanager
    def updated(self, updates: Mapping[str, Tensor]) -> Iterator[LLaMA]:
        """The base model with something added to the matrices of its blocks."""
        before = {name: self.weights[name].clone() for name in updates}
        for name, update in updates.items():
            self.weights[name].add_(update)
        yield self.base
        for name, weight in before.items():
            self.weights[name].copy_(weight)

    def kept(self, name: str, measure: Callable[[], Any]) -> Any:
        """A figure that is measured once and then kept in figures.json."""
        path = self.out_dir / "figures.json"
        figures = read_json(path) if path.is_file() else {}
        if name not in figures:
            figures[name] = measure()
            write_file(path, json.dumps(figures, indent=2))
        return figures[name]

    def loss(self, run: Run | None) -> float:
        """Of the responses of all validation records."""

        def measure() -> float:
            with self.model(run) as model:
                return self.response_loss(model)

        return self.kept(f"{run.name if run else 'base'}: validation loss", measure)

    def response_loss(self, model: LLaMA, data_dir: Path | None = None, split: Split = "validation") -> float:
        return response_loss(model, Dataset(data_dir or self.data_dir, split, BLOCK_SIZE), 8)["loss"]

    def unrelated_loss(self, run: Run | None) -> float:
        """Of a text that has nothing to do with the training data."""

        def measure() -> float:
            with self.model(run) as model:
                tokenizer = find_tokenizer(self.pretrained_path)
                return text_loss(model, tokenizer, TEXT.read_text(encoding="utf-8"), BLOCK_SIZE, None)["loss"]

        return self.kept(f"{run.name if run else 'base'}: loss of {TEXT.name}", measure)

    def factors(self, run: Run) -> dict[str, tuple[Tensor, Tensor]]:
        """B and A of each matrix that a LoRA run has updated, the scale alpha / r within B."""
        content = read_file(self.train(run))
        lora, state = LoRAConfig(**content["lora"]), content["state_dict"]
        return {
            part.module: (
                lora.alpha / lora.r * state[f"{part.layer}.lora_B"][part.rows_B].float(),
                state[f"{part.layer}.lora_A"][part.rows_A].float(),
            )
            for part in parts(self.base.config, lora)
        }

    def updates(self, run: Run) -> dict[str, Tensor]:
        """What a run has added to each matrix of the blocks."""
        if run.kind == "lora":
            return {name: B @ A for name, (B, A) in self.factors(run).items()}
        with self.model(run) as model:
            return {name: weight - self.weights[name] for name, weight in self.split(model.state_dict()).items()}

    def rank_for(self, targets: str, like: Run) -> int:
        """The rank at which these targets have about as many parameters as a run has."""
        return round(self.n_parameters(like) / self.n_parameters(Run(r=1, targets=targets)))

    def n_parameters(self, run: Run) -> int:
        """How many parameters a LoRA run trains."""
        config = LoRAConfig(run.r, run.alpha, 0.0, tuple(run.targets.split(",")))
        return sum(tensor.numel() for tensor in skeleton(self.base.config, config)[1].values())

    def losses_of_epoch(self, epoch: int) -> list[float]:
        """The loss after so many epochs on a few records: of these, of their twins, and of new topics."""
        few, new_topics = (self.prepare(name) for name in ("few", "new-topics"))

        def measure() -> list[float]:
            if epoch:
                folder = self.out_dir / "runs" / "overfitting"
                self.call_script(Run(), few, folder, "--num_epochs", epoch, "--warmup_steps", WARMUP)
                read_finetuned(folder / RESULTS["lora"], "lora").add_to(self.base)
            sets: list[tuple[Path, Split]] = [(few, "train"), (few, "validation"), (new_topics, "validation")]
            losses = [self.response_loss(self.base, *one) for one in sets]
            remove_lora(self.base)
            return losses

        return self.kept(f"overfitting, epoch {epoch}", measure)

    def prepare(self, name: str) -> Path:
        """A folder of data: a few records to train on, and to validate on either their twins or new topics."""
        folder = self.out_dir / "data" / name
        if not (folder / "meta.json").is_file():
            train, validation, new_topics = (
                json.loads((RECORDS / f"{split}.json").read_text(encoding="utf-8")) for split in SPLITS
            )
            few, twins = closest(train, validation, N_FEW)
            for split, records in (("train", few), ("validation", twins if name == "few" else new_topics)):
                write_file(folder.with_name(f"{name}-{split}.json"), json.dumps(records, indent=2))
            files = ("--train_file", f"{folder}-train.json", "--validation_file", f"{folder}-validation.json")
            style = Dataset(self.data_dir, "validation", BLOCK_SIZE).prompt_style
            places = ("--pretrained_path", self.pretrained_path, "--data_dir", folder, "--prompt_style", style)
            call("scripts/prepare_json.py", *files, *places)
        return folder


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
