"""Measure the figures of README and guides, all in one sitting, and write each between its markers.

A place for a figure is <!-- figures: NAME --> ... <!-- end of NAME -->, and NAME a function below. Each of them runs
commands that a user could type. Some fill a second place, which they name. The verdict on an answer comes from
howto/verdicts.json, which lists exact answers.
"""

import contextlib
import datetime
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from lit_llama.cli import run
from lit_llama.device import describe_machine
from lit_llama.errors import UserError
from lit_llama.storage.files import write_file
from lit_llama.training.log import read_metrics

import numpy as np

ROOT = Path(__file__).parents[2]
LAB = {  # experiments, and what their pictures show
    "spectrum": "the part of the squared norm in the first directions of the gradient, its sign and noise",
    "first_step": "the first-order fall of the loss and the norm of dW over the rank, for both rules of alpha",
    "merging": "a histogram of how large the entries of an update are beside their weights",
    "rank": "the validation loss after ten steps over the rank: nearly level at a fixed alpha, falling at alpha = 2 r",
    "forgetting": "what was forgotten over what was learned, a curve for each method",
    "directions": "the similarity of first directions and the amplification over the steps, beside chance",
    "low_rank": "the validation loss of a change that is cut to rank r, over r",
    "overfitting": "three losses over ten epochs: that of the records falls to zero, the others rise",
}
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "howto").glob("*.md")))
IMAGES, VERDICTS = ROOT / "howto" / "images", ROOT / "howto" / "verdicts.json"
MODEL = Path("checkpoints/lit-llama/SmolLM2-135M-Instruct/lit-llama.pth")
RUN = Path("out/lora/quickstart")
RECORDS = Path("data/ml_questions")
ADAPTER_RATES = ("1.1e-3", "3e-3", "9e-3")
NF4_RUN = (
    "--lora_r 32 --lora_alpha 64 --lora_targets all --lora_dropout 0 --learning_rate 2e-3 --lr_schedule linear "
    "--warmup_steps 10 --batch_size 4 --num_epochs 2 --eval_interval 103"
)
CHECKPOINTING = ("--activation_checkpointing", "true")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "scripts")}  # whose modules a benchmark takes
LARGE = ("--model", "Llama-2-70B", "--method", "full")


def main(only: tuple[str, ...] = (), alpaca_file: Path | None = None) -> None:
    """Measure, and write into the documents.

    Args:
        only: The figures to measure. By default all of them.
        alpaca_file: Alpaca records on the disk, instead of downloading them.
    """
    unknown = set(only) - FIGURES.keys()
    if unknown:
        raise UserError(f"there is no figure {', '.join(unknown)}; there are {', '.join(FIGURES)}")
    if not Path("data/alpaca/meta.json").is_file() and {"speed", "compiled"} & set(only or FIGURES):
        local = ("--data_file", alpaca_file) if alpaca_file else ()
        script("prepare_alpaca.py", "--pretrained_path", MODEL, *local)
    command("make", "data/questions/meta.json")
    for name in only or FIGURES:
        print(f"## {name}", file=sys.stderr)
        write_figure(name, FIGURES[name]())


def write_figure(name: str, text: str) -> None:
    """Write `text` into all documents that have a place of this name."""
    for document in DOCUMENTS:
        replace_figure(document, name, text)


def replace_figure(document: Path, name: str, text: str) -> None:
    """Write `text` between the markers of `name`, if the document has them."""
    begin, end = f"<!-- figures: {name} -->", f"<!-- end of {name} -->"
    old = document.read_text(encoding="utf-8")
    pattern = re.escape(begin) + ".*?" + re.escape(end)
    new = re.sub(pattern, lambda _: f"{begin}\n{text.strip()}\n{end}", old, flags=re.DOTALL)
    if new != old:
        write_file(document, new)


