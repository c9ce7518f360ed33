"""Tokenizers as Hugging Face's files, for what converts, imports and exports models.

How byte-level ones split text, Llama 3's file of tiktoken's format, and the chat templates that come with models.
"""

import base64
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from lit_llama.errors import UserError, short
from lit_llama.progress import say
from lit_llama.prompt import EXCHANGED
from lit_llama.sandbox import render
from lit_llama.storage.files import read_json, read_text
from lit_llama.tokenizer import CONFIG_NAME, find_tokenizer

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as HFTokenizer

T = TypeVar("T", str, bytes)
TEMPLATE_NAME = "chat_template.jinja"  # where transformers keeps it today; it reads tokenizer_config.json, too
TOKENIZER_FILES = (
    r"tokenizer\.(json|model)|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|chat_template\.jinja"
)

BYTES = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
DIGITS = [pre_tokenizers.Digits(individual_digits=True), *BYTES]
LLAMA_3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_3 = [
    pre_tokenizers.Split(Regex(LLAMA_3_PATTERN), "isolated"),
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
]
PRE_TOKENIZERS = {  # llama.cpp's names for how text is cut before the byte pairs are merged; the first is written
    **dict.fromkeys(("gpt-2", "default"), BYTES),
    **dict.fromkeys(("smollm", "minerva-7b"), DIGITS),
    **dict.fromkeys(("llama-bpe", "llama-v3", "llama3", "falcon3"), LLAMA_3),
}

LLAMA_3_NAMES = (
    *("begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1"),
    *("finetune_right_pad_id", "step_id", "start_header_id", "end_header_id", "eom_id", "eot_id", "python_tag"),
    *(f"reserved_special_token_{i}" for i in range(2, 247)),
)
LLAMA_3_SPECIAL = [f"<|{name}|>" for name in LLAMA_3_NAMES]  # as of Llama 3.1; their ids follow those in the file

# Byte-level BPE writes a byte as one character: printable ones as in Latin-1, the others as those from 256 on (GPT-2).
PRINTABLE = {*range(33, 127), *range(161, 173), *range(174, 256)}
BYTE_TO_CHAR = {byte: 256 + i for i, byte in enumerate(sorted({*range(256)} - PRINTABLE))}


def splits(token: T, others: Collection[T]) -> list[tuple[T, T]]:
    """The ways to split a token into two others."""
    pairs = ((token[:i], token[i:]) for i in range(1, len(token)))
    return [(left, right) for left, right in pairs if left in others and right in others]


def byte_level_bpe(
    pre: str,
    tokens: Iterable[str],
    merges: Sequence[tuple[str, str]],
    added: list[AddedToken],
    names: Mapping[str, str],
    begins: bool,
) -> dict[str, bytes | str]:
    """A byte-level BPE tokenizer as files: tokens by id, merges by rank, `pre` the name of how text is cut before.

    Of what was added, a special token is found in no text. If it `begins`, plain text starts with the bos.
    """
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = HFTokenizer(models.BPE(vocabulary, merges, ignore_merges=PRE_TOKENIZERS[pre] is LLAMA_3))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(PRE_TOKENIZERS[pre])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(added)
    if begins and (bos := names.get("bos_token")):
        tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, vocabulary[bos])])
    return {"tokenizer.json": tokenizer.to_str(), CONFIG_NAME: json.dumps(names, indent=2)}


def is_tiktoken(path: Path) -> bool:
    """Whether the file is of tiktoken's format, as Llama 3's `tokenizer.model` is, despite its name."""
    with open(path, "rb") as file:
        return re.match(rb"[A-Za-z0-9+/]+=* \d+\s", file.read(1024)) is not None


def from_tiktoken(path: Path) -> dict[str, bytes | str]:
    """Llama 3's `tokenizer.model` as the Hugging Face files tokenizer.json and tokenizer_config.json, with its BOS.

    tiktoken merges the pair of neighbours whose union has the lowest rank, whatever the two are: every way to split a
    token into two others is a merge.
    """
    ranks = read_ranks(path)
    chars = {token: token.decode("latin-1").translate(BYTE_TO_CHAR) for token in ranks}
    merges = []
    for token in ranks:
        pairs = sorted(splits(token, ranks), key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(chars[left], chars[right]) for left, right in pairs]
    special = [AddedToken(token, special=True) for token in LLAMA_3_SPECIAL]
    names = {"eos_token": LLAMA_3_SPECIAL[1], "bos_token": LLAMA_3_SPECIAL[0]}
    return byte_level_bpe("llama-bpe", [*chars.values(), *LLAMA_3_SPECIAL], merges, special, names, begins=True)


def read_ranks(path: Path) -> dict[bytes, int]:
    """The tokens of a tiktoken file and their ranks, which count from 0 in the order of the lines."""
    lines = path.read_bytes().splitlines()
    try:
        pairs = [line.split() for line in lines]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except ValueError:
        raise UserError(f"{path} is not a tiktoken file, or is truncated; copy it again") from None
    if [*ranks.values()] != [*range(len(lines))] or any(bytes([byte]) not in ranks for byte in range(256)):
        raise UserError(f"{path} is a tiktoken file with tokens missing or twice; copy it again")
    return ranks


def read_chat_template(folder: Path) -> str | None:
    """The chat template of a folder of Hugging Face's, if any: a file of its own, or else in the tokenizer's config."""
    file, config = folder / TEMPLATE_NAME, folder / CONFIG_NAME
    if file.is_file():
        return read_text(file)
    return default(read_json(config).get("chat_template")) if config.is_file() else None


def default(template: object) -> str | None:
    """The template that is used unless another is asked for, of several that have names."""
    if isinstance(template, list):
        named = (each for each in template if isinstance(each, dict) and each.get("name") == "default")
        template = next(named, {}).get("template")
    return template if isinstance(template, str) else None


def tried(template: object) -> str | None:
    """A chat template that comes with a model, if any; says so if it cannot render a conversation."""
    if not isinstance(template, str):
        return None
    try:
        render(template, [message._asdict() for message in EXCHANGED], {"bos_token": "<s>", "eos_token": "</s>"}, False)
    except UserError as error:
        say(f"warning: {error}; pass a --prompt_style to every script that takes one")
    return template


def report_missing(folder: Path, n_rows: int) -> None:
    """Say which tokens of a folder's tokenizer a model of so many rows lacks, if any."""
    tokenizer = find_tokenizer(folder, folder)
    if names := ", ".join(map(tokenizer.token, range(n_rows, tokenizer.vocab_size))):
        say(f"The model has no row for {short(names)}: harmless if no text uses it")
