"""A tokenizer as Hugging Face's libraries read it, with the chat template of a prompt style."""

import json

from lit_llama.formats.chat_templates import chat_template
from lit_llama.formats.tokenizers import from_sentencepiece
from lit_llama.prompt import PromptStyle
from lit_llama.tokenizer import CONFIG_NAME, Tokenizer

TOKENIZER_FILES = (
    r"tokenizer\.json|tokenizer\.model|tokenizer_config\.json|special_tokens_map\.json|chat_template\.jinja"
)


def tokenizer_files(tokenizer: Tokenizer, style: PromptStyle | None) -> dict[str, bytes | str]:
    """The tokenizer's files, a tokenizer.json among them, and in its config the class that reads it as it is.

    Without a style, a chat template that the tokenizer has stays.
    """
    files: dict[str, bytes | str] = dict(tokenizer.files())
    if "tokenizer.json" not in files:
        files |= from_sentencepiece(tokenizer.path)
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", **json.loads(files.get(CONFIG_NAME, "{}"))}
    fields["eos_token"] = tokenizer.token(tokenizer.eos_id)
    if tokenizer.bos_id is not None:
        fields["bos_token"] = tokenizer.token(tokenizer.bos_id)
    if style:
        fields["chat_template"] = chat_template(style, tokenizer)
    return {**files, CONFIG_NAME: json.dumps(fields, indent=2)}
