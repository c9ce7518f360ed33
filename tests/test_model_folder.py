import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

from lit_llama.adapter import AdapterConfig
from lit_llama.errors import UserError
from lit_llama.finetuned import FILE_NAMES, describe, read_finetuned
from lit_llama.lora import LoRAConfig
from lit_llama.model import CONFIGS, LLaMA
from lit_llama.model_folder import (
    DEFAULT_MODEL,
    QUICKSTART_MODEL,
    find_model,
    load_model,
    read_config,
    save_model_folder,
)
from lit_llama.storage import files
from lit_llama.storage.files import read_file, write_file, write_tensors

import pytest
import torch
from builders import TINY, peak_of, random_model


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_a_model_folder_gives_the_model_back(tmp_path: Path, tied: bool) -> None:
    model = random_model(replace(TINY, tie_embeddings=tied))
    save_model_folder(tmp_path, model.state_dict(), model.config, {})
    loaded = load_model(tmp_path / "lit-llama.pth").eval()
    assert loaded.config == model.config
    assert (loaded.lm_head.weight is loaded.transformer.wte.weight) == tied
    idx = torch.randint(TINY.vocab_size, (1, 9))
    assert torch.equal(loaded(idx), model(idx))


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    model = random_model(replace(TINY, tie_embeddings=True))
    save_model_folder(tmp_path, model.state_dict(), model.config, {})
    n_bytes = 4 * sum(p.numel() for p in model.parameters())
    assert (tmp_path / "lit-llama.pth").stat().st_size < n_bytes + 20_000


def test_loading_converts_the_dtype(checkpoint: Path) -> None:
    assert {p.dtype for p in load_model(checkpoint, torch.bfloat16).parameters()} == {torch.bfloat16}


def test_known_sizes_are_recognised_without_a_config() -> None:
    for name in ("7B", "13B", "30B", "65B", "TinyLlama-1.1B", "Llama-3.1-8B", "SmolLM2-135M"):
        with torch.device("meta"):
            state = LLaMA(CONFIGS[name]).state_dict()
        assert read_config(Path("nowhere/lit-llama.pth"), state) == CONFIGS[name]


def test_an_unknown_size_without_a_config_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copy(checkpoint, tmp_path)
    with pytest.raises(UserError, match=r"config\.json"):
        load_model(tmp_path / "lit-llama.pth")


def test_a_folder_stands_for_the_file_in_it(checkpoint: Path, tmp_path: Path) -> None:
    assert find_model(checkpoint.parent) == find_model(checkpoint) == checkpoint
    assert load_model(checkpoint.parent).config == load_model(checkpoint).config
    with pytest.raises(UserError, match=r"has no lit-llama\.pth"):
        load_model(tmp_path)
    write_tensors(tmp_path / FILE_NAMES["lora"], {**describe(LoRAConfig(), TINY, "plain", {}), "state_dict": {}})
    assert read_finetuned(tmp_path, "lora").path == tmp_path / FILE_NAMES["lora"]
    with pytest.raises(UserError, match=r"has no lit-llama-adapter-finetuned\.pth"):
        read_finetuned(tmp_path, "adapter")


