"""The three finetune scripts and their generate scripts, run on a tiny model as a user would run them."""

import ast
import importlib
import os
import re
import shlex
import signal
import time
from pathlib import Path
from typing import Any

from lit_llama.prompt import STYLES
from lit_llama.storage.files import lock_of, read_file
from lit_llama.tokenizer import Tokenizer
from lit_llama.training import run as training

import pytest
import torch
from builders import RECORDS, RESULTS, ROOT, metric_rows, prepare_records, run_script
from builders_processes import start
from lightning import Fabric
from lightning.fabric.plugins import MixedPrecision

SETTINGS = {
    "lora": ["--learning_rate", 0.01, "--lora_r", 4, "--lora_alpha", 32, "--lora_dropout", 0.2, "--warmup_steps", 2],
    "adapter": [
        "--learning_rate",
        0.05,
        "--start_layer",
        0,
        "--prompt_length",
        4,
        "--warmup_epochs",
        1,
    ],
    "full": ["--learning_rate", 0.003, "--warmup_steps", 2],
}


def finetune_arguments(method: str, checkpoint: Path, data_dir: Path, out_dir: Path) -> list[object]:
    """12 steps, 3 in each of 4 epochs."""
    paths = ["--data_dir", data_dir, "--pretrained_path", checkpoint, "--out_dir", out_dir, "--precision", "32-true"]
    steps = ["--batch_size", 4, "--micro_batch_size", 2, "--num_epochs", 4, "--save_interval", 2, "--eval_interval", 3]
    return [*paths, *steps, *SETTINGS[method], "--block_size", 128]


BEST = {method: name.replace(".pth", "-best.pth") for method, name in RESULTS.items()} | {"full": "best/lit-llama.pth"}
SAVE_BEST = {
    "lora": "save_weights(fabric, out_dir / BEST_FILE, metadata, weights, dtype)",
    "full": "save_model(fabric, out_dir / BEST_FOLDER, metadata, weights, dtype, tokenizer.files())",
}
DROPOUT = "torch.manual_seed(seed + step * fabric.world_size + fabric.global_rank)  # for the dropout"


