"""No file that is read can run code or reach outside of its folder."""

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from builders import ROOT, run_script

PRODUCT = [path for folder in ("*.py", "lit_llama/**/*.py", "scripts/**/*.py") for path in sorted(ROOT.glob(folder))]
FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads",
    "os.system", "os.popen", "yaml.load", "joblib.load", "shelve.open", "np.fromfile", "tempfile.mktemp",
}  # fmt: skip
IMPORTS = {  # --logger names a class; a library that is not in the test extra
    "lit_llama/__init__.py", "lit_llama/training/log.py", "scripts/dev/check_exports.py",
}  # fmt: skip


def calls(path: Path) -> Iterator[tuple[str, dict[str, ast.expr]]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {str(keyword.arg): keyword.value for keyword in node.keywords}


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: path.name)
def test_nothing_that_is_read_is_run(path: Path) -> None:
    for name, keywords in calls(path):
        given = {key: ast.unparse(value) for key, value in keywords.items()}
        assert name not in FORBIDDEN, f"{path.name} calls {name}"
        assert given.get("shell", "False") == "False", f"{path.name}: {name} starts a shell"
        if name == "torch.load":
            assert given["weights_only"] == "True"
        if name == "np.load":
            assert given["allow_pickle"] == "False"
        if name in ("import_module", "importlib.import_module"):
            assert str(path.relative_to(ROOT)) in IMPORTS
        assert name.rpartition(".")[2] != "extractall", f"{path.name} unpacks names that it does not know"


def test_an_index_names_files_of_its_own_folder_only(checkpoint: Path, tmp_path: Path) -> None:
    flags = ["--checkpoint_path", checkpoint, "--out_dir", tmp_path / "hf", "--max_shard_gb", 1e-5]
    assert run_script("export_hf", *flags) is None
    index = tmp_path / "hf" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    for name in ("../secret.safetensors", "/etc/passwd"):
        content["weight_map"]["lm_head.weight"] = name
        index.write_text(json.dumps(content))
        ended = run_script("convert_hf_checkpoint", "--checkpoint_dir", tmp_path / "hf", "--out_dir", tmp_path / "out")
        assert "names a file that is not in its folder" in str(ended)