def quickstart() -> str:
    """What `make quickstart` prints, and how long it takes."""
    start = time.perf_counter()
    printed = command("make", "quickstart")
    minutes = (time.perf_counter() - start) / 60
    shutil.copy(RUN / "loss.png", IMAGES / "loss.png")
    step, tokens, seconds, memory = read_metrics(RUN / "metrics.csv", "step", "tokens", "seconds", "memory_gb")
    trained = np.isfinite(memory)
    training = (seconds[trained][-1] - seconds[0]) / 60
    return (
        f"{quickstart_tables(printed)}\n\n{minutes:.1f} minutes in all, once installed; {training:.1f} of them for "
        f"{step[-1]:.0f} steps over {tokens[-1]:,.0f} tokens; {np.nanmax(memory):.1f} GB of memory ({sitting()})."
    )


def quickstart_tables(printed: str) -> str:
    """Scores and an answer before and after, and an error, from what the quickstart prints."""
    _, before, few_shot, after = re.split(r"^(?:Before|Before, with .*|After):$", printed, flags=re.MULTILINE)
    rows = ["| | valid JSON | all fields right: new names | new wordings, too |", "|---|---:|---:|---:|"]
    titles = {"before": before, "before, with three examples shown first": few_shot, "after": after}
    for title, part in titles.items():
        scores = [[*map(int, score)] for score in re.findall(r": (\d+) of (\d+) valid JSON, (\d+) exact", part)]
        valid, n = sum(score[0] for score in scores), sum(score[1] for score in scores)
        exact = " | ".join(f"{right / of_set:.0%}" for _, of_set, right in scores)
        rows.append(f"| {title} | {valid / n:.0%} of {n} | {exact} |")
    asked = re.compile(r"^> (.*)\n((?:(?!> ).*\n)*?.*) \((right|wrong)\)$", re.MULTILINE)
    answers, wrong = asked.findall(after), [one for one in asked.findall(after) if one[2] == "wrong"]
    told = [f"*{answers[0][0]}* Before: {shortened(asked.findall(before)[0][1])} After: `{answers[0][1]}`"]
    told += [f"One of its errors: *{sentence}* `{answer}`" for sentence, answer, _ in wrong[:1]]
    return "\n".join([*rows, "", " ".join(told)])


def shortened(answer: str) -> str:
    """As code on one line, at most 80 characters."""
    answer = " ".join(answer.split())
    return f"`{answer if len(answer) <= 80 else f'{answer[:77]}...'}`"


def comparison() -> str:
    """The methods side by side. The picture and the answers go to the place `answers`."""
    for style, name in (("smollm2", "own-template"), ("chatml", "new-topics")):
        validation = "validation.json" if name == "own-template" else "validation_new_topics.json"
        files = ("--train_file", RECORDS / "train.json", "--validation_file", RECORDS / validation)
        places = ("--pretrained_path", MODEL, "--data_dir", Path("data") / name)
        script("prepare_json.py", *files, *places, "--prompt_style", style)
    more = ("--own_template_dir", "data/own-template", "--new_topics_dir", "data/new-topics", "--verdicts", VERDICTS)
    script("compare_methods.py", *more)
    shutil.copy("out/comparison/comparison.png", IMAGES / "comparison.png")
    table, _, answers = Path("out/comparison/comparison.md").read_text(encoding="utf-8").partition("\n![")
    write_figure("answers", f"![{answers.replace('(comparison.png)', '(images/comparison.png)')}")
    return table


def adapter() -> str:
    """LLaMA-Adapter at several learning rates, for one epoch on the questions."""
    rows, losses = ["| learning rate | validation loss |", "|---:|---:|"], [0.0]
    for rate in ADAPTER_RATES:
        out_dir = Path("out/adapter") / f"rate-{rate}"
        shutil.rmtree(ROOT / out_dir, ignore_errors=True)
        flags = ("--learning_rate", rate, "--lr_schedule", "linear", "--warmup_epochs", 0, "--num_epochs", 1)
        places = ("--pretrained_path", MODEL, "--data_dir", "data/questions", "--out_dir", out_dir)
        command(sys.executable, ROOT / "finetune_adapter.py", *places, *flags, "--batch_size", 4, "--log_interval", 20)
        losses = validation_losses(out_dir)
        rows.append(f"| {rate} | {losses[-1]:.3f} |")
    return "\n".join([*rows, "", f"Before training it is {losses[0]:.3f} ({sitting()})."])


