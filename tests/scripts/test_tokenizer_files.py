"""Tokenizers of other formats: SentencePiece and byte-level BPE from GGUF's lists, tiktoken's file of Llama 3."""

import base64
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from lit_llama.errors import UserError
from lit_llama.tokenizer import Tokenizer

import pytest
import regex
from builders_gguf import bpe_metadata, sentencepiece_metadata
from builders_tokenizers import CORPUS, TEXTS, train_sentencepiece
from convert_gguf_checkpoint import tokenizer_from_gguf
from convert_hf_checkpoint import from_tiktoken, is_tiktoken
from tokenizers import Tokenizer as HFTokenizer

PATTERN = (  # Llama 3's, as its authors published it
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def converted(folder: Path, metadata: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a GGUF with this metadata, as the project reads it."""
    files = tokenizer_from_gguf(Path("model.gguf"), metadata)
    for name, content in files.items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return Tokenizer(folder / next(iter(files)))


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_from_a_gguf_is_the_original(tmp_path: Path, prefix: bool) -> None:
    sp = train_sentencepiece(tmp_path / "original.model", add_dummy_prefix=prefix)
    original = Tokenizer(tmp_path / "original.model")
    stated = {} if prefix else {"tokenizer.ggml.add_space_prefix": False}
    ours = converted(tmp_path, sentencepiece_metadata(sp) | stated)
    assert (ours.vocab_size, ours.bos_id, ours.eos_id) == (original.vocab_size, 1, 2)
    for text in TEXTS:
        ids = original.encode(text, eos=True)
        assert ours.encode(text, eos=True) == ids, text
        assert ours.decode(ids) == original.decode(ids), text


def test_sentencepiece_that_adds_no_bos(tmp_path: Path) -> None:
    sp = train_sentencepiece(tmp_path / "original.model")
    ours = converted(tmp_path, sentencepiece_metadata(sp) | {"tokenizer.ggml.add_bos_token": False})
    assert ours.bos_id is None
    assert ours.encode("a task", eos=True) == [*sp.encode("a task"), 2]


def test_a_sentencepiece_model_may_end_in_an_added_token(tmp_path: Path) -> None:
    sp = train_sentencepiece(tmp_path / "original.model")
    metadata = sentencepiece_metadata(sp)
    metadata["tokenizer.ggml.tokens"] += ["[call]", "<|im_end|>"]
    metadata["tokenizer.ggml.scores"] += [-1000.0, -1000.0]
    metadata["tokenizer.ggml.token_type"] += [4, 4]
    ours = converted(tmp_path, metadata | {"tokenizer.ggml.eos_token_id": sp.vocab_size() + 1})
    assert ours.eos_id == sp.vocab_size() + 1
    assert ours.encode("that[call]", bos=False) == [*sp.encode("that"), sp.vocab_size()]
    assert ours.decode([*sp.encode("that"), ours.eos_id]) == "that"


def test_byte_level_bpe_from_a_gguf(tmp_path: Path, byte_tokenizer: HFTokenizer) -> None:
    ours = converted(tmp_path, bpe_metadata(byte_tokenizer, "gpt-2"))
    assert (ours.vocab_size, ours.bos_id, ours.eos_id) == (byte_tokenizer.get_vocab_size(), None, 1)
    assert ours.control_id("<|im_end|>") == 1
    byte_tokenizer = HFTokenizer.from_str(byte_tokenizer.to_str())
    byte_tokenizer.encode_special_tokens = True
    for text in TEXTS:
        assert ours.encode(text) == byte_tokenizer.encode(text).ids, text


def test_smollm_splits_digits(tmp_path: Path, byte_tokenizer: HFTokenizer) -> None:
    metadata = bpe_metadata(byte_tokenizer)
    metadata["tokenizer.ggml.tokens"] += ["12"]
    metadata["tokenizer.ggml.token_type"] += [1]
    metadata["tokenizer.ggml.merges"] += ["1 2"]
    one, two = byte_tokenizer.encode("12").ids
    assert converted(tmp_path, metadata | {"tokenizer.ggml.pre": "gpt-2"}).encode("12") == [
        byte_tokenizer.get_vocab_size()
    ]
    assert converted(tmp_path, metadata).encode("12") == [one, two]


def test_only_llama_3_starts_with_bos_if_the_gguf_does_not_say(tmp_path: Path, byte_tokenizer: HFTokenizer) -> None:
    metadata = bpe_metadata(byte_tokenizer, "llama-bpe")
    assert converted(tmp_path, metadata).bos_id == 0
    assert converted(tmp_path, metadata | {"tokenizer.ggml.add_bos_token": False}).bos_id is None
    assert converted(tmp_path, metadata | {"tokenizer.ggml.pre": "smollm"}).bos_id is None


def test_added_tokens_of_a_gguf_are_found_in_text_and_shown(tmp_path: Path, byte_tokenizer: HFTokenizer) -> None:
    metadata = bpe_metadata(byte_tokenizer)
    metadata["tokenizer.ggml.tokens"] += ["<think now>"]
    metadata["tokenizer.ggml.token_type"] += [4]
    ours = converted(tmp_path, metadata)
    ids = ours.encode("a<think now><|im_end|>")
    assert ids == [*ours.encode("a"), byte_tokenizer.get_vocab_size(), *ours.encode("<|im_end|>")]
    assert ours.decode(ids) == "a<think now><|im_end|>"
    assert ours.decode([*ids, 1]) == "a<think now><|im_end|>"


@pytest.mark.parametrize(("model", "pre"), [("bert", "default"), ("gpt2", "unheard-of")])
def test_other_tokenizers_are_refused(byte_tokenizer: HFTokenizer, model: str, pre: str) -> None:
    metadata = bpe_metadata(byte_tokenizer, pre) | {"tokenizer.ggml.model": model}
    with pytest.raises(UserError, match=rf"model\.gguf \({model}, {pre}\)"):
        tokenizer_from_gguf(Path("model.gguf"), metadata)


def train_ranks(size: int) -> dict[bytes, int]:
    """Byte pairs merged as tiktoken's training does: the most frequent neighbours become the next rank."""
    words = [[bytes([byte]) for byte in word.encode()] for text in CORPUS for word in regex.findall(PATTERN, text)]
    tokens = [bytes([byte]) for byte in range(256)]
    while len(tokens) < size:
        left, right = Counter(pair for word in words for pair in pairwise(word)).most_common(1)[0][0]
        tokens.append(left + right)
        for word in words:
            merge(word, left + right)
    tokens += [
        b" instructionless",  # no merges lead to it
        b"aaa",  # can be had in two ways, but only after
        b"aa",
        b"1234",  # is always cut before
    ]
    return {token: rank for rank, token in enumerate(dict.fromkeys(tokens))}


def merge(parts: list[bytes], union: bytes) -> None:
    """Merge the neighbours that make `union`, from left to right, in place."""
    i = 0
    while i < len(parts) - 1:
        if parts[i] + parts[i + 1] == union:
            parts[i : i + 2] = [union]
        i += 1


def encode_by_ranks(ranks: dict[bytes, int], text: str) -> list[int]:
    """tiktoken's algorithm, told plainly: merge the neighbours with the lowest rank until there are none."""
    ids = []
    for word in regex.findall(PATTERN, text):
        tokens = [bytes([byte]) for byte in word.encode()]
        while tokens != [word.encode()]:
            unions = [left + right for left, right in pairwise(tokens) if left + right in ranks]
            if word.encode() in ranks:
                tokens = [word.encode()]
            elif unions:
                i = [left + right for left, right in pairwise(tokens)].index(min(unions, key=ranks.__getitem__))
                tokens[i : i + 2] = [tokens[i] + tokens[i + 1]]
            else:
                break
        ids += [ranks[token] for token in tokens]
    return ids


def write_ranks(path: Path, ranks: dict[bytes, int]) -> None:
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()))


