"""The template of a model goes with it: into other formats, and from them into ours."""

import json
from pathlib import Path

from lit_llama.formats.chat_templates import CHAT_TEMPLATES
from lit_llama.lora import LoRAConfig, add_lora, lora_state_dict
from lit_llama.model_folder import own_prompt_style, save_model_folder
from lit_llama.prompt import TEMPLATES, PromptStyle, encode
from lit_llama.tokenizer import Tokenizer

import convert_gguf_checkpoint
import convert_hf_checkpoint
import pytest
import torch
from builders import TINY, random_model, randomize, run_script, save_file
from builders_chat import as_dicts, prompts, write_chat_tokenizer
from builders_gguf import bpe_metadata, write_gguf
from builders_tokenizers import train_sentencepiece
from tokenizers import Tokenizer as HFTokenizer
from transformers import AutoTokenizer


def model_folder(folder: Path, tokenizer: Tokenizer, style: PromptStyle | None) -> Path:
    save_model_folder(folder, random_model(TINY).state_dict(), TINY, tokenizer.files(), style)
    return folder / "lit-llama.pth"


def check_rendered(folder: Path, style: PromptStyle, tokenizer: Tokenizer) -> None:
    """transformers gives our ids for conversations."""
    theirs = AutoTokenizer.from_pretrained(folder)
    for messages in prompts(style):
        rendered = theirs.apply_chat_template(as_dicts(messages), add_generation_prompt=True, return_dict=True)
        assert rendered["input_ids"] == encode(style, messages, tokenizer).ids


@pytest.mark.parametrize("bos", ["<s>", None])
@pytest.mark.parametrize("style", TEMPLATES)
def test_transformers_renders_an_exported_model_to_our_ids(style: PromptStyle, bos: str | None, tmp_path: Path) -> None:
    tokenizer = write_chat_tokenizer(tmp_path / "tokenizer", bos)
    checkpoint = model_folder(tmp_path / "base", tokenizer, style)
    assert run_script("export_hf", "--checkpoint_path", checkpoint, "--out_dir", tmp_path / "hf") is None
    check_rendered(tmp_path / "hf", style, tokenizer)
    convert_hf_checkpoint.main(tmp_path / "hf", tmp_path / "back")
    assert own_prompt_style(tmp_path / "back" / "lit-llama.pth") == style


@pytest.mark.parametrize("style", ["llama2", "zephyr", "alpaca"])
def test_transformers_renders_a_sentencepiece_model_to_our_ids(style: PromptStyle, tmp_path: Path) -> None:
    train_sentencepiece(tmp_path / "tokenizer.model", vocab_size=320, user_defined_symbols=[])
    tokenizer = Tokenizer(tmp_path / "tokenizer.model")
    checkpoint = model_folder(tmp_path / "base", tokenizer, style)
    assert run_script("export_hf", "--checkpoint_path", checkpoint, "--out_dir", tmp_path / "hf") is None
    check_rendered(tmp_path / "hf", style, tokenizer)


@pytest.mark.parametrize(("style", "eos"), [("llama3", ["</s>", "<|eot_id|>"]), ("llama2", "</s>"), (None, "</s>")])
def test_an_exported_model_stops_at_the_end_of_a_turn(
    style: PromptStyle | None, eos: str | list[str], tmp_path: Path
) -> None:
    tokenizer = write_chat_tokenizer(tmp_path / "tokenizer")
    checkpoint = model_folder(tmp_path / "base", tokenizer, None)
    flags = ("--prompt_style", style) if style else ()
    assert run_script("export_hf", "--checkpoint_path", checkpoint, "--out_dir", tmp_path / "hf", *flags) is None
    found = json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"]
    names = [tokenizer.token(i) for i in found] if isinstance(found, list) else tokenizer.token(found)
    assert names == eos


def test_an_export_replaces_the_template_of_an_earlier_model(tmp_path: Path) -> None:
    tokenizer = write_chat_tokenizer(tmp_path / "tokenizer")
    checkpoint = model_folder(tmp_path / "base", tokenizer, "zephyr")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "chat_template.jinja").write_text("of another model")
    assert run_script("export_hf", "--checkpoint_path", checkpoint, "--out_dir", tmp_path / "hf") is None
    check_rendered(tmp_path / "hf", "zephyr", tokenizer)


