"""One class for SentencePiece (`tokenizer.model`) and Hugging Face (`tokenizer.json`) tokenizers."""

import hashlib
import json
import os
import re
import struct
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from lit_llama.errors import UserError, check_type, error_context, short
from lit_llama.storage.files import CONFIG, check_listed, read_json
from lit_llama.storage.integrity import digest

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken
from tokenizers import Tokenizer as HFTokenizer

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # texts come one by one; records are tokenised by processes of ours

FILE_NAMES = ("tokenizer.model", "tokenizer.json")
CONFIG_NAME, ENDS_NAME = "tokenizer_config.json", "generation_config.json"
BESIDE = (CONFIG_NAME, "special_tokens_map.json", "added_tokens.json", ENDS_NAME)  # in Hugging Face's folders
SPECIAL = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "pad", "sep", "cls", "mask"))
EOS_TOKENS = ("</s>", "<|im_end|>", "<|end_of_text|>", "<|endoftext|>")  # of a tokenizer.json, if no file says
FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")  # of an added token
CONTROL, USER_DEFINED = 3, 4  # SentencePiece's types: no text becomes the one, the other is found before anything else
LIKE_CONTROL = re.compile(r"<\|[^<>\s]+\|>|<[a-z_/]+>|\[[A-Z_/]+\]")  # <|eot_id|>, <end_of_turn>, [INST]
ALWAYS_CONTROL = [f"<|{name}|>" for name in ("im_start", "im_end", "start_header_id", "end_header_id", "eot_id")]


