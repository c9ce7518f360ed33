"""Conversations, and a tokenizer that has the control tokens of all templates."""

import json
from pathlib import Path

from lit_llama.prompt import Message
from lit_llama.tokenizer import Tokenizer

from builders_tokenizers import train_byte_tokenizer
from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as HFTokenizer

CONTROLS = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<s>", "</s>")
CHAT_STYLES: tuple[str, ...] = ("chatml", "smollm2", "llama2", "llama3", "zephyr")


def write_chat_tokenizer(folder: Path, bos: str | None = "<s>") -> Tokenizer:
    """A byte-level BPE; </s> is its eos."""
    hf = HFTokenizer.from_str(train_byte_tokenizer().to_str())
    hf.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in CONTROLS])
    if bos:
        hf.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, hf.token_to_id(bos))])
    folder.mkdir(parents=True, exist_ok=True)
    hf.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return Tokenizer(folder / "tokenizer.json")


def conversation(n_turns: int, system: bool) -> list[Message]:
    messages = [Message("system", "Answer briefly.\nIn English.")] if system else []
    for i in range(n_turns):
        messages += [Message("user", f"Question {i}: what is {i} + 1?"), Message("assistant", f"It is {i + 1}. Done")]
    return messages


def as_dicts(messages: list[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def prompts(style: str) -> list[list[Message]]:
    """Conversations of this style that wait for an answer."""
    return [conversation(1, False)[:1]] + [conversation(3, True)[:-1]] * (style in CHAT_STYLES)
