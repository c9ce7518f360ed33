"""Compare base, LLaMA-Adapter, LoRA and full finetuning on one model and data set, or LoRA of several ranks.

Each method is trained with settings for small data sets, evaluated and asked by the scripts that users run, one after
the other. LoRA can be trained once more, with the article's settings.
"""

import datetime
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from lit_llama.cli import run
from lit_llama.data.batches import Dataset
from lit_llama.device import describe_machine
from lit_llama.errors import UserError
from lit_llama.finetuned import FILE_NAMES
from lit_llama.model_folder import QUICKSTART_MODEL, WEIGHTS, find_model
from lit_llama.storage.files import read_file, read_json, replacing, write_file
from lit_llama.training.log import read_metrics
from lit_llama.training.optimizer import LRSchedule
from lit_llama.training.state import STATE_FILE

import numpy as np
from comparison_report import Method, Result, answers, average, draw_methods, draw_ranks, new_figure, table
from jsonargparse.typing import PositiveFloat, PositiveInt

num_epochs: PositiveInt = 1  # passes over the training records
batch_size: PositiveInt = 4  # records per optimizer step
micro_batch_size: PositiveInt = 4  # records computed at once
block_size: PositiveInt = 512  # tokens; longer records are cut
lr_schedule: LRSchedule = "linear"  # of all methods
adapter_learning_rate: PositiveFloat = 9e-3  # of LLaMA-Adapter
lora_learning_rate: PositiveFloat = 2e-3  # of LoRA, of whatever rank
full_learning_rate: PositiveFloat = 2e-4  # of full finetuning
lora_r: PositiveInt = 8  # rank of LoRA's updates, where --ranks gives no others
lora_alpha: PositiveInt = 16  # at every rank, so that a first step lowers the loss equally far
lora_targets = "query,key,value,projection,mlp"  # matrices that LoRA updates
article_settings = False  # train LoRA once more, for 5 epochs in batches of 128 at the defaults of finetune_lora.py
activation_checkpointing = False  # of all methods: less memory, more time
n_seeds: PositiveInt = 1  # trainings of each method; from 2 on, the figures are means
n_answers: PositiveInt = 39  # validation records that are answered, for ROUGE-L
max_new_tokens: PositiveInt = 100  # of an answer

ROOT = Path(__file__).parents[2]
FIRST_SEED = 1337  # that of the training scripts
RESULTS = {**FILE_NAMES, "full": WEIGHTS}  # what the training scripts write


def main(
    data_dir: Path = Path("data/questions"),
    pretrained_path: Path | None = None,
    out_dir: Path = Path("out/comparison"),
    own_template_dir: Path | None = None,
    new_topics_dir: Path | None = None,
    questions: tuple[str, ...] = (
        "In one sentence, what is weight decay?",
        "In one sentence, what is overfitting?",
        "How does federated learning work?",
    ),
    verdicts: Path | None = None,
    ranks: str | None = None,
) -> None:
    """Write comparison.md and comparison.png, or, with --ranks, ranks.md and ranks.png.

    An interrupted run in out_dir is continued, and a finished one is not repeated: for other settings, give a new one.

    Args:
        data_dir: Folder written by one of scripts/prepare_*.py, with a validation split.
        pretrained_path: The checkpoint of the base model. Default: checkpoints/lit-llama/SmolLM2-135M-Instruct, or
            else the model written last.
        out_dir: The folder to write; results of the training scripts go below it.
        own_template_dir: The same records in the base model's own template, in which it is evaluated and asked, too.
        new_topics_dir: Data whose validation split is on topics that data_dir does not touch.
        questions: What each model is asked.
        verdicts: JSON that maps an exact answer to a verdict on it, which is shown after the answer.
        ranks: LoRA of these ranks instead of all methods, for example 1,2,4,8,16.
    """
    pretrained_path = find_model(pretrained_path, QUICKSTART_MODEL)
    methods = lora_ranks(data_dir, ranks) if ranks else four_methods(data_dir, own_template_dir)
    known = read_json(verdicts) if verdicts else {}
    figure, results = new_figure(), {}
    for method in methods:
        print(f"# {method.name}", file=sys.stderr)
        seeded = [method, *(with_seed(method, FIRST_SEED + i) for i in range(1, n_seeds) if method.kind != "base")]
        results[method] = average([measure(m, pretrained_path, out_dir, new_topics_dir, questions) for m in seeded])
    picture = out_dir / ("ranks.png" if ranks else "comparison.png")
    n_train, n_validation = (len(Dataset(data_dir, split, block_size)) for split in ("train", "validation"))
    about = (
        f"{pretrained_path.parent.name}, {n_train:,} records to train on (epochs: {num_epochs}, records per step: "
        f"{batch_size}, seeds: {n_seeds}), {n_validation:,} to validate on; {datetime.date.today():%d %B %Y}, "
        f"{describe_machine()}."
    )
    text = "\n".join([about, "", *table(results, picture.name), *answers(results, questions, known)])
    write_file(picture.with_suffix(".md"), text)
    (draw_ranks if ranks else draw_methods)(figure, results)
    figure.suptitle(f"{pretrained_path.parent.name}, {n_train:,} records, seeds: {n_seeds}")
    with replacing(picture) as part:
        figure.savefig(part, dpi=110, format="png")
    print(f"Saved {picture.with_suffix('.md')} and {picture}", file=sys.stderr)


