"""Two processes (CPU, gloo) must give what one gives with the same batch: DDP and FSDP2, by Fabric or torchrun."""

import subprocess
import sys
from pathlib import Path
from subprocess import CompletedProcess

from lit_llama.model_folder import load_model

import pytest
import torch
from builders import RESULTS, ROOT, TORCHRUN, metric_rows, run_script
from builders_processes import run_ranks

pytestmark = pytest.mark.slow

SETTINGS = {
    "lora": ["--learning_rate", 0.01, "--lora_dropout", 0, "--lora_targets", "query,value,mlp"],
    "adapter": ["--learning_rate", 0.01, "--start_layer", 0, "--warmup_epochs", 1],
    "full": ["--learning_rate", 0.003, "--moments_dtype", "float32"],
}

# Runs a finetune script and prints how often DDP reduced gradients.
COUNTING = """
import finetune_lora as script
from lightning import Fabric
from lit_llama.cli import run
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

count, setup, close = [0], Fabric.setup, script.TrainingLog.close

def hook(state, bucket):
    count[0] += bucket.is_last()
    return allreduce_hook(state, bucket)

def hooked_setup(fabric, *args, **kwargs):
    model = setup(fabric, *args, **kwargs)
    model._forward_module.register_comm_hook(None, hook)
    return model

def counted_close(log, title):
    close(log, title)
    if log.fabric.is_global_zero:
        print("reductions:", count[0])

Fabric.setup, script.TrainingLog.close = hooked_setup, counted_close
run(script.main)
"""


def arguments(method: str, checkpoint: Path, data_dir: Path, out_dir: Path) -> list[object]:
    """6 steps, 2 an epoch, of 3 micro-batches: of two processes, one gets two and the other one and an empty one."""
    paths = ["--data_dir", data_dir, "--pretrained_path", checkpoint, "--out_dir", out_dir, "--precision", "32-true"]
    steps = ["--batch_size", 6, "--micro_batch_size", 2, "--num_epochs", 3, "--block_size", 128, "--eval_interval", 2]
    return [*paths, *steps, *SETTINGS[method], "--sample_prompt", "Count to 4"]


def on_two_processes(method: str, *rest: object) -> CompletedProcess:
    return run_ranks(ROOT / f"finetune_{method}.py", *rest)


def launched(method: str, *rest: object) -> CompletedProcess:
    """As a user launches two processes: by Fabric alone or, the adapter, by torchrun."""
    launcher = [*TORCHRUN, "--nproc-per-node", "2"] if method == "adapter" else [sys.executable]
    command = [*launcher, ROOT / f"finetune_{method}.py", *rest, "--devices", 2]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True)