class Tokenizer:
    """Text to token ids and back, with the beginning and end of sequence as the model itself uses them.

    Attributes:
        vocab_size: one more than the largest token id.
        bos_id: the id that begins plain text, or None for a model that was trained without one.
        eos_id: the id that ends a response.
        end_ids: all ids that end a response: the eos, and every eos_token_id that the model's own files name.
        names: texts of tokens by the names that chat templates have for them: "eos_token", "bos_token" (which plain
            text may begin without) and others.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        for file in (path, *map(path.with_name, BESIDE)):
            if file.is_file():
                check_listed(file)
        self._sp, self._hf = load(path)
        with error_context(path.with_name(CONFIG_NAME), "copy it again"):
            try:
                fields = self._read_fields()
                self.names = {name: text_of(fields[name]) for name in SPECIAL if fields.get(name)}
                for name, text in self.names.items():
                    check_type(name, text, str)
                self._whole = self._add(fields.get("added_tokens_decoder") or {})
            except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:  # of wrong types
                raise UserError(f"it, or a file beside it, does not describe tokens ({short(str(error))})") from None
        if self._sp:
            own = {"bos_token": self._sp.bos_id(), "eos_token": self._sp.eos_id()}
            self.names = {name: self.token(i) for name, i in own.items() if i >= 0} | self.names
            self.vocab_size, self._first_space = self._sp.vocab_size(), False
            begins = fields.get("add_bos_token") is not False
            self.bos_id = self._id(self.names.get("bos_token", "")) if begins else None
        else:
            self._set_up_hf()
        eos = self.names.get("eos_token")
        found = [token_id for token_id in map(self._id, (eos,) if eos else EOS_TOKENS) if token_id is not None]
        if not found:
            raise UserError(f"{path} has no end-of-sequence token (looked for {eos or ', '.join(EOS_TOKENS)})")
        self.eos_id = found[0]
        own = {"bos_token": self.bos_id, "eos_token": self.eos_id}
        known = {name: text for name, text in self.names.items() if self._id(text) is not None}
        self.names = {name: self.token(i) for name, i in own.items() if i is not None} | known
        ends = [self._read(name).get("eos_token_id") for name in (ENDS_NAME, CONFIG)]
        ends = [i for end in ends for i in (end if isinstance(end, list) else [end]) if type(i) is int]
        self.end_ids = frozenset({self.eos_id, *(i for i in ends if 0 <= i < self.vocab_size)})

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        """How another process gets the same: what the libraries pickle lacks some of the settings above."""
        return type(self), (self.path,)

    def _read(self, name: str) -> dict[str, Any]:
        file = self.path.with_name(name)
        return read_json(file) if file.is_file() else {}

    def _read_fields(self) -> dict[str, Any]:
        """tokenizer_config.json; where it does not list the added tokens, two older files go before, as elsewhere."""
        fields, older, numbers, _ = map(self._read, BESIDE)
        if "added_tokens_decoder" not in fields:
            fields |= {name: value for name, value in older.items() if value}  # the very first are empty
            more = fields.get("additional_special_tokens") or ()
            special = [*map(text_of, map(fields.get, SPECIAL)), *map(text_of, more)]
            fields["added_tokens_decoder"] = {
                i: {"content": text, "special": text in special, "normalized": text not in special}
                for text, i in numbers.items()
            }
        return fields

    def _add(self, listed: dict[str, Any]) -> bytes | None:
        """Add tokens, by their ids; returns the file with those that it lacks, if it lacks any."""
        numbered = {
            int(i): AddedToken(token["content"], **{flag: bool(token.get(flag)) for flag in FLAGS})
            for i, token in listed.items()
        }
        tokens = [numbered[i] for i in sorted(numbered)]
        new = [token for token in tokens if self._id(token.content) is None]
        if self._sp and new:
            pieces = [piece(token.content, CONTROL if token.special else USER_DEFINED) for token in new]
            self._sp = SentencePieceProcessor(model_proto=b"".join([self._sp.serialized_model_proto(), *pieces]))
        elif self._hf:
            self._hf.add_tokens(tokens)  # of those that it has, a flag may differ
        for i, token in numbered.items():
            if (ours := self._id(token.content)) != i:
                raise UserError(f"{short(token.content)} is number {i} there, and {ours} in {self.path.name}")
        if not new:
            return None
        return self._sp.serialized_model_proto() if self._sp else self._hf.to_str().encode()

    def _set_up_hf(self) -> None:
        self._hf.no_truncation()
        self._hf.no_padding()
        self._hf.encode_special_tokens = True  # text is text: what users write never becomes a control token
        self._first_space = has_first_space(self._hf)
        self.vocab_size = max([self._hf.get_vocab_size(), *(i + 1 for i in self.added)])  # there may be gaps
        text, whole = (self._hf.encode("a", add_special_tokens=special).ids for special in (False, True))
        self.bos_id = None if whole[: len(text)] == text else whole[0]  # what its own post-processor puts in front

    def _id(self, text: str) -> int | None:
        """The id of a token by its name, if there is one."""
        if self._sp is None:
            return self._hf.token_to_id(text)
        token_id = self._sp.piece_to_id(text)
        return token_id if self._sp.id_to_piece(token_id) == text else None

    def encode(self, text: str, bos: bool = True, eos: bool = False, within: bool = False) -> list[int]:
        """Token ids of `text`; `bos` puts the model's bos in front, if it has one, `eos` its eos at the end.

        With `within`, it follows a control token: some tokenizers put a space only before the beginning of a text.
        """
        if self._first_space:
            self._hf.pre_tokenizer.prepend_scheme = "never" if within else "first"
        try:
            ids = (
                self._sp.encode(text)
                if self._sp
                else self._hf.encode_batch_fast([text], add_special_tokens=False)[0].ids
            )
        except (UnicodeEncodeError, TypeError):  # half of a pair of UTF-16, or a byte of the command line
            raise UserError(f"a text has a character that is not valid Unicode ({short(text)}); remove it") from None
        if bos and self.bos_id is not None:
            ids = [self.bos_id, *ids]
        return [*ids, self.eos_id] if eos else ids

    @cached_property
    def added(self) -> dict[int, AddedToken]:
        """The tokens that are not pieces of text, by their ids. A special one is what no text becomes."""
        if self._hf:
            return self._hf.get_added_tokens_decoder()
        tokens = (AddedToken(self.token(i), special=self._sp.is_control(i)) for i in range(self._sp.vocab_size()))
        return {i: token for i, token in enumerate(tokens) if is_control(token)}

    @cached_property
    def controls(self) -> dict[str, int]:
        """The ids of the control tokens, which only a template's own words become, by their names."""
        return {token.content: i for i, token in self.added.items() if is_control(token)}

    @cached_property
    def control_pattern(self) -> str:
        """Finds control tokens in a template's own words, with the space that some of them swallow."""
        patterns = {name: re.escape(name) for name in ALWAYS_CONTROL}
        for token in map(self.added.__getitem__, self.controls.values()):
            left, right = r"\s*" * token.lstrip, r"\s*" * token.rstrip
            patterns[token.content] = f"{left}{re.escape(token.content)}{right}"
        longest_first = sorted(patterns, key=len, reverse=True)
        return f"(?:{'|'.join(map(patterns.__getitem__, longest_first))})"

    def control_id(self, name: str) -> int:
        if name not in self.controls:
            remedy = "choose a --prompt_style without it, such as alpaca, or add it (howto/finetune_lora.md)"
            raise UserError(f"{self.path} has no token {name}; {remedy}")
        return self.controls[name]

    def token(self, token_id: int) -> str:
        """The name of a token: for a control token, what a template calls it."""
        return self._sp.id_to_piece(token_id) if self._sp else str(self._hf.id_to_token(token_id))

    def decode(self, ids: list[int]) -> str:
        """The text of token ids; without bos and eos."""
        ids = [i for i in ids if i < self.vocab_size]  # a model may have more rows than the tokenizer has tokens
        return self._sp.decode(ids) if self._sp else self._hf.decode(ids)

    def show(self, ids: list[int]) -> str:
        """The text of token ids, control tokens included."""
        if self._sp is None:
            return self._hf.decode(ids, skip_special_tokens=False)
        text = ""
        for control, run in groupby((i for i in ids if i < self.vocab_size), self._sp.is_control):
            if control:
                text += "".join(map(self._sp.id_to_piece, run))
            else:
                before = "" if text else "a"  # in the middle of a text, the first token keeps its space
                text += self._sp.decode([*self._sp.encode(before), *run])[len(before) :]
        return text

    def stream(self, ids: Iterable[int], after: list[int] | None = None) -> Iterator[str]:
        """The text of token ids as they come, in pieces of whole characters; `after` are ids whose text they continue.

        A character of several bytes may be split over tokens; it is held back until it is whole. Each piece is decoded
        with the piece before it, since the first token of a text loses its leading space.
        """
        before, pending, piece = list(after or []), [], ""
        for token_id in ids:
            pending.append(token_id)
            piece = self.decode(before + pending)[len(self.decode(before)) :]
            if piece and not piece.endswith("\ufffd"):
                yield piece
                before, pending, piece = pending, [], ""
        last = pending[-3:]  # U+FFFD has three bytes
        if last and self.encode(piece, bos=False)[-len(last) :] == last:  # it is meant, not a part of another
            yield piece

    def files(self) -> dict[str, bytes]:
        """The files by which it is read again, under the names by which they are found next to a model."""
        own = self._whole or self.path.read_bytes()
        paths = {name: self.path.with_name(name) for name in BESIDE[:3]}
        files = {name: path.read_bytes() for name, path in paths.items() if path.is_file()}
        ends = {ENDS_NAME: json.dumps({"eos_token_id": sorted(self.end_ids)}).encode()} if len(self.end_ids) > 1 else {}
        return {"tokenizer.model" if self._sp else "tokenizer.json": own, **files, **ends}

    def check_fits(self, n_rows: int) -> None:
        """Raise a UserError if a model of so many rows lacks a token that is used.

        A pad token, or another that no text becomes, may be missing there.
        """
        missing = {*range(n_rows, self.vocab_size)}
        special = {i for i, token in self.added.items() if token.special}
        if missing - special or missing & {self.bos_id, self.eos_id}:
            raise UserError(f"{self.path} has {self.vocab_size} tokens, the model {n_rows}; give its own tokenizer")

    def fingerprint(self) -> str:
        """A sha256 of the tokenizer's file and control tokens, by which prepared data is matched to a model."""
        said = [digest(self.path), self.bos_id, self.eos_id, sorted(self.controls.items()), sorted(self.names.items())]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def load(path: Path) -> tuple[Any, Any]:
    """SentencePiece's object, or that of Hugging Face's library."""
    try:
        if path.suffix == ".json":
            return None, HFTokenizer.from_file(str(path))
        return SentencePieceProcessor(model_file=str(path)), None
    except BaseException as error:  # both libraries raise bare exceptions; a panic in Rust is not even an Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise UserError(f"{path} is not a tokenizer, or is truncated; copy it again") from None


