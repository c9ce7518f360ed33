"""The lab's experiments on a tiny model: their tables and pictures, and what must be equal in them."""

import json
from pathlib import Path

from lit_llama.model_folder import load_model

import lab_merging
import lab_runs
import lora_lab
import pytest
import torch
from builders import run_script
from lab_report import cell, table
from lab_runs import ALL, ATTENTION, Lab, Run, closest, scaled


def in_process(script: str, *flags: object) -> tuple[str, str]:
    """What lab_runs calls to run a script, without the seconds that a process takes to start."""
    assert run_script(Path(script).stem, *flags) is None
    return "", ""


@pytest.fixture
def lab(checkpoint: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    monkeypatch.setattr(lab_runs, "call", in_process)
    monkeypatch.setattr(lab_runs, "N_STEPS", 2)
    monkeypatch.setattr(lab_runs, "N_FEW", 3)
    monkeypatch.setattr(lab_runs, "BLOCK_SIZE", 100)
    monkeypatch.setattr(lab_merging, "BLOCK_SIZE", 100)
    return Lab(checkpoint, data_dir, tmp_path)


@pytest.mark.slow
def test_every_experiment_writes_a_table_and_a_picture_and_is_not_repeated(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = ("--data_dir", lab.data_dir, "--pretrained_path", lab.pretrained_path, "--out_dir", lab.out_dir)
    assert run_script("lora_lab", *places) is None
    texts = {name: (lab.out_dir / f"{name}.md").read_text() for name in lora_lab.EXPERIMENTS}
    for name, text in texts.items():
        assert text.startswith("| ")
        assert "nan" not in text
        assert (lab.out_dir / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(lab_runs, "call", None)  # nothing is trained or evaluated again
    monkeypatch.setattr(lab_runs, "response_loss", None)
    assert run_script("lora_lab", *places) is None
    assert all((lab.out_dir / f"{name}.md").read_text() == text for name, text in texts.items())


@pytest.mark.slow
def test_the_change_of_a_run_is_what_its_model_has_and_the_base_has_not(lab: Lab) -> None:
    before = {name: tensor.clone() for name, tensor in lab.base.state_dict().items()}
    for run in (Run(r=2, alpha=8, targets="query,value,mlp"), Run("full", rate=0.01)):
        idx = torch.randint(lab.base.config.vocab_size, (1, 9))
        with lab.model(run) as model, torch.no_grad():
            expected = model(idx)
        updates = lab.updates(run)
        if run.kind == "full":  # which changes the embedding and the norms as well
            trained = lab.split(load_model(lab.train(run)).state_dict())
            assert all(torch.allclose(lab.weights[name] + updates[name], trained[name]) for name in trained)
            continue
        with lab.updated(updates) as model, torch.no_grad():
            torch.testing.assert_close(model(idx), expected, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in lab.base.state_dict().items())


def test_equal_parameters_mean_another_rank_for_other_targets(lab: Lab) -> None:
    r = lab.rank_for(ATTENTION, like=scaled(8))
    one = lab.n_parameters(scaled(1, targets=ATTENTION))
    assert abs(lab.n_parameters(scaled(r, targets=ATTENTION)) - lab.n_parameters(scaled(8))) <= one / 2
    assert lab.rank_for(ALL, like=scaled(8)) == 8


def test_a_figure_is_measured_once(lab: Lab) -> None:
    assert lab.kept("a", lambda: 1.5) == 1.5
    assert lab.kept("a", lambda: 2.5) == 1.5
    assert json.loads((lab.out_dir / "figures.json").read_text()) == {"a": 1.5}


def test_twins_are_the_closest_pairs_each_record_once() -> None:
    train, validation = (
        [{"instruction": text, "input": "", "output": ""} for text in texts]
        for texts in (("a b c", "a b d", "x y", "e"), ("a b c d", "x z", "a b c"))
    )
    few, twins = closest(train, validation, 2)
    assert [one["instruction"] for one in few] == ["a b c", "a b d"]
    assert [one["instruction"] for one in twins] == ["a b c", "a b c d"]


def test_pooled_deviation_is_that_of_a_seed() -> None:
    assert lora_lab.pooled_deviation([[1.0, 3.0], [5.0], [2.0, 2.0]]) == pytest.approx(1.0)  # (1 + 1 + 0 + 0) / 2


def test_tables_are_markdown() -> None:
    assert table(["a", "b"], [["x", 1.23456], [1000]]) == "| a | b |\n| --- | ---: |\n| x | 1.235 |\n| 1,000 |  |"
    assert cell(None, 2) == ""


def test_an_experiment_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    message = run_script("lora_lab", "--only", "magic", "--out_dir", tmp_path)
    assert message is not None
    assert "there is no experiment magic; there are low_rank" in message