@pytest.fixture(scope="module", params=RESULTS)
def method(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def single(method: str, checkpoint: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out_dir = tmp_path_factory.mktemp("single")
    assert run_script(f"finetune_{method}", *arguments(method, checkpoint, data_dir, out_dir)) is None
    return out_dir


@pytest.fixture(scope="module")
def single_full(checkpoint: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out_dir = tmp_path_factory.mktemp("single")
    assert run_script("finetune_full", *arguments("full", checkpoint, data_dir, out_dir)) is None
    return out_dir


def assert_equal_runs(one: Path, other: Path, method: str) -> None:
    rows, others = (metric_rows(folder / "metrics.csv") for folder in (one, other))
    assert len(rows) == len(others)
    for row, their in zip(rows, others, strict=True):
        for key in ("step", "records", "tokens", "train_loss", "validation_loss"):
            assert row.get(key, 0) == pytest.approx(their.get(key, 0), rel=1e-4), (row, their)
    samples = [(folder / "samples.txt").read_text().partition("step 2: ") for folder in (one, other)]
    assert samples[0][:2] == samples[1][:2]  # before training; later, rounding may take another of two close tokens
    assert all("step 6: " in after for _, _, after in samples)
    contents = [torch.load(folder / RESULTS[method], weights_only=True) for folder in (one, other)]
    first, second = (content.get("state_dict", content) for content in contents)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=1e-3, atol=1e-4)


def test_two_processes_give_what_one_gives(
    method: str, single: Path, checkpoint: Path, data_dir: Path, tmp_path: Path
) -> None:
    run = on_two_processes if method == "full" else launched
    result = run(method, *arguments(method, checkpoint, data_dir, tmp_path))
    assert result.returncode == 0, result.stderr
    assert_equal_runs(single, tmp_path, method)
    if method == "full":
        load_model(tmp_path / "lit-llama.pth")


def test_a_sharded_base_gives_what_one_process_gives(
    method: str, single: Path, checkpoint: Path, data_dir: Path, tmp_path: Path
) -> None:
    other_way = {"lora": "fsdp", "adapter": "fsdp", "full": "ddp"}  # than the one that is the default
    rest = [*arguments(method, checkpoint, data_dir, tmp_path), "--strategy", other_way[method]]
    result = on_two_processes(method, *rest, "--activation_checkpointing", "true")
    assert result.returncode == 0, result.stderr
    assert_equal_runs(single, tmp_path, method)


@pytest.mark.parametrize("first_sharded", [True, False])
def test_the_state_of_a_sharded_run_is_continued_by_one_process_and_the_other_way_round(
    checkpoint: Path, data_dir: Path, tmp_path: Path, first_sharded: bool, single_full: Path
) -> None:
    rest = arguments("full", checkpoint, data_dir, tmp_path)
    begin, go_on = [*rest, "--max_steps", 3], [*rest, "--resume", "true"]
    sharded, alone = (begin, go_on) if first_sharded else (go_on, begin)
    if not first_sharded:
        assert run_script("finetune_full", *alone) is None
    result = on_two_processes("full", *sharded)
    assert result.returncode == 0, result.stderr
    if first_sharded:
        assert run_script("finetune_full", *alone) is None
    steps = [row["step"] for row in metric_rows(tmp_path / "metrics.csv") if "train_loss" in row]
    assert steps == [1, 2, 3, 4, 5, 6]
    one, other = (load_model(folder / "lit-llama.pth").state_dict() for folder in (single_full, tmp_path))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-3, atol=1e-4)


def test_gradients_are_reduced_once_an_optimizer_step(checkpoint: Path, data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "driver.py").write_text(COUNTING)
    result = run_ranks(tmp_path / "driver.py", *arguments("lora", checkpoint, data_dir, tmp_path / "out"))
    assert result.returncode == 0, result.stderr
    assert result.stdout == "reductions: 6\n"


def test_a_sharded_model_holds_an_equal_share_on_each_device(tmp_path: Path) -> None:
    """Under the very mesh that Fabric passes; a model that is only replicated would give the same results."""
    program = """
import torch
from builders import TINY, random_model
from lit_llama.training.run import launch

fabric = launch(2, 1, "fsdp", "32-true")
model = random_model(TINY)
n_parameters = sum(p.numel() for p in model.parameters())
fabric.setup(model)
share = sum(p.to_local().numel() for p in model.parameters())
assert share <= 0.51 * n_parameters, (share, n_parameters)
"""
    (tmp_path / "driver.py").write_text(program)
    result = run_ranks(tmp_path / "driver.py")
    assert result.returncode == 0, result.stderr


def test_fewer_processes_than_asked_for_end_in_one_line(checkpoint: Path, data_dir: Path, tmp_path: Path) -> None:
    result = run_ranks(ROOT / "finetune_lora.py", *arguments("lora", checkpoint, data_dir, tmp_path), n=1)
    assert result.returncode != 0
    assert "error: could not launch 2 processes: You set `devices=2`" in result.stderr
    assert 'finetune_lora.py", line' not in result.stderr
    assert not list(tmp_path.iterdir())


def test_more_devices_than_there_are_end_in_one_line(
    checkpoint: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    rest = [*arguments("lora", checkpoint, data_dir, tmp_path), "--devices", 2]
    assert run_script("finetune_lora", *rest) == (
        "error: 2 devices were requested, but this machine has 1 GPU; lower --devices"
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "2000 devices were requested" in run_script("finetune_lora", *rest, "--devices", 2000)
