import json
import os
import shutil
import subprocess
import zipfile
from pathlib import Path

from lit_llama.errors import UserError
from lit_llama.finetuned import describe, save_finetuned
from lit_llama.lora import LoRAConfig, add_lora, lora_state_dict
from lit_llama.model_folder import check_base, identity, load_model, own_template, save_model_folder
from lit_llama.prompt import STYLES
from lit_llama.storage.files import read_file, write_tensors
from lit_llama.storage.integrity import MAX_PICKLE, check_archive, fingerprint
from lit_llama.tokenizer import Tokenizer

import pytest
import torch
from builders import ROOT, TINY, content_digest, random_model, run_script

STATE = {"a": torch.arange(6.0), "b": torch.ones(3, dtype=torch.bfloat16), "c": torch.tensor(2.0)}


@pytest.mark.slow
def test_no_flipped_bit_changes_what_is_read(tmp_path: Path) -> None:
    """Some bits mean nothing, such as those of padding: then the content is right."""
    path = tmp_path / "x.pth"
    write_tensors(path, STATE)
    whole, right, refused = path.read_bytes(), content_digest(STATE), 0
    for place in range(0, len(whole), 5):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        try:
            read = content_digest(read_file(path))
        except UserError as error:
            read, refused = str(error), refused + 1
        assert read == right or str(path) in read
    assert refused > len(whole) / 5 / 3


PYTHONS = ("3.10", "3.11", "3.12", "3.13")
CHECK_OFTEN = """
import sys
from pathlib import Path
from lit_llama.errors import UserError
from lit_llama.storage.integrity import check_archive
for folder in ("*.py", "lit_llama/**/*.py", "scripts/**/*.py"):
    for path in Path().glob(folder):
        compile(path.read_text(encoding="utf-8"), str(path), "exec")  # its syntax
refused = 0
for _ in range(int(sys.argv[2])):
    try:
        check_archive(Path(sys.argv[1]))
    except UserError:
        refused += 1
print(*sys.version_info[:2], refused)
"""


@pytest.mark.slow
@pytest.mark.parametrize("version", PYTHONS)
def test_a_good_file_is_read_on_every_python(version: str, tmp_path: Path) -> None:
    """Many threads read it at once: where they shared a position in the file, Python 3.12 refused 2 of 3 good files."""
    path = tmp_path / "x.pth"
    torch.save({f"tensor {i}": torch.randn(2000) for i in range(60)}, path)
    python = {**os.environ, "PYENV_VERSION": version}  # where pyenv has several
    command = [f"python{version}", "-c", CHECK_OFTEN, path, "200"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=python, cwd=ROOT)
    except FileNotFoundError:
        pytest.skip(f"python{version} is not on this machine")
    if "not found" in done.stderr:
        pytest.skip(f"python{version} is not on this machine")
    assert done.stdout.split() == [*version.split("."), "0"], done.stderr


def test_a_bomb_is_not_opened(tmp_path: Path) -> None:
    path, bomb = tmp_path / "x.pth", tmp_path / "bomb.pth"
    write_tensors(path, STATE)
    for name, compression in (("x/data/0", zipfile.ZIP_DEFLATED), ("x/data.pkl", zipfile.ZIP_STORED)):
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(bomb, "w", compression) as new:
            for member in old.namelist():
                new.writestr(member, old.read(member))
            new.writestr(f"{name}-more", bytes(MAX_PICKLE + 1))
        with pytest.raises(UserError, match="far more memory than its size"):
            check_archive(bomb)


def test_a_fingerprint_is_of_names_and_numbers(tmp_path: Path) -> None:
    exchanged = dict(zip(STATE, reversed(STATE.values()), strict=True))
    prints = []
    for i, state in enumerate((STATE, dict(STATE), exchanged, {**STATE, "c": torch.tensor(3.0)})):
        write_tensors(tmp_path / f"{i}.pth", state)
        prints.append(fingerprint(tmp_path / f"{i}.pth"))
    assert prints[0] == prints[1]
    assert len({*prints}) == 3


def test_fields_of_config_json_may_be_edited(model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path, dirs_exist_ok=True)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, "norm_eps": 1e-3, "prompt_style": "chatml"}))
    assert load_model(tmp_path / "lit-llama.pth").config.norm_eps == 1e-3
    assert own_template(tmp_path / "lit-llama.pth") == STYLES["chatml"]


