"""finetune_lora.py and generate_lora.py from the command line, on a tiny model."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lit_llama.log import read_metrics

ROOT = Path(__file__).parent.parent
LORA_FILE = "lit-llama-lora-finetuned.pth"


def command(script: str, *arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / script), *map(str, arguments)]


def call(script: str, *arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(command(script, *arguments), capture_output=True, text=True, cwd=ROOT)


def finetune_arguments(checkpoint: Path, data_dir: Path, out_dir: Path) -> list[object]:
    paths = ["--data_dir", data_dir, "--pretrained_path", checkpoint, "--out_dir", out_dir, "--precision", "32-true"]
    steps = ["--batch_size", 4, "--micro_batch_size", 2, "--num_epochs", 4, "--warmup_steps", 2, "--save_interval", 2]
    return [*paths, *steps, "--learning_rate", 0.01, "--eval_interval", 3, "--lora_dropout", 0.2, "--block_size", 128]


@pytest.fixture(scope="module")
def finished(checkpoint: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of an undisturbed run: 12 steps, 3 in each of 4 epochs."""
    out_dir = tmp_path_factory.mktemp("finished")
    result = call(
        "finetune_lora.py", *finetune_arguments(checkpoint, data_dir, out_dir), "--lora_r", 4, "--lora_alpha", 32
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    assert "12 steps" in result.stderr
    return out_dir


def test_the_losses_fall_and_the_learning_rate_warms_up_in_optimizer_steps(finished: Path) -> None:
    rows = read_metrics(finished / "metrics.csv")
    steps = [row for row in rows if "train_loss" in row]
    assert [row["learning_rate"] for row in steps] == pytest.approx([0.005] + [0.01] * 11)
    assert steps[-1]["records"] == 4 * 11
    validation = [row["validation_loss"] for row in rows if "validation_loss" in row]
    assert validation[-1] < validation[0] - 0.1


def test_the_file_describes_itself_and_is_neither_empty_nor_zero(finished: Path) -> None:
    content = torch.load(finished / LORA_FILE, weights_only=True)
    assert content["lora"] == {"r": 4, "alpha": 32, "dropout": 0.2, "targets": ("query", "value")}
    assert content["prompt_style"] == "plain"
    assert content["hyperparameters"]["num_epochs"] == 4
    assert len(content["state_dict"]) == 4
    assert all(t.isfinite().all() and t.any() for t in content["state_dict"].values())


@pytest.mark.parametrize("merge", ["true", "false"])
def test_generate_lora_needs_no_lora_flag(finished: Path, checkpoint: Path, merge: str) -> None:
    arguments = ["--lora_path", finished / LORA_FILE, "--pretrained_path", checkpoint, "--max_new_tokens", 10]
    prompt = ["--prompt", "Count to 3", "--temperature", 0, "--merge", merge]
    result = call("generate_lora.py", *arguments, *prompt)
    assert result.returncode == 0, result.stderr
    base = call("generate.py", "--checkpoint_path", checkpoint, "--max_new_tokens", 10, *prompt[:4])
    assert base.returncode == 0, base.stderr
    assert base.stdout.startswith("Count to 3")
    assert result.stdout != base.stdout
    for stderr in (result.stderr, base.stderr):
        assert "Time for inference: " in stderr
        assert "tokens/sec" in stderr
        assert "Memory used: " in stderr


def wait_for_step(out_dir: Path, step: int, process: subprocess.Popen) -> None:
    while not any(row["step"] >= step for row in read_metrics(out_dir / "metrics.csv")):
        assert process.poll() is None
        time.sleep(0.005)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_run_that_was_stopped_and_resumed_ends_in_the_same_bits(
    finished: Path, checkpoint: Path, data_dir: Path, tmp_path: Path, number: signal.Signals
) -> None:
    arguments = [*finetune_arguments(checkpoint, data_dir, tmp_path), "--lora_r", 4, "--lora_alpha", 32]
    process = subprocess.Popen(command("finetune_lora.py", *arguments), stderr=subprocess.PIPE, text=True, cwd=ROOT)
    wait_for_step(tmp_path, 5, process)
    os.kill(process.pid, number)
    _, stderr = process.communicate()
    assert process.returncode != 0
    assert not (tmp_path / LORA_FILE).exists()
    if number != signal.SIGKILL:
        assert stderr.endswith("as asked; continue with --resume true\n")
    refused = call("finetune_lora.py", *arguments)
    assert refused.returncode == 1
    assert "--resume true" in refused.stderr

    resumed = call("finetune_lora.py", *arguments, "--resume", "true")
    assert resumed.returncode == 0, resumed.stderr
    assert "step 1/12" not in resumed.stderr
    for name in (LORA_FILE, "training-state.pth"):
        one, other = (torch.load(folder / name, weights_only=True) for folder in (finished, tmp_path))
        assert one["state_dict"].keys() == other["state_dict"].keys()
        assert all(torch.equal(tensor, other["state_dict"][key]) for key, tensor in one["state_dict"].items())
    one, other = (read_metrics(folder / "metrics.csv") for folder in (finished, tmp_path))
    for key in ("step", "records", "tokens", "train_loss", "validation_loss"):
        assert [row.get(key) for row in one] == [row.get(key) for row in other]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--learning_rate", "1e30"], "the loss of step"),
        (["--resume", "true"], "training-state.pth does not exist"),
        (["--lora_targets", "query,foo"], "foo"),
        (["--data_dir", "nowhere"], "prepare_"),
        (["--pretrained_path", "nowhere/lit-llama.pth"], "nowhere/lit-llama.pth does not exist"),
        (["--block_size", "2"], "no records"),
    ],
)
def test_mistakes_end_in_one_line(
    checkpoint: Path, data_dir: Path, tmp_path: Path, extra: list[str], message: str
) -> None:
    result = call("finetune_lora.py", *finetune_arguments(checkpoint, data_dir, tmp_path), *extra)
    assert result.returncode == 1
    assert message in result.stderr.splitlines()[-1]
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in result.stderr
    assert not (tmp_path / LORA_FILE).exists()


def test_a_toy_task_is_learned_and_generation_stops_by_itself(checkpoint: Path, tmp_path: Path) -> None:
    """The end of sequence is trained on and passed on, so that a learned answer ends."""
    records = '[{"instruction": "Say hello", "output": "hello there"}]'
    (tmp_path / "train.json").write_text(records)
    files = ["--train_file", tmp_path / "train.json", "--validation_file", tmp_path / "train.json"]
    prepared = call("scripts/prepare_json.py", *files, "--pretrained_path", checkpoint, "--data_dir", tmp_path / "data")
    assert prepared.returncode == 0, prepared.stderr
    settings = [
        "--learning_rate",
        0.03,
        "--num_epochs",
        60,
        "--warmup_steps",
        1,
        "--lora_targets",
        "query,value,mlp,head",
    ]
    paths = ["--pretrained_path", checkpoint, "--data_dir", tmp_path / "data", "--out_dir", tmp_path / "out"]
    trained = call("finetune_lora.py", *paths, *settings)
    assert trained.returncode == 0, trained.stderr
    lora = ["--lora_path", tmp_path / "out" / LORA_FILE, "--pretrained_path", checkpoint]
    answer = call("generate_lora.py", *lora, "--prompt", "Say hello", "--temperature", 0, "--max_new_tokens", 20)
    assert answer.stdout == "hello there\n", answer.stderr
    assert math.isfinite(read_metrics(tmp_path / "out" / "metrics.csv")[-1]["validation_loss"])
