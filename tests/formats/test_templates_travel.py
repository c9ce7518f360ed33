"""The template of a model goes with it: into other formats, and from them into ours."""

import json
from pathlib import Path

from lit_llama.data.batches import Dataset
from lit_llama.errors import UserError
from lit_llama.finetuned import read_finetuned
from lit_llama.lora import LoRAConfig, add_lora, lora_state_dict
from lit_llama.model import LLaMA
from lit_llama.model_folder import own_template, save_model_folder
from lit_llama.prompt import STYLES, encode
from lit_llama.tokenizer import Tokenizer

import convert_gguf_checkpoint
import convert_hf_checkpoint
import pytest
import torch
from builders import RECORDS, TINY, prepare_records, random_model, randomize, run_script, save_file
from builders_chat import CHAT_STYLES, as_dicts, prompts, write_chat_tokenizer
from builders_tokenizers import train_sentencepiece
from torch import Tensor
from transformers import AutoTokenizer

OWN = "{% for m in messages %}{{ '<|im_start|>' + m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}<|im_start|>"


def model_folder(folder: Path, tokenizer: Tokenizer, style: str | None) -> Path:
    save_model_folder(folder, random_model(TINY).state_dict(), TINY, tokenizer.files(), style)
    return folder / "lit-llama.pth"


def export(kind: str, checkpoint: Path, out_dir: Path) -> None:
    assert run_script(f"export_{kind}", "--checkpoint_path", checkpoint, "--out_dir", out_dir) is None


def check_rendered(folder: Path, style: str, tokenizer: Tokenizer) -> None:
    """transformers gives our ids for conversations."""
    theirs = AutoTokenizer.from_pretrained(folder)
    for messages in prompts(style):
        rendered = theirs.apply_chat_template(as_dicts(messages), add_generation_prompt=True, return_dict=True)
        assert rendered["input_ids"] == encode(style, messages, tokenizer).ids


@pytest.mark.parametrize("bos", ["<s>", None])
@pytest.mark.parametrize("style", STYLES)
def test_transformers_renders_an_exported_model_to_our_ids(style: str, bos: str | None, tmp_path: Path) -> None:
    tokenizer = write_chat_tokenizer(tmp_path / "tokenizer", bos)
    checkpoint = model_folder(tmp_path / "base", tokenizer, style)
    export("hf", checkpoint, tmp_path / "hf")
    check_rendered(tmp_path / "hf", style, tokenizer)
    convert_hf_checkpoint.main(tmp_path / "hf", tmp_path / "back")
    own = own_template(tmp_path / "back" / "lit-llama.pth")
    assert own == (
        STYLES[style] if bos or style in (*CHAT_STYLES[:2], "zephyr") else STYLES[style].replace("{{ bos_token }}", "")
    )


@pytest.mark.parametrize("style", ["llama2", "zephyr", "alpaca"])
def test_transformers_renders_a_sentencepiece_model_to_our_ids(style: str, tmp_path: Path) -> None:
    train_sentencepiece(tmp_path / "tokenizer.model", vocab_size=320, user_defined_symbols=[])
    tokenizer = Tokenizer(tmp_path / "tokenizer.model")
    checkpoint = model_folder(tmp_path / "base", tokenizer, style)
    export("hf", checkpoint, tmp_path / "hf")
    check_rendered(tmp_path / "hf", style, tokenizer)


@pytest.mark.parametrize(("style", "eos"), [("llama3", ["</s>", "<|eot_id|>"]), ("llama2", "</s>"), (None, "</s>")])
def test_an_exported_model_stops_at_the_end_of_a_turn(style: str | None, eos: str | list[str], tmp_path: Path) -> None:
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
    export("hf", checkpoint, tmp_path / "hf")
    check_rendered(tmp_path / "hf", "zephyr", tokenizer)


def lora() -> tuple[LLaMA, dict[str, Tensor]]:
    """A tiny model with random LoRA, and its LoRA."""
    model = random_model(TINY)
    add_lora(model, LoRAConfig(4))
    randomize(lora_state_dict(model))
    return model, lora_state_dict(model)


def peft_folder(tmp_path: Path, style: str) -> tuple[Path, Path, Tokenizer]:
    """A LoRA of a style, exported to PEFT; its folder, its base and the tokenizer."""
    tokenizer = write_chat_tokenizer(tmp_path / "tokenizer")
    checkpoint = model_folder(tmp_path / "base", tokenizer, "smollm2")
    save_file(tmp_path / "lora.pth", LoRAConfig(4), *lora(), style)
    flags = ("--lora_path", tmp_path / "lora.pth", "--pretrained_path", checkpoint, "--base_model", "x")
    assert run_script("export_peft", *flags, "--out_dir", tmp_path / "peft") is None
    return tmp_path / "peft", checkpoint, tokenizer


