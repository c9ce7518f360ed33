"""What a GPU does for a micro-batch, on one that is there or pretended (see scripts/dev/check_gpu.py)."""

import sys

import check_gpu
import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.mark.slow
def test_kernels_waits_and_graphs_do_not_grow(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    flags = ["--model", "Llama-3.2-1B", "--layers", "2", "--only", "training", "compiled"]
    monkeypatch.setattr(sys, "argv", ["check_gpu.py", *flags])
    check_gpu.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    counted = {row[0]: row[-1] for row in rows if "kernels and waits" in row[0] or "graphs" in row[0]}
    assert len(counted) == 3
    assert all(verdict.startswith("yes") for verdict in counted.values()), rows
