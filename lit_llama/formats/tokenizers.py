"""Tokenizers of other formats, turned into the files that `lit_llama.tokenizer.Tokenizer` reads; to GGUF and back."""

import base64
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from lit_llama.errors import UserError
from lit_llama.tokenizer import CONFIG_NAME, CONTROL, ENDS_NAME, USER_DEFINED, Tokenizer, tokenizer_in

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as HFTokenizer

T = TypeVar("T", str, bytes)
NORMAL, UNUSED, BYTE = 1, 5, 6  # more of SentencePiece's types, which GGUF has taken over for all tokenizers
SPACE = "\u2581"  # how SentencePiece writes it

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
GGUF_ENDS = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]  # the ends of an answer
LLAMA_3_NAMES = (
    *("begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1"),
    *("finetune_right_pad_id", "step_id", "start_header_id", "end_header_id", "eom_id", "eot_id", "python_tag"),
    *(f"reserved_special_token_{i}" for i in range(2, 247)),
)
LLAMA_3_SPECIAL = [f"<|{name}|>" for name in LLAMA_3_NAMES]  # as of Llama 3.1; their ids follow those in the file

# Byte-level BPE writes a byte as one character: printable ones as in Latin-1, the others as those from 256 on (GPT-2).
PRINTABLE = {*range(33, 127), *range(161, 173), *range(174, 256)}
BYTE_TO_CHAR = {byte: 256 + i for i, byte in enumerate(sorted({*range(256)} - PRINTABLE))}


def read_tokenizer(*folders: Path) -> dict[str, bytes | str]:
    """The tokenizer's files in the first folder that has one; none if none has."""
    for path in filter(None, map(tokenizer_in, folders)):
        return from_tiktoken(path) if is_tiktoken(path) else dict(Tokenizer(path).files())
    return {}


def from_gguf(path: Path, metadata: Mapping[str, Any]) -> dict[str, bytes | str]:
    """The tokenizer that the metadata of the GGUF at `path` describes, as files by their names."""
    ends = [metadata[name] for name in GGUF_ENDS if name in metadata]
    files = {ENDS_NAME: json.dumps({"eos_token_id": ends})} if len({*ends}) > 1 else {}
    model, pre = metadata["tokenizer.ggml.model"], metadata.get("tokenizer.ggml.pre", "default")
    if model == "llama":
        return {"tokenizer.model": sentencepiece_from_gguf(path, metadata), **files}
    if model != "gpt2" or pre not in PRE_TOKENIZERS:
        known = f"SentencePiece (llama) and byte-level BPE (gpt2: {', '.join(PRE_TOKENIZERS)}) are"
        raise UserError(f"the tokenizer of {path} ({model}, {pre}) is not supported; {known}")
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    kinds = [(token, kind) for token, kind in zip(tokens, types, strict=True) if kind in (CONTROL, USER_DEFINED)]
    added = [AddedToken(token, special=kind == CONTROL, normalized=False) for token, kind in kinds]
    names = {"eos_token": tokens[metadata["tokenizer.ggml.eos_token_id"]]}
    if "tokenizer.ggml.bos_token_id" in metadata:
        names["bos_token"] = tokens[metadata["tokenizer.ggml.bos_token_id"]]
    begins = metadata.get("tokenizer.ggml.add_bos_token", PRE_TOKENIZERS[pre] is LLAMA_3)  # older files do not say
    return byte_level_bpe(pre, tokens, merges, added, names, begins) | files