def test_tiktoken_is_encoded_as_its_ranks_say(tmp_path: Path) -> None:
    ranks = train_ranks(400)
    n = len(ranks)
    write_ranks(tmp_path / "tokenizer.model", ranks)
    for name, content in from_tiktoken(tmp_path / "tokenizer.model").items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    ours = Tokenizer(tmp_path / "tokenizer.json")
    assert (ours.vocab_size, ours.bos_id, ours.eos_id) == (n + 256, n, n + 1)
    special = {"<|begin_of_text|>": n, "<|end_of_text|>": n + 1, "<|eot_id|>": n + 9, "<|python_tag|>": n + 10}
    special |= {"<|reserved_special_token_0|>": n + 2, "<|reserved_special_token_246|>": n + 255}
    for text in [*TEXTS, "".join(TEXTS), " instructionless", *special]:
        assert ours.encode(text, bos=False) == encode_by_ranks(ranks, text), text
        assert ours.decode(ours.encode(text)) == text
    assert {name: ours.control_id(name) for name in special} == special


def test_tiktoken_is_told_from_sentencepiece(tmp_path: Path) -> None:
    write_ranks(tmp_path / "tiktoken.model", train_ranks(256))
    train_sentencepiece(tmp_path / "sentencepiece.model")
    assert is_tiktoken(tmp_path / "tiktoken.model")
    assert not is_tiktoken(tmp_path / "sentencepiece.model")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda lines: [*lines[:-1], lines[-1][:-2]],  # cut within the last rank
        lambda lines: [*lines[:-1], lines[-1][:2]],  # cut within the last token
        lambda lines: [*lines[:260], *lines[261:]],  # a token is missing
        lambda lines: [*lines[:260], lines[259].replace(b"259", b"260"), *lines[261:]],  # a token comes twice
        lambda lines: [lines[0].replace(b"=", b"!=", 1), *lines[1:]],  # no base64
        lambda lines: lines[:255],  # not every byte is a token
    ],
)
def test_a_spoilt_tiktoken_file_is_refused(tmp_path: Path, spoil: Callable[[list[bytes]], list[bytes]]) -> None:
    path = tmp_path / "tokenizer.model"
    write_ranks(path, train_ranks(300))
    path.write_bytes(b"".join(spoil(path.read_bytes().splitlines(keepends=True))))
    with pytest.raises(UserError, match=r"tokenizer\.model.*copy it again"):
        from_tiktoken(path)
