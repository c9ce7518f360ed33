"""States of runs, and models of sharded ones: who reads them, and how much memory they take. CPU and gloo."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from lit_llama.model import LLaMA, LLaMAConfig
from lit_llama.model_folder import save_model_folder

import pytest
import torch
from builders import ROOT, metric_rows, run_script, state_tensors
from builders_processes import run_ranks, start
from test_distributed import arguments, on_two_processes


@pytest.mark.slow
def test_resume_auto_begins_and_continues(checkpoint: Path, data_dir: Path, tmp_path: Path) -> None:
    """A run that was killed before its first state has metrics and perhaps a best result; it begins anew."""
    begin = [*arguments("lora", checkpoint, data_dir, tmp_path), "--resume", "auto", "--save_interval", 3]
    (tmp_path / "metrics.csv").write_text("step,train_loss\n1,2\n")
    (tmp_path / "lit-llama-lora-finetuned-best.pth").touch()
    assert run_script("finetune_lora", *begin, "--max_steps", 3) is None
    assert run_script("finetune_lora", *begin) is None
    assert [row["step"] for row in metric_rows(tmp_path / "metrics.csv") if "train_loss" in row] == [*range(1, 7)]
    (tmp_path / "training-state.pth").unlink()
    assert "holds lit-llama-lora-finetuned.pth already" in str(run_script("finetune_lora", *begin))


@pytest.mark.slow
def test_a_sharded_state_has_the_bits_of_the_model_and_runs_on_any_number_of_processes(
    checkpoint: Path, data_dir: Path, tmp_path: Path
) -> None:
    begin = arguments("full", checkpoint, data_dir, tmp_path)
    steps = [*begin, "--resume", "true", "--max_steps"]
    for n, run in enumerate((on_two_processes, run_script, on_two_processes), 3):
        flags = [*begin, "--max_steps", n] if n == 3 else [*steps, n]
        result = run("finetune_full" if run is run_script else "full", *flags)
        assert result is None or result.returncode == 0, result
        assert [path.name for path in tmp_path.glob("training-state*")] == ["training-state.pth"]
        model, state = torch.load(tmp_path / "lit-llama.pth", weights_only=True), state_tensors(tmp_path)
        assert all(torch.equal(tensor, state[f"state_dict.{name}"]) for name, tensor in model.items())
    content = bytearray((tmp_path / "training-state.pth").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "training-state.pth").write_bytes(content)
    result = on_two_processes("full", *steps, 6)
    assert result.returncode == 1
    assert "training-state.pth is damaged" in result.stderr
    assert "Traceback" not in result.stderr


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_dead_process_ends_the_others_in_one_line(
    checkpoint: Path, data_dir: Path, tmp_path: Path, victim: int
) -> None:
    rest = [*arguments("full", checkpoint, data_dir, tmp_path), "--devices", 2, "--num_epochs", 1000]
    run = start(ROOT / "finetune_full.py", rest, tmp_path / "out", tmp_path / "log")
    wait_for(lambda: metric_rows(tmp_path / "metrics.csv"))
    child = int(Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()[0])
    os.kill((run.pid, child)[victim], signal.SIGKILL)
    run.join(60)
    wait_for(lambda: not Path(f"/proc/{child}/cmdline").exists() or not Path(f"/proc/{child}/cmdline").read_bytes())
    said = (tmp_path / "log").read_text()
    # Fabric's first process watches those that it has started; they find that the first has died when they next sum.
    ours, lightnings = "error: another process of this run has ended", f"[rank: {victim}] Child process with PID"
    assert ours in said or lightnings in said
    assert "Traceback" not in said


PEAKS = """
import json, re, sys, threading, time
from pathlib import Path
import torch
from lit_llama.finetuned import describe
from lit_llama.training.optimizer import AdamW
from lit_llama.training.run import launch, load_base
from lit_llama.training.state import TrainingState, save_model

def memory():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

class Peak(threading.Thread):
    def __enter__(self):
        self.before = self.peak = memory()
        self.over = False
        self.start()
        return self
    def run(self):
        while not self.over:
            self.peak = max(self.peak, memory())
            time.sleep(0.002)
    def __exit__(self, *_):
        self.over = True
        self.join()
        grown[name] = self.peak - self.before

folder, grown = Path(sys.argv[1]), {}
fabric = launch(2, 1, "fsdp", "32-true")
name = "load"
with Peak():
    llama = load_base(fabric, folder / "model" / "lit-llama.pth", torch.float32)
    fabric.setup(llama)
weights, metadata = llama.state_dict(keep_vars=True), describe(None, llama.config, "plain", {})
adamw = AdamW(llama.parameters(), lr=0.1)
for parameter in llama.parameters():
    parameter.grad = torch.ones_like(parameter)
adamw.step()
adamw.zero_grad()
name = "model"
with Peak():
    save_model(fabric, folder / "out", metadata, weights, torch.float32, {})
state = TrainingState(fabric, folder / "out", [], {}, False)
name = "state"
with Peak():
    state.save(1, metadata, weights, adamw)
if fabric.is_global_zero:
    print(json.dumps(grown))
"""


@pytest.mark.slow
def test_loading_and_saving_take_a_share_and_one_tensor(tmp_path: Path) -> None:
    """Of a model of 78 million weights on two processes: memory of the process itself, without mapped files."""
    config = LLaMAConfig(vocab_size=32000, n_layer=4, n_head=12, n_embd=768, n_hidden=2112)
    model = LLaMA(config).bfloat16()
    n, largest = sum(parameter.numel() for parameter in model.parameters()), 4 * config.vocab_size * config.n_embd
    save_model_folder(tmp_path / "model", model.state_dict(), config, {})
    (tmp_path / "driver.py").write_text(PEAKS)
    result = run_ranks(tmp_path / "driver.py", tmp_path)
    assert result.returncode == 0, result.stderr
    grown = json.loads(result.stdout)
    print(grown, {"share": 4 * n / 2, "largest": largest})
    assert grown["load"] < 1.1 * 4 * n / 2
    assert grown["model"] < 2 * largest + 0.1 * (8 * n / 2 + largest)
    assert grown["state"] < 2 * largest + 0.1 * (8 * n / 2 + largest)
