"""A tokenizer as Hugging Face's libraries read it, with the chat template of a prompt style."""

import json

from lit_llama.formats.chat_templates import chat_template
from lit_llama.formats.tokenizers import from_sentencepiece
from lit_llama.prompt import PromptStyle
from lit_llama.tokenizer import CONFIG_NAME, Tokenizer

TOKENIZER_FILES = (
    r"tokenizer\.(json|model)|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|chat_template\.jinja"
)
LEFT_OUT = ("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens", "auto_map", "backend")


def tokenizer_files(tokenizer: Tokenizer, style: PromptStyle | None) -> dict[str, bytes | str]:
    """A tokenizer.json and a tokenizer_config.json, which say all that the tokenizer's own files do.

    The class is the one that reads a tokenizer.json as it is, in transformers 4 and 5: others build it anew from its
    vocabulary. Without a style, a chat template that the tokenizer has stays.
    """
    files: dict[str, bytes | str] = dict(tokenizer.files())
    if "tokenizer.json" not in files:
        files |= from_sentencepiece(tokenizer.path)
    fields = {name: value for name, value in json.loads(files.get(CONFIG_NAME, "{}")).items() if name not in LEFT_OUT}
    fields |= {"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer.names}
    if style:
        fields["chat_template"] = chat_template(style, tokenizer)
    kept = {name: content for name, content in files.items() if name in ("tokenizer.json", "tokenizer.model")}
    return {**kept, CONFIG_NAME: json.dumps(fields, indent=2)}