def test_an_exchanged_file_of_a_model_folder_is_named(model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    save_model_folder(tmp_path / "other", random_model(TINY, seed=1).state_dict(), TINY, {})
    shutil.copy(tmp_path / "other" / "lit-llama.pth", folder)
    with pytest.raises(UserError, match=r"lit-llama\.pth is not the file that .*config\.json was written with"):
        load_model(folder / "lit-llama.pth")
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    with pytest.raises(UserError, match=r"tokenizer_config\.json is not the file"):
        Tokenizer(folder / "tokenizer.json")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in fields.items() if k != "files"}))
    load_model(folder / "lit-llama.pth")
    assert Tokenizer(folder / "tokenizer.json").eos_id == 0


@pytest.fixture
def lora_of_another(tmp_path: Path) -> Path:
    """A LoRA file that was trained on another model of the same shape."""
    save_model_folder(tmp_path / "other", random_model(TINY, seed=1).state_dict(), TINY, {})
    model = random_model(TINY)
    add_lora(model, LoRAConfig())
    state = {name: torch.ones_like(tensor) for name, tensor in lora_state_dict(model).items()}
    about = describe(LoRAConfig(), TINY, "plain", identity(tmp_path / "other" / "lit-llama.pth"))
    save_finetuned(tmp_path / "lora.pth", about, state)
    return tmp_path / "lora.pth"


def test_a_lora_file_of_another_base_is_refused_naming_both(
    lora_of_another: Path, checkpoint: Path, tmp_path: Path
) -> None:
    common = ["--lora_path", lora_of_another]
    for script, flags in (
        ("generate_lora", ["--pretrained_path", checkpoint, "--max_new_tokens", 3]),
        ("merge_lora", ["--pretrained_path", checkpoint, "--out_dir", tmp_path / "merged", "--prompt", "a"]),
        ("export_peft", ["--pretrained_path", checkpoint, "--out_dir", tmp_path / "peft", "--base_model", "x"]),
    ):
        ended = str(run_script(script, *common, *flags))
        assert f"was trained on {tmp_path / 'other' / 'lit-llama.pth'}" in ended
        assert str(checkpoint) in ended
        assert "--force true" in ended
        assert run_script(script, *common, *flags, "--force", "true") is None


def test_a_copy_of_the_base_in_another_dtype_is_told_from_another_model(tmp_path: Path) -> None:
    state = random_model(TINY).state_dict()
    copy = {name: tensor.bfloat16() for name, tensor in state.items()}
    gate, up = "transformer.h.0.mlp.c_fc1.weight", "transformer.h.0.mlp.c_fc2.weight"
    exchanged = {**state, gate: state[up], up: state[gate]}
    paths = [tmp_path / name / "lit-llama.pth" for name in ("base", "copy", "exchanged")]
    for path, tensors in zip(paths, (state, copy, exchanged), strict=True):
        save_model_folder(path.parent, tensors, TINY, {})
    base, *others = map(identity, paths)
    for other, what in zip(others, ("the same model in another dtype", "another model"), strict=True):
        with pytest.raises(UserError, match=f"which is {what}"):
            check_base(tmp_path / "lora.pth", base, other, "use its own")


def test_what_was_not_trained_is_not_saved(tmp_path: Path) -> None:
    model = random_model(TINY)
    add_lora(model, LoRAConfig())
    with pytest.raises(UserError, match="nothing was learned"):
        save_finetuned(tmp_path / "x.pth", describe(LoRAConfig(), TINY, "plain", {}), lora_state_dict(model))
    assert [*tmp_path.iterdir()] == []


def test_the_check_of_tensors_can_be_left_out_and_that_is_said(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(checkpoint.parent, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "lit-llama.pth"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    arguments = ["--checkpoint_path", path, "--max_new_tokens", 1]
    assert "is damaged: its data/" in str(run_script("generate", *arguments))
    assert run_script("generate", *arguments, "--check_files", "false") is None
    assert f"{path} was read without comparing" in capsys.readouterr().err
    assert "is damaged" in str(run_script("generate", *arguments))
