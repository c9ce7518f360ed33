"""The comparison, by the very scripts that it runs, on a tiny model."""

import io
import re
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

from lit_llama.errors import UserError

import compare_methods
import pytest
from builders import run_script
from compare_methods import lora_ranks
from comparison_report import COLUMNS, Method, Result, average, draw_methods, draw_ranks, new_figure, table

pytestmark = pytest.mark.slow
ARTICLE = "LoRA, the article's settings"


def in_process(script: str, *flags: object, quiet: bool = False) -> tuple[str, str]:
    """What compare_methods calls to run a script, without the seconds that a process takes to start."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        assert run_script(Path(script).stem, *flags) is None
    return out.getvalue(), err.getvalue() if quiet else ""


def test_a_script_is_called_as_a_user_would() -> None:
    assert "usage: generate.py" in compare_methods.call("generate.py", "--help")[0]
    with pytest.raises(UserError, match=r"generate\.py failed: error: --x is not a flag"):
        compare_methods.call("generate.py", "--x", 1, quiet=True)


def test_four_methods_are_trained_evaluated_and_asked(
    checkpoint: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_methods, "call", in_process)
    four_methods = compare_methods.four_methods
    monkeypatch.setattr(compare_methods, "four_methods", lambda *places: with_layer_0(four_methods(*places)))
    places = ("--data_dir", data_dir, "--pretrained_path", checkpoint, "--out_dir", tmp_path)
    limits = ("--max_new_tokens", 8, "--block_size", 100, "--n_answers", 3, "--num_epochs", 2)
    settings = ("--lora_r", 2, "--full_learning_rate", 0.01, "--article_settings", "true")
    others = ("--own_template_dir", data_dir, "--new_topics_dir", data_dir, "--questions", "Count to 3")
    assert run_script("compare_methods", *places, *limits, *others, *settings) is None
    text = (tmp_path / "comparison.md").read_text()
    rows = {cells[0].strip(): cells[1:] for cells in (line.strip("|").split("|") for line in text.splitlines())}
    loss = list(COLUMNS).index("loss")
    losses = [float(rows[name][loss]) for name in ("base", "LLaMA-Adapter", ARTICLE, "LoRA, r = 2", "full finetuning")]
    assert len(set(losses)) == 5
    assert losses[-1] < losses[0]
    assert all(
        cells[loss] == cells[loss + 1] for cells in rows.values() if len(cells) > loss + 1 and "." in cells[loss]
    )
    assert "base, own template" in rows
    # A of both targets' inputs and B of all rows, of 2 layers: C = 32, q, k and v 32 + 16 + 16, MLP 48
    n_lora = 2 * 2 * (3 * 32 + 64 + (32 + 32) + 2 * (32 + 48) + (48 + 32))
    assert int(rows["LoRA, r = 2"][0].replace(",", "")) == n_lora
    assert rows["base"][0].strip() == ""
    assert text.count("*base:*") == text.count("*full finetuning:*") == 1
    assert re.search(r"11 records .*, 3 to validate on; \d\d \w+ 20\d\d, .*(cores|GPU)", text)
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")


def with_layer_0(methods: list[Method]) -> list[Method]:
    """The tiny model has two layers; by default an adapter starts at the third."""
    flags = {"adapter": ("--start_layer", 0)}
    return [replace(m, flags=(*m.flags, *flags.get(m.kind, ()))) for m in methods]


def test_labels_of_the_pictures_do_not_overlap() -> None:
    """Every text of the pictures lies within them, and apart from the others."""
    base = Result(3.912, 19.3, [])
    trained = [Result(3.3 - 0.1 * i, 21.5 + i, [], 3.5, 10**i, 0.4 * i + 1, 2.5, 2.04) for i in range(3, 8)]
    four = dict(
        zip((Method(f"LLaMA-Adapter {i}", "adapter", Path()) for i in range(4)), [base, *trained[:3]], strict=True)
    )
    several = {method: replace(result, spread={"loss": 0.012, "rouge_l": 1.4}) for method, result in four.items()}
    ranks = dict(zip(lora_ranks(Path(), "1,2,4,8,16"), [base, *trained], strict=True))
    for draw, results in ((draw_methods, four), (draw_methods, several), (draw_ranks, ranks)):
        figure = new_figure()
        draw(figure, results)
        figure.canvas.draw()
        renderer = figure.canvas.get_renderer()
        for axes in figure.axes:
            boxes = [text.get_window_extent(renderer) for text in (*axes.texts, axes.title)]
            assert len(boxes) > 4
            assert all(axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 for box in boxes)
            assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_several_seeds_give_means_and_a_spread() -> None:
    one, two = (Result(3.0 + i, 20.0 + i, [f"answer {i}"], parameters=100, minutes=2.0 + i) for i in range(2))
    both = average([one, two])
    assert (both.loss, both.rouge_l, both.minutes, both.parameters, both.new_loss) == (3.5, 20.5, 2.5, 100, None)
    assert both.answers == ["answer 0"]
    assert both.spread == pytest.approx({"loss": 0.5**0.5, "rouge_l": 0.5**0.5})
    assert "| LoRA | 100 | 2.5 | 3.500 ± 0.707 | 20.5 ± 0.7 |" in table({Method("LoRA", "lora", Path()): both}, "")
    assert average([one]) is one


def test_each_seed_is_a_training_of_its_own_and_the_base_has_none(
    checkpoint: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[Method] = []

    def measure(method: Method, *_: object) -> Result:
        measured.append(method)
        return Result(float(len(measured)), 20.0, [""] * 3, file_mb=1.0, minutes=1.0)

    monkeypatch.setattr(compare_methods, "measure", measure)
    places = ("--data_dir", data_dir, "--pretrained_path", checkpoint, "--out_dir", tmp_path, "--block_size", 100)
    assert run_script("compare_methods", *places, "--ranks", "2", "--n_seeds", 3) is None
    assert [method.flags[-2:] for method in measured[2:]] == [("--seed", 1338), ("--seed", 1339)]
    assert len({method.folder(tmp_path) for method in measured}) == 4
    assert "| LoRA, r = 2 | 1.0 | 1.0 | 3.000 ± 1.000 |" in (tmp_path / "ranks.md").read_text()


def test_ranks_are_whole_numbers() -> None:
    assert [method.rank for method in lora_ranks(Path(), "1,16")] == [0, 1, 16]
    with pytest.raises(UserError, match="--ranks"):
        lora_ranks(Path(), "1,two")
