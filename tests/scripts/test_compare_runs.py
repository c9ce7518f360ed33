"""Runs compared: which belong together, and how far apart they are."""

import math
import statistics
from pathlib import Path
from typing import Any

from lit_llama.errors import UserError
from lit_llama.finetuned import describe
from lit_llama.lora import LoRAConfig
from lit_llama.storage.files import write_tensors
from lit_llama.training.log import COLUMNS
from lit_llama.training.state import STATE_FILE

import compare_runs
import pytest
from builders import TINY


def make_run(folder: Path, losses: list[float], **settings: Any) -> Path:
    """What a run leaves that is validated every two steps."""
    folder.mkdir()
    settings = {"seed": 1, "lora_r": 2, "data": "d", "base_path": str(folder), **settings}
    write_tensors(folder / STATE_FILE, {**describe(LoRAConfig(2), TINY, "plain", settings), "state_dict": {}})
    rows = [f"{2 * i},1,1,,{loss},,,,,1" for i, loss in enumerate(losses)]
    (folder / "metrics.csv").write_text("\n".join([",".join(COLUMNS), *rows, "9,9,9,0.1,,1e-3,1,1,1,9", ""]))
    return folder


def test_settings_are_compared_seed_by_seed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    two = {1: [3.0, 2.0, 2.5], 2: [3.0, 2.2, 2.1], 3: [3.0, 2.4, 2.3]}
    four = {3: [3.0, 2.2, 2.1], 1: [3.0, 1.9, 1.9], 2: [3.0, 2.2, 1.9]}
    runs = [make_run(tmp_path / f"a{seed}", losses, seed=seed) for seed, losses in two.items()]
    runs += [make_run(tmp_path / f"b{seed}", losses, seed=seed, lora_r=4) for seed, losses in four.items()]
    compare_runs.main(tuple(runs), tmp_path / "runs.png")
    differences = [1.9 - 2.0, 1.9 - 2.1, 2.1 - 2.3]
    half = 4.303 * statistics.stdev(differences) / math.sqrt(3)  # Student's t, two degrees of freedom
    first, second = capsys.readouterr().out.splitlines()[2:]
    assert first == "| lora_r 2 | 3 | 2.3000 | 2.1333 | 2 to 4 |  |"
    assert second == f"| lora_r 4 | 3 | 1.9667 | 1.9667 | 2 to 4 | {statistics.mean(differences):+.4f} ± {half:.4f} |"
    assert (tmp_path / "runs.png").stat().st_size > 5000


def test_one_seed_and_other_methods_and_data(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    runs = make_run(tmp_path / "a", [3.0, 2.0]), make_run(tmp_path / "b", [3.0, 2.5], data="e", quantize="nf4")
    compare_runs.main(runs, tmp_path / "runs.png")
    out, err = capsys.readouterr()
    assert "| data 'e', quantize 'nf4' | 1 | 2.5000 | 2.5000 | 2 | +0.5000 (one seed) |" in out
    assert "the runs have different data" in err


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", [3.0])
    with pytest.raises(UserError, match="have the same settings and seed"):
        compare_runs.main((run, make_run(tmp_path / "b", [2.0])))
    with pytest.raises(UserError, match="never validated"):
        compare_runs.main((make_run(tmp_path / "c", []),))
    with pytest.raises(UserError, match="is not the folder of a run"):
        compare_runs.main((tmp_path,))