def test_only_the_default_model_gives_way_to_the_one_written_last(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_model(None) == DEFAULT_MODEL
    other = DEFAULT_MODEL.parents[1] / "other" / "lit-llama.pth"
    shutil.copytree(checkpoint.parent, other.parent)
    assert find_model(None) == find_model(None, QUICKSTART_MODEL) == other
    assert f"{DEFAULT_MODEL} does not exist; the model is {other}" in capsys.readouterr().err
    assert find_model(DEFAULT_MODEL) == DEFAULT_MODEL
    shutil.copytree(other.parent, DEFAULT_MODEL.parent)
    assert find_model(None) == DEFAULT_MODEL


class Code:
    def __reduce__(self) -> tuple:
        return os.system, ("true",)


def damaged(kind: str, checkpoint: Path, path: Path) -> None:
    """Write to `path` what a user might give in place of a checkpoint."""
    whole = checkpoint.read_bytes()
    state = torch.load(checkpoint, weights_only=True)
    match kind:
        case "missing":
            pass
        case "truncated":
            path.write_bytes(whole[: len(whole) // 2])
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text("<html>Not found</html>")
        case "code in a zip":
            torch.save({"weights": Code()}, path)
        case "bare pickle":
            path.write_bytes(pickle.dumps(Code()))
        case "a list":
            torch.save([torch.zeros(3)], path)
        case "a key missing":
            torch.save({k: v for k, v in state.items() if k != "transformer.h.1.rms_2.scale"}, path)
        case "a key too many":
            torch.save({**state, "transformer.h.2.rms_2.scale": torch.zeros(32)}, path)
        case "a wrong shape":
            torch.save({**state, "lm_head.weight": torch.zeros(7, 32)}, path)
        case "no tensor":
            torch.save({**state, "lm_head.weight": "nothing"}, path)
        case "lora weights":
            torch.save({"kind": "lora", "state_dict": {}}, path)


@pytest.mark.parametrize(
    "kind",
    [
        "missing",
        "truncated",
        "empty",
        "text",
        "code in a zip",
        "bare pickle",
        "a list",
        "a key missing",
        "a key too many",
        "a wrong shape",
        "no tensor",
        "lora weights",
    ],
)
def test_a_damaged_checkpoint_ends_in_one_line_that_names_it(kind: str, checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "lit-llama.pth"
    shutil.copy(checkpoint.with_name("config.json"), tmp_path)
    damaged(kind, checkpoint, path)
    with pytest.raises(UserError) as error:
        load_model(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_and_unexpected_names_are_told(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copy(checkpoint.with_name("config.json"), tmp_path)
    for kind, message in {
        "a key missing": r"lacks 'transformer\.h\.1\.rms_2\.scale",
        "a key too many": r"transformer\.h\.2\.rms_2\.scale",
        "a wrong shape": r"different shape for 'lm_head\.weight",
        "lora weights": "--lora_path",
    }.items():
        damaged(kind, checkpoint, tmp_path / "lit-llama.pth")
        with pytest.raises(UserError, match=message):
            load_model(tmp_path / "lit-llama.pth")


def test_a_broken_config_is_named(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copy(checkpoint, tmp_path)
    for text in ("{", '{"n_layers": 3}', '{"n_embd": 30, "n_head": 4}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"config\.json"):
            load_model(tmp_path / "lit-llama.pth")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.pth"
    write_tensors(path, {"x": torch.ones(3)})

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full_disk)
    with pytest.raises(UserError, match="No space left"):
        write_tensors(path, {"x": torch.zeros(3)})
    assert torch.equal(read_file(path)["x"], torch.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]


def test_nothing_is_written_through_a_link_or_into_what_is_no_file(tmp_path: Path) -> None:
    path, part, precious = tmp_path / "x", tmp_path / "x.part", tmp_path / "precious"
    precious.write_text("mine")
    for make in (lambda: part.hardlink_to(precious), lambda: part.symlink_to(precious)):
        make()
        write_file(path, "new")
        assert (path.read_text(), precious.read_text(), part.exists()) == ("new", "mine", False)
    for make in (part.mkdir, lambda: (part.rmdir(), os.mkfifo(part))):
        make()
        with pytest.raises(UserError, match=r"x\.part"):
            write_file(path, "newer")
        assert part.exists()
    assert path.read_text() == "new"
    assert {entry.name for entry in tmp_path.iterdir()} == {"x", "x.part", "precious"}


def test_finetuned_files_are_checked_for_kind_and_base(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    write_tensors(path, {**describe(AdapterConfig(), TINY, "plain", {}), "state_dict": {}})
    with pytest.raises(UserError, match="adapter"):
        read_finetuned(path, "lora")
    file = read_finetuned(path, "adapter")
    assert file.config == AdapterConfig()
    with pytest.raises(UserError, match="n_layer 2, not 3"):
        file.tensors_for(replace(TINY, n_layer=3))


@pytest.mark.slow
def test_loading_takes_at_most_1_2_times_the_file_in_ram(checkpoint: Path, tmp_path: Path) -> None:
    config = replace(TINY, n_embd=512, n_hidden=2048, n_layer=12, vocab_size=8000)
    save_model_folder(tmp_path, LLaMA(config).state_dict(), config, {})
    size = (tmp_path / "lit-llama.pth").stat().st_size
    assert size > 150e6
    use = "model = load_model(Path({!r}))\ntotal = sum(p.sum() for p in model.parameters())"  # touches every page
    before = f"from lit_llama.model_folder import load_model\n{use.format(str(checkpoint))}"
    peak = peak_of(before, use.format(str(tmp_path / "lit-llama.pth")))
    assert 0.9 * size < peak < 1.2 * size


@pytest.mark.parametrize(
    ("name", "script"),
    [
        ("model.safetensors", "convert_hf_checkpoint.py --checkpoint_dir"),
        ("pytorch_model-00001-of-00002.bin", "convert_hf_checkpoint.py --checkpoint_dir"),
        ("lit_model.pth", "litgpt convert_from_litgpt"),
        ("consolidated.00.pth", "convert_meta_checkpoint.py --checkpoint_dir"),
        ("llama.Q4_0.gguf", "convert_gguf_checkpoint.py --gguf_path"),
        ("adapter_model.safetensors", "import_peft.py --peft_dir"),
    ],
)
def test_files_of_others_end_in_the_command_that_takes_them(name: str, script: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(UserError, match=script):
            find_model(path)
        with pytest.raises(UserError, match=script):
            read_finetuned(path, "lora")


def test_an_adapter_v2_of_the_archived_lit_llama_is_named(tmp_path: Path) -> None:
    state = {"transformer.h.2.attn.adapter_wte.weight": torch.ones(10, 8), "lm_head.adapter_bias": torch.ones(4)}
    torch.save(state, tmp_path / "old.pth")
    with pytest.raises(UserError, match="adapter v2"):
        read_finetuned(tmp_path / "old.pth", "adapter")
