"""The templates of `lit_llama/prompt.py` in Jinja, which transformers, llama.cpp and vLLM render; how to tell theirs.

Jinja knows no input apart from the content, as Alpaca's records have it: write both into the content.
"""

import sys
from pathlib import Path

from lit_llama.prompt import SMOLLM2_SYSTEM, Message, PromptStyle, alpaca_text
from lit_llama.storage.files import read_json
from lit_llama.tokenizer import CONFIG_NAME, Tokenizer

CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMOLLM2_START = (
    f"{{% if messages[0]['role'] != 'system' %}}<|im_start|>system\n{SMOLLM2_SYSTEM}<|im_end|>\n{{% endif %}}"
)
LLAMA_2 = (
    "{% set found = namespace(system='') %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}"
    "{% set found.system = '<<SYS>>\n' + message['content'] + '\n<</SYS>>\n\n' %}"
    "{% elif message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (found.system + message['content']) | trim + ' [/INST]' }}"
    "{% set found.system = '' %}"
    "{% else %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
LLAMA_3 = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{{ '\n\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}"
    "<|{{ message['role'] }}|>{{ '\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{{ '\n' }}{% endif %}"
)


def one_exchange(question: str) -> str:
    """A template of one question, which becomes `question`, and its answer."""
    return (
        "{{ bos_token }}"
        "{% for message in messages %}"
        "{% if message['role'] == 'user' and loop.first %}{{ QUESTION }}"
        "{% elif message['role'] == 'assistant' and loop.index0 < 2 %}{{ message['content'] + eos_token }}"
        "{% else %}{{ raise_exception('This model was trained on one question and its answer.') }}{% endif %}"
        "{% endfor %}"
    ).replace("QUESTION", question)


def around(text: str) -> str:
    """The Jinja expression that puts the content where `text` has "{}"."""
    before, after = (part.replace("\n", "\\n") for part in text.split("{}"))
    return f"'{before}' + message['content'] + '{after}'"


ALPACA = alpaca_text(Message("user", "{}"))

CHAT_TEMPLATES: dict[PromptStyle, str] = {
    "plain": one_exchange("message['content']"),
    "alpaca": one_exchange(around(f"{ALPACA}\n")),
    "alpaca-stanford": one_exchange(around(ALPACA)),
    "chatml": CHATML,
    "smollm2": SMOLLM2_START + CHATML,
    "llama2": LLAMA_2,
    "llama3": LLAMA_3,
    "zephyr": ZEPHYR,
}

SIGNS: dict[str, PromptStyle] = {  # what only the templates of a style have, the rarer before the more common
    "named SmolLM": "smollm2",
    "<|im_start|>": "chatml",
    "<|start_header_id|>": "llama3",
    "[INST]": "llama2",
    "<|assistant|>": "zephyr",
}


FILE_NAME = "chat_template.jinja"  # where transformers keeps it today; it reads tokenizer_config.json, too


def chat_template(style: PromptStyle, tokenizer: Tokenizer) -> str:
    """The template of a style, without a bos for a model that has none: what others call its bos is another token."""
    template = CHAT_TEMPLATES[style]
    return template if tokenizer.bos_id is not None else without_bos(template)


def begins_with_bos(style: PromptStyle) -> bool:
    return "bos_token" in CHAT_TEMPLATES[style]


def without_bos(template: str) -> str:
    return template.replace("{{ bos_token }}", "").replace("bos_token + ", "")


def recognise(chat_template: object) -> PromptStyle | None:
    """The style of a chat template, as tokenizer_config.json and GGUF files carry it; None if it is not one of ours."""
    text = str(chat_template)
    for style, ours in CHAT_TEMPLATES.items():
        if without_bos(text) == without_bos(ours):
            return style
    found = (style for sign, style in SIGNS.items() if sign in text)
    return next(found, None)


def style_of(source: Path, chat_template: str | None) -> PromptStyle | None:
    """The style of the chat template of `source`, a file or folder; says so if it has one that is not one of ours."""
    style = recognise(chat_template)
    if chat_template and not style:
        print(f"The chat template of {source} is none of ours; pass --prompt_style where one is asked", file=sys.stderr)
    return style


def read_chat_template(folder: Path) -> str | None:
    """The chat template that a folder of Hugging Face's format has, if any; of several the default one."""
    if (folder / FILE_NAME).is_file():
        return (folder / FILE_NAME).read_text(encoding="utf-8")
    config = folder / CONFIG_NAME
    template = read_json(config).get("chat_template") if config.is_file() else None
    if isinstance(template, list):
        template = next((each["template"] for each in template if each["name"] == "default"), None)
    return template
