"""The lab's experiments on a tiny model: their tables and pictures, and what must be equal in them."""

import itertools
import json
import math
import re
from pathlib import Path

from lit_llama.lora import lora_layers, merge_lora

import comparison_report
import lab_runs
import lora_lab
import pytest
import torch
from builders import ROOT, run_script
from comparison_report import MARKERS
from lab_report import cell, difference, table
from lab_runs import ATTENTION, MLP, Lab, Run, closest
from lora_lab import PLACES, RANKS_OF_PLACES, first_update


@pytest.fixture
def lab(checkpoint: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    monkeypatch.setattr(lab_runs, "N_FEW", 3)
    monkeypatch.setattr(lab_runs, "BLOCK_SIZE", 100)
    monkeypatch.setattr(lab_runs, "N_ANSWER", 5)
    monkeypatch.setattr(lora_lab, "SEEDS", (1, 2))
    monkeypatch.setattr(lora_lab, "RATES", (2e-3, 8e-3))
    monkeypatch.setattr(lora_lab, "N_RECORDS", 8)
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
    monkeypatch.setattr(Lab, "train", None)  # nothing is trained or evaluated again
    monkeypatch.setattr(lab_runs, "mean_loss", None)
    assert run_script("lora_lab", *places) is None
    assert all((lab.out_dir / f"{name}.md").read_text() == text for name, text in texts.items())


def test_arms_of_a_seed_see_the_same_records_and_train_the_same_matrices(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[list[int]]] = {}
    for kind in ("lora", "full"):
        drawn: list[list[int]] = []

        def backward(_lab: Lab, model: torch.nn.Module, _data: object, records: object, drawn: list = drawn) -> None:
            drawn.append([*records])
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None

        monkeypatch.setattr(Lab, "backward", backward)
        before = {name: tensor.clone() for name, tensor in lab.base.named_parameters()}
        [(_, model)] = lab.train(Run(kind, n_steps=3, at=(3,)))
        seen[kind] = drawn
        merge_lora(model)
        changed = {name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])}
        assert changed == {name for name in before if ".h." in name and before[name].dim() == 2}
    assert seen["lora"] == seen["full"]


def test_a_first_step_is_that_of_adamw(lab: Lab) -> None:
    run = Run(r=2, alpha=8, rate=2e-3, n_steps=1, at=(0, 1))
    gradients = lab.gradients(lab_runs.BatchSchedule(lab.dataset(), 4, 4, run.seed).step(0).records.tolist())
    start = lab.initial_A(run)
    for step, model in lab.train(run):
        if step:
            name, layer = next((name, layer) for name, layer in lora_layers(model) if name.endswith("attn.c_proj"))
            gradient = gradients["model.layers.0.self_attn.o_proj"]
            assert name == "transformer.h.0.attn.c_proj"
            expected = -8 / 2 * 2e-3 * (gradient @ start["model.layers.0.self_attn.o_proj"].mT).sign()
            torch.testing.assert_close(layer.delta().detach(), expected @ layer.lora_A.detach(), rtol=1e-3, atol=1e-6)
    assert torch.linalg.matrix_rank(first_update(gradient, 2, 8)) == 2


def test_the_base_is_unchanged_after_an_update_was_tried(lab: Lab) -> None:
    before = {name: tensor.clone() for name, tensor in lab.base.state_dict().items()}
    with lab.updated({name: torch.ones_like(weight) for name, weight in lab.weights.items()}) as model:
        assert not torch.equal(model.transformer.h[1].attn.c_attn.weight, before["transformer.h.1.attn.c_attn.weight"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in lab.base.state_dict().items())


def test_the_loss_of_the_base_models_own_answers_is_that_of_its_tokens(lab: Lab) -> None:
    batch, loss = lab.ordinary[0], lab.ordinary_losses(lab.base)[0]
    tokens = torch.cat([batch.input_ids[0], batch.targets[-1:]])
    with torch.no_grad():
        logs = lab.base(tokens[None, :-1])[0].log_softmax(-1)
    expected = -logs[range(len(tokens) - 1), tokens[1:]][-len(batch.targets) :].mean()
    assert loss == pytest.approx(float(expected), rel=1e-4)


def test_places_have_about_as_many_parameters_in_the_real_model() -> None:
    C, H, kv = 576, 1536, 192
    sizes = {"query": 2 * C, "key": kv + C, "value": kv + C, "projection": 2 * C, "mlp": 3 * (C + H)}
    counts = {title: RANKS_OF_PLACES[title] * sum(sizes[name] for name in names) for title, names in PLACES.items()}
    assert max(counts.values()) / min(counts.values()) < 1.03
    assert PLACES["all"] == ATTENTION + MLP


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


def test_a_difference_is_paired_and_its_interval_students() -> None:
    assert difference([3.1, 2.1, 1.1], [3.0, 2.0, 1.0]) == "0.100 ± 0.000"
    assert difference([1.0, 2.0, 3.0], []) == f"2.000 ± {4.30 / 3**0.5:.3f}"


def test_tables_are_markdown() -> None:
    assert table(["a", "b"], [["x", 1.23456], [1000]]) == "| a | b |\n| --- | ---: |\n| x | 1.235 |\n| 1,000 |  |"
    assert cell(None, 2) == ""


def test_an_experiment_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    message = run_script("lora_lab", "--only", "magic", "--out_dir", tmp_path)
    assert message is not None
    assert "there is no experiment magic; there are spectrum" in message


DEUTERANOPIA = (  # Machado et al. 2009, severity 1, on linear RGB
    (0.367322, 0.860646, -0.227968),
    (0.280085, 0.672501, 0.047413),
    (-0.011820, 0.042940, 0.968881),
)
TO_XYZ = ((0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750), (0.0193339, 0.1191920, 0.9503041))
WHITE = (0.95047, 1.0, 1.08883)


def seen_as(color: str) -> tuple[float, float, float]:
    """A colour in CIELAB as someone with deuteranopia sees it."""
    rgb = torch.tensor([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)], dtype=torch.float64)
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = (torch.tensor(DEUTERANOPIA, dtype=torch.float64) @ linear).clamp(0, 1)
    xyz = torch.tensor(TO_XYZ, dtype=torch.float64) @ seen / torch.tensor(WHITE, dtype=torch.float64)
    x, y, z = torch.where(xyz > 0.008856, xyz ** (1 / 3), 7.787 * xyz + 16 / 116).tolist()
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def test_colours_can_be_told_apart_by_everybody_and_so_can_lines_without_them() -> None:
    pairs = itertools.combinations(comparison_report.COLORS.values(), 2)
    assert min(math.dist(seen_as(one), seen_as(other)) for one, other in pairs) >= 20
    assert MARKERS.keys() == comparison_report.COLORS.keys()
    assert len(set(MARKERS.values())) == len(MARKERS)


def test_every_experiment_of_the_guide_is_one_of_the_lab() -> None:
    pages = [(ROOT / "howto" / name).read_text(encoding="utf-8") for name in ("lab.md", "understand_lora.md")]
    named = set(re.findall(r"figures: lab-(\w+)", "".join(pages)))
    assert named | {"targets"} == {*lora_lab.EXPERIMENTS}