def four_methods(data_dir: Path, own_template_dir: Path | None) -> list[Method]:
    own = [Method("base, own template", "base", own_template_dir)] if own_template_dir else []
    rate, schedule = "--learning_rate", ("--lr_schedule", lr_schedule)
    adapter = (rate, adapter_learning_rate, *schedule, "--warmup_epochs", 0)
    full = (rate, full_learning_rate, *schedule, "--warmup_steps", 10)
    article = Method("LoRA, the article's settings", "lora", data_dir, ("--batch_size", 128, "--num_epochs", 5))
    return [
        Method("base", "base", data_dir),
        *own,
        Method("LLaMA-Adapter", "adapter", data_dir, adapter),
        *([article] if article_settings else []),
        lora(data_dir, lora_r),
        Method("full finetuning", "full", data_dir, full),
    ]


def lora_ranks(data_dir: Path, ranks: str) -> list[Method]:
    try:
        numbers = sorted({int(rank) for rank in ranks.split(",")})
    except ValueError:
        numbers = [0]
    if numbers[0] < 1:
        raise UserError(f"--ranks is a list of whole numbers from 1 up, for example 1,2,4, not {ranks!r}")
    return [Method("base", "base", data_dir), *(lora(data_dir, rank) for rank in numbers)]


def lora(data_dir: Path, rank: int) -> Method:
    scale = ("--lora_r", rank, "--lora_alpha", lora_alpha, "--lora_targets", lora_targets)
    rate = ("--learning_rate", lora_learning_rate, "--lr_schedule", lr_schedule, "--warmup_steps", 10)
    return Method(f"LoRA, r = {rank}", "lora", data_dir, (*scale, *rate), rank)


def with_seed(method: Method, seed: int) -> Method:
    return replace(method, name=f"{method.name}, seed {seed}", flags=(*method.flags, "--seed", seed))


def measure(
    method: Method, pretrained_path: Path, out_dir: Path, new_topics_dir: Path | None, questions: tuple[str, ...]
) -> Result:
    """Train, evaluate and ask."""
    path = method.folder(out_dir) / RESULTS.get(method.kind, "")
    trained = train(method, pretrained_path, path) if method.kind != "base" else {}
    style = ("--prompt_style", Dataset(method.data_dir, "validation", block_size).prompt_style)
    script, model, weights = "generate.py", ("--checkpoint_path", pretrained_path, *style), ()
    if method.kind == "full":
        pretrained_path, model = path, ("--checkpoint_path", path, *style)
    elif method.kind != "base":
        weights = (f"--{method.kind}_path", path)
        script, model = f"generate_{method.kind}.py", ("--pretrained_path", pretrained_path, *weights)
    evaluated = ("--checkpoint_path", pretrained_path, *weights, "--block_size", block_size, "--json", "true")
    limit = ("--max_new_tokens", max_new_tokens)
    figures = json.loads(
        call("scripts/evaluate.py", *evaluated, "--data_dir", method.data_dir, "--n_answers", n_answers, *limit)[0]
    )
    new_loss = None
    if new_topics_dir and Dataset(new_topics_dir, "validation", block_size).prompt_style == style[1]:
        new_topics = json.loads(call("scripts/evaluate.py", *evaluated, "--data_dir", new_topics_dir)[0])
        new_loss = new_topics["responses"]["loss"]
    asked = [call(script, *model, *limit, "--temperature", 0, "--prompt", q, quiet=True)[0] for q in questions]
    return Result(
        loss=figures["responses"]["loss"],
        rouge_l=figures["answers"]["rougeL"],
        answers=[out.strip() for out in asked],
        new_loss=new_loss,
        **trained,
    )


def train(method: Method, pretrained_path: Path, path: Path) -> dict[str, Any]:
    """Run the training script, which writes `path`; returns what it took and made, by the names of Result."""
    places = ("--pretrained_path", pretrained_path, "--data_dir", method.data_dir, "--out_dir", path.parent)
    batches = ("--batch_size", batch_size, "--micro_batch_size", micro_batch_size, "--block_size", block_size)
    memory = ("--activation_checkpointing", activation_checkpointing)
    rarely = ("--eval_interval", 10**9, "--log_interval", 10)  # validated at the start and the end alone
    extent = ("--num_epochs", num_epochs, "--resume", (path.parent / STATE_FILE).is_file())
    call(f"finetune_{method.kind}.py", *places, *batches, *memory, *rarely, *extent, *method.flags)
    losses, seconds, peaks = read_metrics(path.parent / "metrics.csv", "train_loss", "seconds", "memory_gb")
    return {
        "parameters": count_parameters(path),
        "file_mb": path.stat().st_size / 1e6,
        "minutes": (seconds[np.isfinite(losses)][-1] - seconds[0]) / 60,  # from the first validation to the last step
        "memory_gb": np.nanmax(peaks),
    }


def call(script: str, *flags: object, quiet: bool = False) -> tuple[str, str]:
    """Run a script as a user would; returns its stdout and, if that is not shown as it comes, its stderr."""
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    stderr = subprocess.PIPE if quiet else None
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=stderr, text=True, check=False)
    if done.returncode:
        raise UserError(f"{script} failed" + (f": {done.stderr.splitlines()[-1]}" if done.stderr else ", see above"))
    return done.stdout, done.stderr or ""


def count_parameters(path: Path) -> int:
    content = read_file(path)
    tensors = content.get("state_dict", content).values()
    return sum({tensor.data_ptr(): tensor.numel() for tensor in tensors}.values())  # tied ones count once


if __name__ == "__main__":
    run(main)