def benchmark(flags: str) -> str:
    """Against transformers + PEFT, on equal batches."""
    table = script("benchmark.py", *flags.split())
    return (
        f"{table}\nMedians over the rounds, each side in turn (`python scripts/dev/benchmark.py {flags}`, {sitting()})."
    )


def generation() -> str:
    """Against transformers, one token at a time."""
    table = script("benchmark_generation.py")
    return f"{table}\n(`python scripts/dev/benchmark_generation.py`, {sitting()})"


def many_lora() -> str:
    """Several LoRA files in a batch, of the article's settings and of today's."""
    short = ("--rounds", "2", "--new_tokens", "24")
    runs = [short, ("--lora_targets", "all", "--lora_r", "16", *short)]
    run_by = "PYTHONPATH=scripts python scripts/dev/benchmark_many_lora.py"
    lines = (f"`{run_by} {' '.join(flags)}`, {sitting()}" for flags in runs)
    tables = (script("benchmark_many_lora.py", *flags) for flags in runs)
    return "\n".join(f"{table}\n({line})\n" for table, line in zip(tables, lines, strict=True))


def validation_losses(out_dir: Path) -> list[float]:
    (losses,) = read_metrics(out_dir / "metrics.csv", "validation_loss")
    return losses[np.isfinite(losses)].tolist()


def nf4() -> str:
    """LoRA on a base in float32 and on one in 4 bits, for two epochs on the questions."""
    rows = ["| base in | validation loss before | after one epoch | after two |", "|---|---:|---:|---:|"]
    for title, flags in (("float32", ()), ("4 bits", ("--quantize", "nf4"))):
        out_dir = Path("out/lora") / f"base-in-{title.replace(' ', '-')}"
        shutil.rmtree(ROOT / out_dir, ignore_errors=True)
        places = ("--pretrained_path", MODEL, "--data_dir", "data/questions", "--out_dir", out_dir)
        command(sys.executable, ROOT / "finetune_lora.py", *places, *NF4_RUN.split(), *flags)
        rows.append(f"| {title} | {' | '.join(f'{loss:.3f}' for loss in validation_losses(out_dir))} |")
    return "\n".join([*rows, "", f"(`finetune_lora.py {NF4_RUN}`, {sitting()})"])


def memory() -> str:
    """What a step of a 7B model takes, by running it on tensors without data."""
    rows = ["| | base in bfloat16 | with `--activation_checkpointing true` |", "|---|---:|---:|"]
    for method, title in (("lora", "LoRA, r = 8, on query and value"), ("adapter", "LLaMA-Adapter")):
        cells = [estimate("--method", method, *more)["at most"] for more in ((), CHECKPOINTING)]
        rows.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(rows)


def breakdown() -> str:
    """What the memory of a step is for."""
    return f"```\n{script('estimate_memory.py').strip()}\n```"


def fits() -> str:
    """What fits on which GPUs, up to 70B."""
    rows = [
        "| what | GPUs | a step, on each | a resume | received per micro-batch | flags |",
        "|---|---|---:|---:|---:|---|",
    ]
    for what, gpus, *flags in (
        ("LoRA, 7B", "1 of 24 GB"),
        ("LoRA, 7B", "1 of 16 GB", *CHECKPOINTING),
        ("LoRA, 7B, in 4 bits", "1 of 12 GB", "--quantize", "nf4"),
        ("LoRA, 7B, in 4 bits", "1 of 8 GB", "--quantize", "nf4", *CHECKPOINTING),
        ("LoRA, Llama 3.1 8B", "1 of 24 GB", "--model", "Llama-3.1-8B", *CHECKPOINTING),
        ("all weights, 7B", "4 of 40 GB", "--method", "full", "--devices", "4", *CHECKPOINTING),
        ("LoRA, 70B", "8 of 80 GB", "--model", "Llama-2-70B", "--devices", "8"),
        ("LoRA, 70B", "8 of 40 GB", "--model", "Llama-2-70B", "--devices", "8", *CHECKPOINTING),
        ("all weights, 70B", "16 of 80 GB", *LARGE, "--devices", "16", *CHECKPOINTING),
        ("all weights, 70B", "64 of 80 GB", *LARGE, "--devices", "64", *CHECKPOINTING),
    ):
        found = estimate(*flags)
        cells = [found["at most"], found["when a run is resumed"], found.get("come from other devices in it", "")]
        rows.append(f"| {what} | {gpus} | {' | '.join(cells)} | `{' '.join(flags)}` |".replace(" `` ", " "))
    return "\n".join([*rows, "", "(`python scripts/estimate_memory.py` with these flags)"])