def sentencepiece_from_gguf(path: Path, metadata: Mapping[str, Any]) -> bytes:
    """A `tokenizer.model` with the same pieces, scores and settings as the one that the GGUF was made from."""
    model = model_proto(path)()
    tokens, types = metadata["tokenizer.ggml.tokens"], list(metadata["tokenizer.ggml.token_type"])
    has_bos = metadata.get("tokenizer.ggml.add_bos_token", True)
    unk = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    bos = metadata.get("tokenizer.ggml.bos_token_id", 1) if has_bos else unk
    eos = metadata.get("tokenizer.ggml.eos_token_id", 2)
    for token_id in (bos, eos) if has_bos else (eos,):
        types[token_id] = CONTROL  # SentencePiece knows a bos or eos, which it finds by its name, only as this
    for token, score, kind in zip(tokens, metadata["tokenizer.ggml.scores"], types, strict=True):
        model.pieces.add(piece=token, score=score, type=kind)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type, trainer.vocab_size, trainer.byte_fallback = trainer.BPE, len(tokens), BYTE in types
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = unk, bos if has_bos else -1, eos, -1
    trainer.unk_piece, trainer.bos_piece, trainer.eos_piece = tokens[unk], tokens[bos], tokens[eos]
    normalizer.name, normalizer.remove_extra_whitespaces, normalizer.escape_whitespaces = "identity", False, True
    normalizer.add_dummy_prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    content = model.SerializeToString()
    SentencePieceProcessor(model_proto=content)  # raises a RuntimeError if it is not valid
    return content


def model_proto(path: Path) -> Any:
    """SentencePiece's class of what is in its files."""
    try:
        return import_module("sentencepiece.sentencepiece_model_pb2").ModelProto
    except ImportError:
        raise UserError(f"to convert the tokenizer of {path}, install protobuf: pip install protobuf") from None


def to_gguf(tokenizer: Tokenizer, n_rows: int, stops: Collection[int] = ()) -> dict[str, Any]:
    """The metadata by which llama.cpp gives the same ids, for a model of so many rows whose answers end at `stops`."""
    write = bpe_to_gguf if tokenizer.path.suffix == ".json" else sentencepiece_to_gguf
    bos = tokenizer.controls.get(tokenizer.names.get("bos_token", ""), tokenizer.eos_id)  # else llama.cpp assumes one
    ends = [tokenizer.eos_id, *sorted({*stops, *tokenizer.end_ids} - {tokenizer.eos_id})]
    return {
        **write(tokenizer.path, next(iter(tokenizer.files().values())), n_rows),
        **dict(zip(GGUF_ENDS, ends, strict=False)),
        "tokenizer.ggml.bos_token_id": bos,
        "tokenizer.ggml.add_bos_token": tokenizer.bos_id is not None,
        "tokenizer.ggml.add_eos_token": False,
    }


def sentencepiece_to_gguf(path: Path, content: bytes, n_rows: int) -> dict[str, Any]:
    model = model_proto(path).FromString(content)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    if trainer.model_type != trainer.BPE or normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
        raise UserError(f"{path} changes text or is not BPE, which llama.cpp does not do; expected one as LLaMA's")
    pieces = [(piece.piece, piece.score, piece.type) for piece in model.pieces[:n_rows]]
    pieces += [(f"[PAD{i}]", -1000.0, UNUSED) for i in range(len(pieces), n_rows)]
    tokens, scores, types = zip(*pieces, strict=True)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": list(tokens),
        "tokenizer.ggml.scores": list(scores),
        "tokenizer.ggml.token_type": list(types),
        "tokenizer.ggml.unknown_token_id": trainer.unk_id,
        "tokenizer.ggml.add_space_prefix": normalizer.add_dummy_prefix,
    }