@pytest.fixture(scope="module", params=RESULTS)
def method(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def finished(method: str, checkpoint: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of an uninterrupted run."""
    out_dir = tmp_path_factory.mktemp(method)
    base = checkpoint.read_bytes()
    assert run_script(f"finetune_{method}", *finetune_arguments(method, checkpoint, data_dir, out_dir)) is None
    assert checkpoint.read_bytes() == base
    return out_dir


def test_the_losses_fall_and_the_learning_rate_warms_up_in_optimizer_steps_of_a_tenth_at_most(
    method: str, finished: Path
) -> None:
    rows = metric_rows(finished / "metrics.csv")
    steps = [row for row in rows if "train_loss" in row]
    full, warmup = SETTINGS[method][1], 3 if method == "adapter" else 1
    expected = [full * min(1, (step + 1) / warmup) for step in range(12)]
    assert [row["learning_rate"] for row in steps] == pytest.approx(expected, rel=1e-5)
    assert steps[-1]["records"] == 4 * 11
    validation = [row["validation_loss"] for row in rows if "validation_loss" in row]
    assert len(validation) == 5
    assert validation[-1] < validation[0] - 0.05


def test_the_result_describes_itself_and_is_neither_empty_nor_zero(method: str, finished: Path) -> None:
    content = torch.load(finished / RESULTS[method], weights_only=True)
    if method == "full":
        assert {path.name for path in finished.iterdir()} >= {"config.json", "tokenizer.json", "tokenizer_config.json"}
        weights = content
    else:
        weights = content["state_dict"]
        assert content["prompt_style"] == STYLES["plain"]
        assert content["hyperparameters"]["num_epochs"] == 4
    if method == "lora":
        assert content["lora"] == {"r": 4, "alpha": 32, "dropout": 0.2, "targets": ("query", "value")}
    if method == "adapter":
        assert content["adapter"] == {"prompt_length": 4, "start_layer": 0}
    assert len(weights) == {"lora": 4, "adapter": 4, "full": 17}[method]
    assert all(tensor.isfinite().all() and tensor.any() for tensor in weights.values())


def generate_arguments(method: str, folder: Path, checkpoint: Path) -> tuple[str, list[object]]:
    if method == "full":
        return "generate", ["--checkpoint_path", folder / RESULTS["full"]]
    return f"generate_{method}", [f"--{method}_path", folder / RESULTS[method], "--pretrained_path", checkpoint]


def test_the_result_is_used_without_any_setting_of_the_training(
    method: str, finished: Path, checkpoint: Path, capsys: pytest.CaptureFixture
) -> None:
    common = ["--prompt", "Count to 3", "--temperature", 0, "--max_new_tokens", 20]
    script, arguments = generate_arguments(method, finished, checkpoint)
    assert run_script(script, *arguments, *common) is None
    answer = capsys.readouterr()
    assert run_script("generate", "--checkpoint_path", checkpoint, *common) is None
    base = capsys.readouterr()
    assert answer.out.startswith("Count to 3")
    assert answer.out != base.out
    for printed in (answer, base):
        assert "Time for inference: " in printed.err
        assert "tokens/sec" in printed.err
        assert "Memory used: " in printed.err


@pytest.mark.slow
def test_a_sample_answer_is_what_generate_gives_and_changes_nothing(
    method: str,
    finished: Path,
    checkpoint: Path,
    data_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(Tokenizer, "stream", lambda _, tokens, **_after: (f"<{token}>" for token in tokens))
    arguments = finetune_arguments(method, checkpoint, data_dir, tmp_path)
    assert run_script(f"finetune_{method}", *arguments, "--sample_prompt", "Count to 3") is None
    assert_same_run(finished, tmp_path, method)
    samples = (tmp_path / "samples.txt").read_text()
    assert [int(step) for step in re.findall(r"^step (\d+): ", samples, re.MULTILINE)] == [0, 3, 6, 9, 12]
    assert samples.splitlines()[-1] in capsys.readouterr().err
    script, flags = generate_arguments(method, tmp_path, checkpoint)
    assert run_script(script, *flags, "--prompt", "Count to 3", "--temperature", 0, "--max_new_tokens", 50) is None
    answer = capsys.readouterr().out.removeprefix("Count to 3").strip()
    assert samples.partition("step 12: ")[2].strip() == answer
    assert "<" in answer


@pytest.mark.slow
def test_lora_answers_alike_merged_and_unmerged(
    checkpoint: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = [*finetune_arguments("lora", checkpoint, data_dir, tmp_path), "--max_steps", 3]
    assert run_script("finetune_lora", *arguments) is None
    script, arguments = generate_arguments("lora", tmp_path, checkpoint)
    capsys.readouterr()
    for merge in ("true", "false"):
        assert run_script(script, *arguments, "--prompt", "Count", "--temperature", 0, "--merge", merge) is None
    first, second = capsys.readouterr().out.split("Count")[1:]
    assert first == second


@pytest.mark.slow
def test_each_of_several_lora_files_answers(
    checkpoint: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    common = ["--pretrained_path", checkpoint, "--prompt", "Count to 4", "--temperature", 0, "--max_new_tokens", 20]
    files, alone = [], []
    for steps in (1, 6):
        arguments = finetune_arguments("lora", checkpoint, data_dir, tmp_path / str(steps))
        assert run_script("finetune_lora", *arguments, "--max_steps", steps) is None
        files.append(tmp_path / str(steps) / RESULTS["lora"])
        capsys.readouterr()
        assert run_script("generate_lora", "--lora_path", files[-1], *common) is None
        alone.append(capsys.readouterr().out)
    assert alone[0] != alone[1]
    assert run_script("generate_lora", "--lora_path", *files, files[0], *common) is None
    printed = capsys.readouterr()
    assert printed.out == alone[0] + alone[1] + alone[0]


def assert_same_run(one: Path, other: Path, method: str) -> None:
    for name in (RESULTS[method], "training-state.pth"):
        contents = [torch.load(folder / name, weights_only=True) for folder in (one, other)]
        first, second = (content.get("state_dict", content) for content in contents)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
    rows, others = (metric_rows(folder / "metrics.csv") for folder in (one, other))
    for key in ("step", "records", "tokens", "train_loss", "validation_loss"):
        assert [row.get(key) for row in rows] == [row.get(key) for row in others]


@pytest.mark.slow
def test_a_run_stopped_by_a_signal_and_resumed_ends_in_the_same_bits(
    method: str, finished: Path, checkpoint: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = finetune_arguments(method, checkpoint, data_dir, tmp_path)
    replaced = os.replace

    def interrupt_at_step_4(source: Path, target: Path) -> None:
        replaced(source, target)
        rows = metric_rows(tmp_path / "metrics.csv")
        if target.name == "training-state.pth" and rows[-1]["step"] == 4:
            os.kill(os.getpid(), signal.SIGTERM)  # arrives in step 5

    monkeypatch.setattr(os, "replace", interrupt_at_step_4)
    message = run_script(f"finetune_{method}", *arguments)
    monkeypatch.undo()
    assert message == "stopped after step 5 as requested; continue with --resume true"
    assert not (tmp_path / RESULTS[method]).exists()
    assert "--resume true" in run_script(f"finetune_{method}", *arguments)  # it is not written over
    assert run_script(f"finetune_{method}", *arguments, "--resume", "true") is None
    assert_same_run(finished, tmp_path, method)


@pytest.mark.slow
def test_a_run_killed_and_resumed_ends_in_the_same_bits(
    method: str, finished: Path, checkpoint: Path, data_dir: Path, tmp_path: Path
) -> None:
    arguments = finetune_arguments(method, checkpoint, data_dir, tmp_path)
    process = start(ROOT / f"finetune_{method}.py", tuple(arguments), tmp_path / "stdout", tmp_path / "stderr")
    while not any(row["step"] >= 5 for row in metric_rows(tmp_path / "metrics.csv")):
        assert process.is_alive()
        time.sleep(0.002)
    process.kill()
    process.join()
    assert not (tmp_path / RESULTS[method]).exists()
    assert run_script(f"finetune_{method}", *arguments, "--resume", "true") is None
    assert_same_run(finished, tmp_path, method)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--learning_rate", "1e9", "--save_interval", "100"], "the loss of step"),
        (["--learning_rate", "1e9"], "so it was not taken"),
        (["--resume", "true"], "training-state.pth does not exist"),
        (["--lora_targets", "query,foo"], "foo"),
        (["--data_dir", "nowhere"], "prepare_"),
        (["--pretrained_path", "nowhere/lit-llama.pth"], "nowhere/lit-llama.pth does not exist"),
        (["--block_size", "2"], "no records"),
        (["--block_size", "1000"], "--block_size 1000"),
        (["--precision", "bf16-true"], "bf16-mixed"),
        (["--strategy", "magic"], "fsdp"),
        (["--learning_rate", "-1"], "learning_rate"),
        (["--seed", "-1"], "seed"),
    ],
)
def test_mistakes_end_in_one_line(
    checkpoint: Path, data_dir: Path, tmp_path: Path, extra: list[str], message: str
) -> None:
    ended = run_script("finetune_lora", *finetune_arguments("lora", checkpoint, data_dir, tmp_path), *extra)
    assert message in ended
    assert ended.startswith("error: ")
    assert "\n" not in ended
    assert not (tmp_path / RESULTS["lora"]).exists()


@pytest.mark.slow
def test_the_best_weights_are_kept_and_patience_ends_a_run_also_when_it_is_resumed(
    method: str, checkpoint: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The validation losses are made up: the lowest is that after step 2."""
    script = f"finetune_{method}"

    def run(folder: str, losses: list[float], *more: object) -> None:
        remaining = iter(losses)
        monkeypatch.setattr(importlib.import_module(script), "validation_loss", lambda *_: next(remaining))
        arguments = finetune_arguments(method, checkpoint, data_dir, tmp_path / folder)
        arguments += ["--warmup_epochs" if method == "adapter" else "--warmup_steps", 0]  # it depends on --max_steps
        assert run_script(script, *arguments, "--eval_interval", 1, "--patience", 2, *more) is None
        assert next(remaining, None) is None

    run("two steps", [9, 3, 2], "--max_steps", 2)
    run("whole", [9, 3, 2, 2.5, 2])
    run("parts", [9, 3, 2, 2.5], "--max_steps", 3)
    (tmp_path / "parts" / RESULTS[method]).unlink()
    run("parts", [2], "--resume", "true")
    run("parts", [], "--resume", "true")  # nothing is left to do
    two, whole, parts = (tmp_path / folder for folder in ("two steps", "whole", "parts"))
    for one, other in (
        (two / RESULTS[method], whole / BEST[method]),
        (whole / BEST[method], parts / BEST[method]),
        (whole / RESULTS[method], parts / RESULTS[method]),
    ):
        states = [content.get("state_dict", content) for content in map(read_file, (one, other))]
        assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert [row["step"] for row in metric_rows(parts / "metrics.csv") if "train_loss" in row] == [1, 2, 3, 4]


def with_losses(script: str, losses: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Make up the validation losses of a script's next run."""
    remaining = iter(losses)
    monkeypatch.setattr(importlib.import_module(script), "validation_loss", lambda *_: next(remaining))


@pytest.mark.slow
def test_early_stopping_says_when_and_recommends_the_best_file(
    method: str, checkpoint: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    script, out_dir = f"finetune_{method}", tmp_path / "a folder"
    arguments = [*finetune_arguments(method, checkpoint, data_dir, out_dir), "--eval_interval", 1, "--patience", 2]
    with_losses(script, [9, 3, 3.5, 3], monkeypatch)
    assert run_script(script, *arguments) is None
    said = capsys.readouterr().err
    assert "Stopped after step 3 of 12: no new lowest validation loss (--patience 2)." in said
    best = out_dir / BEST[method]
    assert f"The best validation loss, 3.0000, was that of step 1: {best} has its weights.\nSaved {out_dir}" in said
    printed = shlex.split(said.splitlines()[-1])
    assert printed[:2] == ["python", f"{'generate' if method == 'full' else f'generate_{method}'}.py"]
    assert printed[3] == str(best)  # whatever blanks are in it
    assert run_script(printed[1].removesuffix(".py"), *printed[2:], "--max_new_tokens", 1) is None
    if method != "full":  # of which a folder is a model, and the best one another
        printed[3] = str(out_dir)
        assert run_script(printed[1].removesuffix(".py"), *printed[2:], "--max_new_tokens", 1) is None
        assert f"using {best.name}, which had the lowest validation loss" in capsys.readouterr().err


@pytest.mark.slow
def test_a_longer_run_says_that_the_learning_rate_goes_back_up(
    checkpoint: Path, data_dir: Path, tmp_path: Path, capsys: Any
) -> None:
    arguments = [*finetune_arguments("lora", checkpoint, data_dir, tmp_path), "--lr_schedule", "linear"]
    assert run_script("finetune_lora", *arguments, "--max_steps", 4, "--warmup_steps", 0) is None
    assert "goes back up" not in capsys.readouterr().err
    assert run_script("finetune_lora", *arguments, "--max_steps", 9, "--warmup_steps", 0, "--resume", "true") is None
    assert "warning: the learning rate goes back up from " in capsys.readouterr().err


@pytest.mark.slow
def test_patience_needs_validation_records(method: str, checkpoint: Path, tmp_path: Path) -> None:
    prepare_records(tmp_path / "data", {"train": RECORDS, "validation": []}, checkpoint.with_name("tokenizer.json"))
    arguments = finetune_arguments(method, checkpoint, tmp_path / "data", tmp_path / "out")
    message = run_script(f"finetune_{method}", *arguments, "--patience", 2)
    assert "--patience needs validation records, and there are none" in str(message)


@pytest.mark.slow
def test_the_untrained_model_is_a_candidate_for_the_best(
    method: str, checkpoint: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    script = f"finetune_{method}"
    arguments = [*finetune_arguments(method, checkpoint, data_dir, tmp_path), "--eval_interval", 1]
    with_losses(script, [3, 3.25, 4, 3.5], monkeypatch)
    assert run_script(script, *arguments, "--max_steps", 3) is None
    said = capsys.readouterr().err
    assert "warning: no validation loss was below 3.0000, that of the base model before training" in said
    assert not (tmp_path / BEST[method]).exists()
    assert str(tmp_path / RESULTS[method]) in said.splitlines()[-1]
    with_losses(script, [3.75, 2.5], monkeypatch)
    assert run_script(script, *arguments, "--max_steps", 5, "--resume", "true") is None
    assert (tmp_path / BEST[method]).exists()
    said = capsys.readouterr().err
    assert "warning: no validation loss" not in said
    assert str(tmp_path / RESULTS[method]) in said.splitlines()[-1]  # the last is the best


@pytest.mark.slow
def test_a_run_that_is_over_has_nothing_left_to_do(
    method: str, checkpoint: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    script = f"finetune_{method}"
    arguments = [*finetune_arguments(method, checkpoint, data_dir, tmp_path), "--eval_interval", 1, "--patience", 1]
    with_losses(script, [9, 3], monkeypatch)
    assert run_script(script, *arguments, "--max_steps", 1) is None
    capsys.readouterr()
    result = tmp_path / RESULTS[method]
    lock_of(result).touch()  # of a run that was killed when it had just written its result
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    for resume in ("true", "auto"):
        assert run_script(script, *arguments, "--max_steps", 1, "--resume", resume) is None
        said = capsys.readouterr().err
        assert f"nothing left to do: the run is complete after step 1, and {result} is written" in said
        assert said.endswith("to train on, raise --max_steps\n")
        assert "records to train on" not in said
        assert "Saved" not in said
    del before[lock_of(result)]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    with_losses(script, [4], monkeypatch)
    assert run_script(script, *arguments, "--resume", "true") is None
    capsys.readouterr()
    for limits, flags in (
        ([], "--patience"),
        (["--max_steps", 2], "--max_steps and --patience"),
        (["--max_steps", 2, "--patience", 9], "--max_steps"),
    ):
        assert run_script(script, *arguments, *limits, "--resume", "true") is None
        assert "the run is complete after step 2" in (said := capsys.readouterr().err)
        assert said.endswith(f"to train on, raise {flags}\n")
    result.unlink()  # of a run that was killed after its last state
    assert run_script(script, *arguments, "--resume", "true") is None
    assert result.exists()


@pytest.mark.slow
def test_what_a_user_keeps_beside_a_run_stays(method: str, checkpoint: Path, data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "training-state-7").mkdir()
    (tmp_path / "training-state-7" / "mine.txt").write_text("x")
    (tmp_path / "training-state-9").write_text("a file")
    arguments = finetune_arguments(method, checkpoint, data_dir, tmp_path)
    assert run_script(f"finetune_{method}", *arguments, "--max_steps", 2) is None
    assert run_script(f"finetune_{method}", *arguments, "--max_steps", 3, "--resume", "true") is None
    assert (tmp_path / "training-state-7" / "mine.txt").read_text() == "x"
    assert (tmp_path / "training-state-9").read_text() == "a file"


def test_a_dry_run_shows_the_plan_and_records_and_writes_nothing(
    method: str, checkpoint: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = [*finetune_arguments(method, checkpoint, data_dir, tmp_path / "out"), "--dry_run", "true"]
    assert run_script(f"finetune_{method}", *arguments) is None
    printed = capsys.readouterr()
    assert printed.out.startswith("Count to 1[[1<|im_end|>]]\n\nCount to 2[[1 2<|im_end|>]]")
    for line in (
        "no GPU, in 32-true",
        "11 records to train on",
        "12 steps of at most 4 records, 4 epochs",
        "learning rate, at most",
        "trained param",
    ):
        assert line in printed.err
    assert re.search(r"on \d+ cores of .*, in 32-true, [\d.]+ GB of memory free", printed.err)
    assert "scripts/estimate_memory.py" in printed.err
    assert not (tmp_path / "out").exists()


def test_the_article_s_rate_is_reached_with_few_records(
    checkpoint: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    paths = ["--data_dir", data_dir, "--pretrained_path", checkpoint, "--out_dir", tmp_path, "--block_size", 128]
    assert run_script("finetune_lora", *paths, "--batch_size", 4, "--dry_run", "true") is None
    assert "constant learning rate, at most 0.0003 (warm-up: 1 steps)" in capsys.readouterr().err


def test_a_run_that_diverges_ends_in_one_line_and_writes_no_result(
    checkpoint: Path, data_dir: Path, tmp_path: Path
) -> None:
    arguments = finetune_arguments("lora", checkpoint, data_dir, tmp_path)
    ended = run_script("finetune_lora", *arguments, "--learning_rate", "1e9")
    # Whether weights or the loss overflow first depends on the order in which a processor sums.
    assert re.fullmatch("error: (the loss of step|.*training-state.pth was not written: transformer.h.0).*", ended)
    assert not (tmp_path / RESULTS["lora"]).exists()


def test_a_resumed_run_must_be_of_the_same_shape(method: str, finished: Path, checkpoint: Path, data_dir: Path) -> None:
    other = {"lora": ("lora_r", 2), "adapter": ("prompt_length", 3), "full": ("moments_dtype", "float32")}[method]
    arguments = [*finetune_arguments(method, checkpoint, data_dir, finished), f"--{other[0]}", other[1]]
    message = str(run_script(f"finetune_{method}", *arguments, "--resume", "true"))
    assert re.search(rf"cannot resume: .* has {other[0]} \w+, not {other[1]}$", message)


TOY = {
    "lora": ["--learning_rate", 0.02, "--lr_schedule", "linear", "--lora_targets", "query,value,mlp,head"],
    "adapter": ["--learning_rate", 0.3, "--warmup_epochs", 1, "--start_layer", 0, "--prompt_length", 20],
    "full": ["--learning_rate", 0.01, "--warmup_steps", 1],
}


@pytest.mark.slow
def test_a_toy_task_is_learned_and_generation_stops_by_itself(
    method: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The end of sequence is trained on and passed on, so that a learned answer ends."""
    (tmp_path / "train.json").write_text('[{"instruction": "Say hello", "output": "hello there"}]')
    files = ["--train_file", tmp_path / "train.json", "--validation_file", tmp_path / "train.json"]
    data = ["--pretrained_path", checkpoint, "--data_dir", tmp_path / "data"]
    assert run_script("prepare_json", *files, *data) is None
    settings = [
        *TOY[method],
        "--num_epochs",
        200,
        "--block_size",
        128,
        "--save_interval",
        1000,
        "--eval_interval",
        1000,
    ]
    assert run_script(f"finetune_{method}", *data, "--out_dir", tmp_path / "out", *settings) is None
    script, arguments = generate_arguments(method, tmp_path / "out", checkpoint)
    if method == "full":
        arguments += ["--prompt_style", "alpaca"]
    capsys.readouterr()
    answer = ["--prompt", "Say hello", "--temperature", 0, "--max_new_tokens", 20]
    assert run_script(script, *arguments, *answer) is None
    assert capsys.readouterr().out == "hello there\n"


def test_a_model_is_not_written_over(checkpoint: Path, data_dir: Path, tmp_path: Path) -> None:
    """Neither the base itself nor any other model, and not the config of another format's."""
    arguments = finetune_arguments("full", checkpoint, data_dir, checkpoint.parent)
    before = {path.name: path.read_bytes() for path in checkpoint.parent.iterdir()}
    ended = run_script("finetune_full", *arguments)
    assert "is read by this command" in ended
    assert "\n" not in ended
    assert {path.name: path.read_bytes() for path in checkpoint.parent.iterdir()} == before
    for name in ("lit-llama.pth", "config.json"):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / name).write_text("mine")
        ended = run_script("finetune_full", *finetune_arguments("full", checkpoint, data_dir, folder))
        assert f"holds {name} already: give another --out_dir" in ended
        assert [(path.name, path.read_text()) for path in folder.iterdir()] == [(name, "mine")]


def test_the_loops_are_the_same_text() -> None:
    """They are repeated so that each script is read alone. What is true in one alone stands in that one alone."""
    loops = {}
    for method in RESULTS:
        source = (ROOT / f"finetune_{method}.py").read_text()
        main = next(node for node in ast.parse(source).body if getattr(node, "name", "") == "main")
        assert main.end_lineno - main.lineno < 120
        loop = next(node for node in main.body if isinstance(node, ast.For))
        text = ast.get_source_segment(source, loop).replace(SAVE_BEST["full"], SAVE_BEST["lora"])
        loops[method] = [line.strip() for line in text.splitlines()]
    assert loops["lora"] == [*loops["adapter"][:4], DROPOUT, *loops["adapter"][4:]]
    head, rest = "for i, batch in enumerate(batches, 1):", "step_loss += loss.detach()"
    for method in ("adapter", "full"):
        lines = loops[method]
        start = next(i for i, line in enumerate(lines) if line.startswith(("for i, batch", "for batch")))
        loops[method] = [*lines[:start], head, *lines[lines.index(rest) :]]
    assert loops["adapter"] == loops["full"]


@pytest.fixture
def float16_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """16-mixed as on a GPU: on a CPU, Fabric would take bfloat16 instead, which needs no scaled loss."""

    def fabric(**settings: Any) -> Fabric:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)  # too large for some steps
        return Fabric(plugins=MixedPrecision(settings.pop("precision"), "cpu", scaler), **settings)

    monkeypatch.setattr(training, "Fabric", fabric)


@pytest.mark.slow
@pytest.mark.usefixtures("float16_on_cpu")
def test_in_float16_steps_whose_gradient_overflows_are_skipped_and_the_scale_is_resumed(
    checkpoint: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def run(name: str, *more: object) -> None:
        arguments = finetune_arguments("lora", checkpoint, data_dir, tmp_path / name)
        assert run_script("finetune_lora", *arguments, "--precision", "16-mixed", "--save_interval", 6, *more) is None

    run("whole")
    assert re.search(r"step \d+ is skipped: its gradient is too large for float16", capsys.readouterr().err)
    run("stopped", "--max_steps", 6)
    run("stopped", "--resume", "true")
    whole, stopped = (read_file(tmp_path / name / "training-state.pth") for name in ("whole", "stopped"))
    assert whole["precision"] == stopped["precision"]
    assert 1 < whole["precision"]["scale"] < 2.0**16
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(tensor, stopped["state_dict"][name])