def estimate(*flags: object) -> dict[str, str]:
    """The sizes that estimate_memory.py prints, by what it says of them."""
    printed = script("estimate_memory.py", *flags)
    return {text: size for size, text in re.findall(r"^([\d.,]+ GB(?: \(.*?\))?) ([^:\n]*)", printed, re.MULTILINE)}


def ledger() -> str:
    """What a step holds in memory, method by method."""
    return f"{script('memory_ledger.py').strip()}\n\n(`python scripts/memory_ledger.py`)"


def experiment(name: str) -> Callable[[], str]:
    """An experiment of the lab: its table and its picture."""

    def figure() -> str:
        text = script("lora_lab.py", "--only", name).strip()
        shutil.copy(f"out/lab/{name}.png", IMAGES / f"lab_{name}.png")
        picture = f"![{LAB[name]}](images/lab_{name}.png)"
        return f"{text}\n\n{picture}\n\n(`python scripts/lab/lora_lab.py --only {name}`, {sitting()})"

    return figure


def recipes() -> str:
    """What the settings of today take, by the same estimate."""
    rows = ["| GPU | model | settings | memory |", "|---|---|---|---:|"]
    modern = ("--lora_r", 16, "--lora_targets", "query,key,value,projection,mlp")
    for gpu, model, settings in (
        ("16 GB", "7B", ("--micro_batch_size", "2", *CHECKPOINTING)),
        ("24 GB", "7B", ("--micro_batch_size", "2")),
        ("24 GB", "Llama-3.1-8B", ("--micro_batch_size", "4", *CHECKPOINTING)),
    ):
        needed = estimate("--model", model, *modern, *settings)["at most"]
        rows.append(f"| {gpu} | {model} | `{' '.join(settings)}` | {needed} |")
    return "\n".join(rows)


def sitting() -> str:
    """When and on what this was measured."""
    return f"{datetime.date.today():%d %B %Y}, {describe_machine()}"


def script(name: str, *flags: object) -> str:
    (path,) = (ROOT / "scripts").rglob(name)
    return command(sys.executable, path, *flags)


def command(*words: object) -> str:
    """What a command prints, on stdout, and, for make, on stderr too; shown as it comes on ours."""
    merged = subprocess.STDOUT if words[0] == "make" else None
    arguments = list(map(str, words))
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(
            subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=merged, text=True, cwd=ROOT, env=ENVIRONMENT)
        )
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            print(line, end="", file=sys.stderr)
            lines.append(line)
    if process.returncode:
        raise UserError(f"{' '.join(arguments)} failed, see above")
    return "".join(lines)


FIGURES: dict[str, Callable[[], str]] = {
    "quickstart": quickstart,
    "comparison": comparison,
    "speed": lambda: benchmark("--rounds 2 --n_records 24"),
    "compiled": lambda: benchmark("--rounds 1 --n_records 24 --compile true"),
    "generation": generation,
    "many-lora": many_lora,
    "nf4": nf4,
    "memory": memory,
    "recipes": recipes,
    "breakdown": breakdown,
    "fits": fits,
    "adapter": adapter,
    "ledger": ledger,
    **{f"lab-{name}": experiment(name) for name in LAB},
}


if __name__ == "__main__":
    run(main)