def bpe_to_gguf(path: Path, content: bytes, n_rows: int) -> dict[str, Any]:
    fields = json.loads(HFTokenizer.from_buffer(content).to_str())
    ways = ((pre, json.loads(byte_level_bpe(pre, [], [], [], {}, False)["tokenizer.json"])) for pre in PRE_TOKENIZERS)
    pre = next((pre for pre, example in ways if how_cut(example) == how_cut(fields)), None)
    if not pre:
        known = f"byte-level BPE as of {', '.join(PRE_TOKENIZERS)}, or SentencePiece's tokenizer.model"
        raise UserError(f"{path} cuts text in a way for which no name of llama.cpp is known; expected {known}")
    added = {token["id"]: token for token in fields["added_tokens"]}
    texts = {i: token for token, i in fields["model"]["vocab"].items()}
    texts |= {i: token["content"] for i, token in added.items()}
    types = {i: CONTROL if token["special"] else USER_DEFINED for i, token in added.items()}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [texts.get(i, f"[PAD{i}]") for i in range(n_rows)],
        "tokenizer.ggml.token_type": [types.get(i, NORMAL if i in texts else UNUSED) for i in range(n_rows)],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in fields["model"]["merges"]],
    }


def how_cut(fields: Mapping[str, Any]) -> tuple[Any, ...]:
    """How a tokenizer.json cuts text and merges, without what does not change the tokens."""
    model, cut = fields["model"], fields["pre_tokenizer"] or {}
    steps = [{**step, "trim_offsets": None} for step in cut.get("pretokenizers", [cut])]
    return model["type"], model.get("ignore_merges"), fields["normalizer"], steps


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


def splits(token: T, others: Collection[T]) -> list[tuple[T, T]]:
    """The ways to split a token into two others."""
    pairs = ((token[:i], token[i:]) for i in range(1, len(token)))
    return [(left, right) for left, right in pairs if left in others and right in others]


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


def byte_level_bpe(
    pre: str,
    tokens: Iterable[str],
    merges: Sequence[tuple[str, ...]],
    added: Sequence[AddedToken],
    names: Mapping[str, str],
    begins: bool,
) -> dict[str, bytes | str]:
    """A byte-level BPE tokenizer as files.

    Args:
        pre: the name of how text is cut before it is merged.
        tokens: all of them, in the order of their ids.
        merges: in the order of their ranks.
        added: those that are found in text before anything else, or not at all (special ones).
        names: of the bos and eos, as templates call them.
        begins: whether plain text begins with the bos, too.
    """
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = HFTokenizer(models.BPE(vocabulary, merges, ignore_merges=PRE_TOKENIZERS[pre] is LLAMA_3))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(PRE_TOKENIZERS[pre])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(added)
    if begins and (bos := names.get("bos_token")):
        tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, vocabulary[bos])])
    return {"tokenizer.json": tokenizer.to_str(), CONFIG_NAME: json.dumps(names, indent=2)}


def from_sentencepiece(path: Path) -> dict[str, str]:
    """A SentencePiece `tokenizer.model` of BPE as the Hugging Face files that give the same ids.

    SentencePiece merges the pair of neighbours whose union has the highest score: every way to split a piece into two
    others is a merge.
    """
    ours = Tokenizer(path)
    sp = SentencePieceProcessor(model_proto=ours.files()["tokenizer.model"])
    ids = range(sp.vocab_size())
    pieces = [sp.id_to_piece(i) for i in ids]
    special = [pieces[i] for i in ids if sp.is_control(i) or sp.is_unknown(i)]
    texts = {pieces[i] for i in ids if not sp.is_byte(i)} - {*special}
    merges = []
    for piece in sorted(texts, key=lambda piece: (-sp.get_score(sp.piece_to_id(piece)), piece)):
        merges += splits(piece, texts)
    vocabulary, unk = {piece: i for i, piece in enumerate(pieces)}, pieces[sp.unk_id()]
    tokenizer = HFTokenizer(models.BPE(vocabulary, merges, unk_token=unk, fuse_unk=True, byte_fallback=True))
    prefix = sp.encode_as_pieces("a")[0].startswith(SPACE)  # whether a text begins as if a space came before it
    escape = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), escape] if prefix else [escape])
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    if ours.bos_id is not None:
        bos = pieces[ours.bos_id]
        tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, ours.bos_id)])
    names = {"unk_token": unk, **ours.names}
    return {"tokenizer.json": tokenizer.to_str(), CONFIG_NAME: json.dumps(names, indent=2)}