def peft_folder(tmp_path: Path, style: PromptStyle) -> tuple[Path, Path, Tokenizer]:
    """A LoRA of a style, exported to PEFT; its folder, its base and the tokenizer."""
    tokenizer = write_chat_tokenizer(tmp_path / "tokenizer")
    checkpoint, model = model_folder(tmp_path / "base", tokenizer, "smollm2"), random_model(TINY)
    lora = LoRAConfig(4, 8, 0.0, ("query",))
    add_lora(model, lora)
    randomize(lora_state_dict(model))
    save_file(tmp_path / "lora.pth", lora, model, lora_state_dict(model), style)
    flags = ("--lora_path", tmp_path / "lora.pth", "--pretrained_path", checkpoint, "--base_model", "x")
    assert run_script("export_peft", *flags, "--out_dir", tmp_path / "peft") is None
    return tmp_path / "peft", checkpoint, tokenizer


@pytest.mark.parametrize("style", ["alpaca", "llama3"])
def test_transformers_renders_the_tokenizer_of_a_peft_folder_to_our_ids(style: PromptStyle, tmp_path: Path) -> None:
    folder, _, tokenizer = peft_folder(tmp_path, style)
    check_rendered(folder, style, tokenizer)


def test_an_import_from_peft_takes_the_template_of_its_folder(tmp_path: Path) -> None:
    folder, checkpoint, _ = peft_folder(tmp_path, "zephyr")
    flags = ("--peft_dir", folder, "--pretrained_path", checkpoint, "--out_path", tmp_path / "back.pth")
    for more, style in (((), "zephyr"), (("--prompt_style", "plain"), "plain")):
        assert run_script("import_peft", *flags, *more) is None
        assert torch.load(tmp_path / "back.pth")["prompt_style"] == style
    (folder / "tokenizer_config.json").unlink()
    assert run_script("import_peft", *flags) is None
    assert torch.load(tmp_path / "back.pth")["prompt_style"] == "alpaca"


@pytest.mark.parametrize(
    ("template", "style"),
    [
        ("{{ '<|im_start|>' }}", "chatml"),
        ([{"name": "tool_use", "template": "x"}, {"name": "default", "template": "{{ '[INST]' }}"}], "llama2"),
        ("{{ messages }}", None),
        (None, None),
    ],
)
def test_a_converted_model_has_the_style_of_its_chat_template(
    template: object, style: PromptStyle | None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    tokenizer = write_chat_tokenizer(tmp_path / "tokenizer")
    assert (
        run_script(
            "export_hf",
            "--checkpoint_path",
            model_folder(tmp_path / "base", tokenizer, None),
            "--out_dir",
            tmp_path / "hf",
        )
        is None
    )
    config = tmp_path / "hf" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": template}))
    convert_hf_checkpoint.main(tmp_path / "hf", tmp_path / "out")
    assert own_prompt_style(tmp_path / "out" / "lit-llama.pth") == style
    assert ("none of ours" in capsys.readouterr().err) == (template == "{{ messages }}")
    (tmp_path / "hf" / "chat_template.jinja").write_text(CHAT_TEMPLATES["zephyr"])  # goes before the other
    convert_hf_checkpoint.main(tmp_path / "hf", tmp_path / "out")
    assert own_prompt_style(tmp_path / "out" / "lit-llama.pth") == "zephyr"


@pytest.mark.parametrize(("template", "style"), [("You are named SmolLM", "smollm2"), ("{{ messages }}", None)])
def test_a_converted_gguf_has_the_style_of_its_chat_template(
    template: str, style: PromptStyle | None, tmp_path: Path, byte_tokenizer: HFTokenizer, capsys: pytest.CaptureFixture
) -> None:
    write_gguf(tmp_path / "m.gguf", bpe_metadata(byte_tokenizer) | {"tokenizer.chat_template": template})
    convert_gguf_checkpoint.main(tmp_path / "m.gguf", tmp_path / "out")
    assert own_prompt_style(tmp_path / "out" / "lit-llama.pth") == style
    assert (f"The chat template of {tmp_path / 'm.gguf'} is none of ours" in capsys.readouterr().err) == (style is None)


def test_a_model_without_a_style_keeps_the_chat_template_of_its_tokenizer(tmp_path: Path) -> None:
    tokenizer = write_chat_tokenizer(tmp_path / "tokenizer")
    config = tokenizer.path.with_name("tokenizer_config.json")
    config.write_text(json.dumps({"eos_token": "</s>", "chat_template": "{{ messages }}"}))
    checkpoint = model_folder(tmp_path / "base", tokenizer, None)
    assert run_script("export_hf", "--checkpoint_path", checkpoint, "--out_dir", tmp_path / "hf") is None
    assert json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())["chat_template"] == "{{ messages }}"
