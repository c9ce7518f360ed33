"""A tokenizer as Hugging Face's libraries read it, with a chat template; and the chat template of their folders."""

import json
from pathlib import Path

from lit_llama.formats.tokenizers import from_sentencepiece
from lit_llama.prompt import portable
from lit_llama.storage.files import read_json, read_text
from lit_llama.tokenizer import CONFIG_NAME, Tokenizer

TEMPLATE_NAME = "chat_template.jinja"  # where transformers keeps it today; it reads tokenizer_config.json, too
TOKENIZER_FILES = (
    r"tokenizer\.(json|model)|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|chat_template\.jinja"
)
LEFT_OUT = ("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens", "auto_map", "backend")


def tokenizer_files(tokenizer: Tokenizer, template: str | None) -> dict[str, bytes | str]:
    """A tokenizer.json and a tokenizer_config.json, which say all that the tokenizer's own files do.

    The class is the one that reads a tokenizer.json as it is, in transformers 4 and 5: others build it anew from its
    vocabulary. The chat template that the tokenizer has stays, be it one of several, if it is this one or if there is
    no other.
    """
    files: dict[str, bytes | str] = dict(tokenizer.files())
    if "tokenizer.json" not in files:
        files |= from_sentencepiece(tokenizer.path)
    fields = {name: value for name, value in json.loads(files.get(CONFIG_NAME, "{}")).items() if name not in LEFT_OUT}
    fields |= {"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer.names}
    if template and default(fields.get("chat_template")) != template:
        fields["chat_template"] = portable(template, tokenizer)
    kept = {name: content for name, content in files.items() if name in ("tokenizer.json", "tokenizer.model")}
    return {**kept, CONFIG_NAME: json.dumps(fields, indent=2)}


def read_chat_template(folder: Path) -> str | None:
    """The chat template of a folder of Hugging Face's, if any: a file of its own, or else in the tokenizer's config."""
    file, config = folder / TEMPLATE_NAME, folder / CONFIG_NAME
    if file.is_file():
        return read_text(file)
    return default(read_json(config).get("chat_template")) if config.is_file() else None


def default(template: object) -> str | None:
    """The template that is used unless another is asked for, of several that have names."""
    if isinstance(template, list):
        named = [each for each in template if isinstance(each, dict) and each.get("name") == "default"]
        template = named[0].get("template") if named else None
    return template if isinstance(template, str) else None
