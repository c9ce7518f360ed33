"""Rules of the house that no linter knows: who imports whom, how long files are, how many parameters functions have."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from lit_llama.data.batches import BatchSchedule, Step
from lit_llama.training.state import TrainingState

import pytest
from builders import ROOT, run_script
from test_finetune import finetune_arguments

PRODUCT = [path for folder in ("*.py", "lit_llama/**/*.py", "scripts/**/*.py") for path in sorted(ROOT.glob(folder))]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.slow
def test_a_tokenizer_is_imported_without_the_model_and_lora_without_command_line_and_lightning() -> None:
    program = "import sys, lit_llama.tokenizer; print(*sys.modules); import lit_llama.lora; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    tokenizer, lora = map(str.split, done.stdout.splitlines())
    assert not {*tokenizer} & {"lit_llama.model", "lit_llama.lora", "lit_llama.adapter"}
    loaded = {module.partition(".")[0] for module in lora}
    assert "torch" in loaded
    assert not loaded & {"jsonargparse", "lightning", "transformers"}


def imports(path: Path) -> Iterator[str]:
    """The modules of lit_llama that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "lit_llama":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            package, _, inner = str(node.module).partition(".")
            if package == "lit_llama" and (ROOT / "lit_llama" / inner).is_dir():
                yield from (f"{inner}.{alias.name}" for alias in node.names)
            elif package == "lit_llama":
                yield inner
        elif isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("lit_llama.") for alias in node.names if "lit_llama" in alias.name)


def module(path: Path) -> str:
    return str(path.relative_to(ROOT / "lit_llama").with_suffix("")).replace("/", ".")


MODULES = {module(path): {*imports(path)} for path in ROOT.glob("lit_llama/**/*.py") if path.name != "__init__.py"}


def needs(name: str, above: tuple[str, ...] = ()) -> set[str]:
    """All modules that a module loads, itself among them; no two may need each other."""
    assert name not in above, f"a circle: {' -> '.join((*above, name))}"
    return {name}.union(*(needs(other, (*above, name)) for other in MODULES[name]))


@pytest.mark.parametrize(
    ("room", "never"),
    [
        ("storage.", "model|tokenizer|prompt|data|training|formats|cli"),  # knows files, not what is in them
        ("formats.", "training|data|cli"),
        ("data.", "training|formats|lora|adapter|finetuned|cli"),
        ("training.", "formats|cli"),
        ("cli", "model|tokenizer|prompt|data|training|formats|finetuned"),
        ("tokenizer", "model|lora|adapter"),
        ("model", "lora|adapter|storage"),
        ("", "cli"),  # scripts use it, nothing else
    ],
)
def test_no_room_opens_to_one_that_it_must_not_know(room: str, never: str) -> None:
    for name in MODULES:
        if name.startswith(room) and (room.endswith(".") or name == room or not room):
            wrong = [other for other in needs(name) - {name} if re.match(rf"({never})(\.|$)", other)]
            assert not wrong, f"{name} must not need {', '.join(wrong)}"


@pytest.mark.parametrize("method", ["lora", "adapter"])
def test_a_method_needs_only_the_model(method: str) -> None:
    assert {*imports(ROOT / "lit_llama" / f"{method}.py")} == {"model", "errors"}


def test_the_model_knows_of_no_method() -> None:
    assert {*imports(ROOT / "lit_llama" / "model.py")} <= {"errors", "kernels"}


@pytest.mark.parametrize("path", sorted(ROOT.glob("lit_llama/**/*.py")), ids=name)
def test_functions_have_at_most_6_parameters(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            names = [argument.arg for argument in given if argument.arg not in ("self", "cls")]
            assert len(names) <= 6, f"{name(path)}:{node.lineno}: {node.name} has {len(names)} parameters"


@pytest.mark.slow
def test_the_readme_says_how_many_files_a_step_with_its_save_runs_through(
    checkpoint: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted from the drawing of the second step's records to the end of its save, the script itself among them."""
    ran: set[str] = set()
    drawn, saved = BatchSchedule.step, TrainingState.save

    def note(frame: FrameType, _event: str, _argument: object) -> None:
        ran.add(frame.f_code.co_filename)

    def step(schedule: BatchSchedule, number: int) -> Step:
        if number == 1:
            sys.setprofile(note)
        return drawn(schedule, number)

    def save(*arguments: Any) -> None:
        saved(*arguments)
        sys.setprofile(None)

    monkeypatch.setattr(BatchSchedule, "step", step)
    monkeypatch.setattr(TrainingState, "save", save)
    arguments = [*finetune_arguments("lora", checkpoint, data_dir, tmp_path), "--save_interval", 2]
    assert run_script("finetune_lora", *arguments, "--max_steps", 4) is None
    files = {name for name in ran if Path(name).is_relative_to(ROOT) and Path(name) in PRODUCT}
    print(sorted(files))
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"run through functions in {len(files)} files" in readme