def is_control(token: AddedToken) -> bool:
    return token.special or LIKE_CONTROL.fullmatch(token.content) is not None


def text_of(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def piece(text: str, kind: int) -> bytes:
    """A piece that is appended to a SentencePiece model, whose parts may follow each other as protobuf's always may."""

    def field(content: bytes) -> bytes:
        n, size = len(content), b""
        while n > 127:
            n, size = n >> 7, size + bytes([n & 127 | 128])
        return b"\n" + size + bytes([n]) + content

    return field(field(text.encode()) + b"\x15" + struct.pack("<f", 0.0) + b"\x18" + bytes([kind]))


def tokenizer_in(folder: Path) -> Path | None:
    """The tokenizer of a folder. Of two files it is the one with more tokens: the other lacks those that were added.

    Else it is tokenizer.model, unless only the other says that no space goes before a text after a control token.
    """
    found = [folder / name for name in FILE_NAMES if (folder / name).is_file()]
    return max(found, key=content) if len(found) > 1 else next(iter(found), None)


def content(path: Path) -> tuple[int, bool]:
    """How many tokens a file has, and whether it puts a space only before the beginning of a text."""
    try:
        sp, hf = load(path)
    except UserError:  # Llama 3's tokenizer.model, in tiktoken's format
        return 0, False
    return (sp.vocab_size(), False) if sp else (hf.get_vocab_size(), has_first_space(hf))


def has_first_space(tokenizer: HFTokenizer) -> bool:
    return getattr(tokenizer.pre_tokenizer, "prepend_scheme", "") == "first"


def find_tokenizer(checkpoint_path: Path, tokenizer_path: Path | None = None) -> Tokenizer:
    """The tokenizer at `tokenizer_path` (a file or a folder), else next to the checkpoint, else one folder up."""
    folders = [tokenizer_path] if tokenizer_path else checkpoint_path.absolute().parents[:2]
    for place in folders:
        if path := place if place.is_file() else tokenizer_in(place):
            return Tokenizer(path)
    if tokenizer_path is None and not checkpoint_path.exists():
        raise UserError(f"{checkpoint_path} does not exist; name a model, or get one: see howto/download_weights.md")
    where = tokenizer_path or checkpoint_path.parent
    raise UserError(f"no {' or '.join(FILE_NAMES)} in {where}; copy the model's there, or name it by --tokenizer_path")
