import contextlib
import fcntl
import os
import struct
import termios
import time
from itertools import pairwise
from pathlib import Path

from lit_llama.data.batches import Step
from lit_llama.errors import UserError
from lit_llama.training.log import COLUMNS, TrainingLog, cut_metrics, make_logger, plot_losses, read_metrics

import numpy as np
import pytest
from builders import Lengths, metric_rows
from builders_processes import start
from lightning import Fabric
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

EIGHT = Step(Lengths(np.array([12, 13] * 4)), np.arange(8), 50)  # records, of 100 tokens


def run_steps(path: Path, first: int, last: int, n_steps: int) -> None:
    log = TrainingLog(Fabric(accelerator="cpu", devices=1), path, n_steps, first, interval=1)
    if first == 0:
        log.validation(0, 3.0)
    for step in range(first + 1, last + 1):
        log.step(step, EIGHT, 3 - step / 10, 1e-3, 0.5)
        if step % 2 == 0:
            log.validation(step, 3 - step / 10)
    log.close("a model, LoRA with r = 8")


def test_each_step_and_validation_is_a_row(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run_steps(tmp_path, 0, 4, 4)
    assert (tmp_path / "metrics.csv").read_text().splitlines()[0] == ",".join(COLUMNS)
    rows = metric_rows(tmp_path / "metrics.csv")
    assert [(r["step"], "validation_loss" in r) for r in rows] == [
        (0, True), (1, False), (2, False), (2, True), (3, False), (4, False), (4, True),
    ]  # fmt: skip
    assert (rows[-1]["records"], rows[-1]["tokens"]) == (32, 400)
    assert rows[4]["train_loss"] == pytest.approx(2.7)
    assert rows[4]["gradient_norm"] == pytest.approx(0.5)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "step 3/4: loss 2.7000" in captured.err
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_resuming_drops_rows_after_the_state_and_counts_on(tmp_path: Path) -> None:
    run_steps(tmp_path, 0, 3, 6)
    run_steps(tmp_path, 2, 6, 6)  # step 3 was lost with the crash
    rows = [row for row in metric_rows(tmp_path / "metrics.csv") if "train_loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["tokens"] for row in rows] == [100, 200, 300, 400, 500, 600]
    assert all(a["seconds"] <= b["seconds"] for a, b in pairwise(rows))


@pytest.mark.slow
def test_a_row_that_was_cut_off_is_no_trouble(tmp_path: Path) -> None:
    run_steps(tmp_path, 0, 2, 4)
    path = tmp_path / "metrics.csv"
    path.write_text(path.read_text() + "3,24,30")
    run_steps(tmp_path, 2, 4, 4)
    assert [row["step"] for row in metric_rows(path)] == [0, 1, 2, 2, 3, 4, 4]


def test_a_file_without_a_row_up_to_the_step_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("mine\n")
    run_steps(tmp_path, 2, 4, 4)
    assert path.read_text().startswith("mine\n3,8,100,")


@pytest.mark.parametrize("cell", ["inf", "nan", ""])
def test_a_row_without_its_counts_is_not_gone_on_from(cell: str, tmp_path: Path) -> None:
    run_steps(tmp_path, 0, 1, 4)
    path = tmp_path / "metrics.csv"
    path.write_text(f"{path.read_text()}2,{cell},50,1,,1e-3,0.5,100,1,9\n")
    run_steps(tmp_path, 2, 3, 4)
    assert [row["step"] for row in metric_rows(path)][-2:] == [1, 3]


@pytest.mark.slow
def test_a_long_run_is_cut_and_drawn_in_seconds(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    rows = (f"{i},{i},{i},{1 + 1 / i},,1e-3,0.5,100,1,{i}\n" for i in range(1, 200_001))
    path.write_text(f"{','.join(COLUMNS)}\n{''.join(rows)}")
    start = time.process_time()
    assert cut_metrics(path, 150_000)["step"] == 150_000
    plot_losses(path, tmp_path / "loss.png", "a long run")
    assert time.process_time() - start < 10  # of 200,000 steps; sums over neighbours would take minutes
    steps, losses = read_metrics(path, "step", "train_loss")
    assert (len(steps), losses[-1]) == (150_000, pytest.approx(1 + 1 / 150_000, abs=1e-9))


PROGRAM = """
import sys, time
from pathlib import Path
from lightning import Fabric
import numpy as np
from builders import Lengths
from lit_llama.data.batches import Step
from lit_llama.training.log import TrainingLog
log = TrainingLog(Fabric(accelerator="cpu", devices=1), Path(sys.argv[1]), 3, 0, interval=1)
for step in (1, 2, 3):
    time.sleep(0.15)
    log.step(step, Step(Lengths(np.full(8, 25)), np.arange(4), 100), 1.5, 1e-3, 0.5)
log.close("title")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("size", "bar"), [((40, 120), True), ((0, 0), False)])
def test_a_terminal_gets_a_bar_and_one_without_a_size_gets_lines(tmp_path: Path, size: tuple, bar: bool) -> None:
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    (tmp_path / "program.py").write_text(PROGRAM)
    process = start(tmp_path / "program.py", (tmp_path,), tmp_path / "out", Path(os.ttyname(theirs)))
    output = os.read(ours, 4096)
    os.close(theirs)  # which the process has opened by now
    with contextlib.suppress(OSError):  # how Linux reports that the other end has closed
        while chunk := os.read(ours, 4096):
            output += chunk
    process.join()
    assert process.exitcode == 0
    assert (b"3/3 [" in output and b"loss 1.500" in output) == bar
    assert (b"step 3/3: loss 1.5000" in output) != bar


def test_tensorboard_gets_each_row_and_a_resumed_run_goes_on(tmp_path: Path) -> None:
    for first, last in ((0, 3), (3, 6)):
        fabric = Fabric(accelerator="cpu", devices=1, loggers=make_logger("tensorboard", tmp_path))
        log = TrainingLog(fabric, tmp_path, 6, first, interval=1)
        for step in range(first + 1, last + 1):
            log.step(step, EIGHT, 3 - step / 10, 1e-3, 0.5)
        log.validation(last, 2.5)  # neither part was closed: what was logged is on the disk all the same
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"train_loss", "validation_loss", "learning_rate", "tokens_per_second", "memory_gb"} <= {
        *events.Tags()["scalars"]
    }
    losses = [(event.step, event.value) for event in events.Scalars("train_loss")]
    assert losses == [(step, pytest.approx(3 - step / 10)) for step in range(1, 7)]
    assert [event.step for event in events.Scalars("validation_loss")] == [3, 6]


def test_any_logger_of_lightning_is_named_by_its_class(tmp_path: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=1, loggers=make_logger("lightning.pytorch.loggers.CSVLogger", tmp_path))
    TrainingLog(fabric, tmp_path, 2, 0, interval=1).step(1, EIGHT, 2.5, 1e-3, 0.5)
    (file,) = (tmp_path / "lightning_logs").glob("*/metrics.csv")
    assert "2.5" in file.read_text()
    for name in ("wandb", "no.such.Logger", "lightning.pytorch.loggers.Nothing", "math.sqrt"):
        with pytest.raises(UserError, match=name):
            make_logger(name, tmp_path)
