"""Rules of the house that no linter knows: who imports whom, how long files are, how many parameters functions have."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from builders import ROOT

PRODUCT = [path for folder in ("*.py", "lit_llama/**/*.py", "scripts/**/*.py") for path in sorted(ROOT.glob(folder))]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_lora_is_imported_without_the_command_line_and_without_lightning() -> None:
    program = "import lit_llama.lora, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = {module.partition(".")[0] for module in done.stdout.split()}
    assert "torch" in loaded
    assert not loaded & {"jsonargparse", "lightning", "transformers"}


def test_a_tokenizer_is_imported_without_the_model() -> None:
    program = "import lit_llama.tokenizer, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not {*done.stdout.split()} & {"lit_llama.model", "lit_llama.lora", "lit_llama.adapter"}


def imports(path: Path) -> Iterator[str]:
    """The modules of lit_llama that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "lit_llama":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            if str(node.module).startswith("lit_llama."):
                yield str(node.module).removeprefix("lit_llama.")
        elif isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("lit_llama.") for alias in node.names if "lit_llama" in alias.name)


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