@pytest.mark.parametrize("style", ["alpaca", "llama3"])
def test_transformers_renders_the_tokenizer_of_a_peft_folder_to_our_ids(style: str, tmp_path: Path) -> None:
    folder, _, tokenizer = peft_folder(tmp_path, style)
    check_rendered(folder, style, tokenizer)


def test_an_import_from_peft_takes_the_template_of_its_folder(tmp_path: Path) -> None:
    folder, checkpoint, _ = peft_folder(tmp_path, "zephyr")
    flags = ("--peft_dir", folder, "--pretrained_path", checkpoint, "--out_path", tmp_path / "back.pth")
    (folder / "own.jinja").write_text(OWN)
    for more, template in (
        ((), "zephyr"),
        (("--prompt_style", "plain"), "plain"),
        (("--prompt_style", folder / "own.jinja"), OWN),
    ):
        assert run_script("import_peft", *flags, *more) is None
        assert torch.load(tmp_path / "back.pth")["prompt_style"] == STYLES.get(template, template)
    (folder / "tokenizer_config.json").unlink()
    assert run_script("import_peft", *flags) is None
    assert torch.load(tmp_path / "back.pth")["prompt_style"] == STYLES["smollm2"]  # the base model's


NAMED = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": OWN}]


@pytest.mark.parametrize(
    ("template", "own"), [(OWN, OWN), (NAMED, OWN), ("{{ raise_exception('No.') }}", None), (None, None)]
)
def test_a_model_that_is_converted_and_exported_has_its_own_template(
    template: object, own: str | None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    export("hf", model_folder(tmp_path / "base", write_chat_tokenizer(tmp_path / "tokenizer"), None), tmp_path / "hf")
    config = tmp_path / "hf" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": template}))
    convert_hf_checkpoint.main(tmp_path / "hf", tmp_path / "out")
    err = capsys.readouterr().err
    assert ("No.; pass" in err) == (own is None and template is not None)
    checkpoint = tmp_path / "out" / "lit-llama.pth"
    assert own_template(checkpoint) == (own or template)
    export("hf", checkpoint, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "tokenizer_config.json").read_text()).get("chat_template") == template
    if own:
        export("gguf", checkpoint, tmp_path / "gguf")
        convert_gguf_checkpoint.main(tmp_path / "gguf" / "model-F16.gguf", tmp_path / "back")
        assert own_template(tmp_path / "back" / "lit-llama.pth") == own
        assert "TEMPLATE" not in (tmp_path / "gguf" / "Modelfile").read_text()
        assert "Ollama looks in the model's GGUF" in capsys.readouterr().err
    (tmp_path / "hf" / "chat_template.jinja").write_text(STYLES["zephyr"])  # goes before the other
    convert_hf_checkpoint.main(tmp_path / "hf", tmp_path / "out")
    assert own_template(checkpoint) == STYLES["zephyr"]


def test_names_in_earlier_files_are_those_of_shipped_templates(tmp_path: Path) -> None:
    tokenizer = write_chat_tokenizer(tmp_path / "tokenizer")
    checkpoint = model_folder(tmp_path / "base", tokenizer, "smollm2")
    assert own_template(checkpoint) == STYLES["smollm2"]
    save_file(tmp_path / "lora.pth", LoRAConfig(4), *lora(), "alpaca")
    assert read_finetuned(tmp_path / "lora.pth", "lora").prompt_style == STYLES["alpaca"]
    prepare_records(tmp_path / "data", {"train": RECORDS}, tokenizer.path, "zephyr")
    assert Dataset(tmp_path / "data", "train", 128).prompt_style == STYLES["zephyr"]
    for wrong in ("alpacca", 7):
        fields = json.loads((tmp_path / "base" / "config.json").read_text()) | {"prompt_style": wrong}
        (tmp_path / "base" / "config.json").write_text(json.dumps(fields))
        with pytest.raises(UserError, match=r"prompt.style"):
            own_template(checkpoint)


def test_a_model_without_a_style_keeps_the_chat_template_of_its_tokenizer(tmp_path: Path) -> None:
    tokenizer = write_chat_tokenizer(tmp_path / "tokenizer")
    config = tokenizer.path.with_name("tokenizer_config.json")
    config.write_text(json.dumps({"eos_token": "</s>", "chat_template": "{{ messages }}"}))
    checkpoint = model_folder(tmp_path / "base", tokenizer, None)
    export("hf", checkpoint, tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())["chat_template"] == "{{ messages }}"
