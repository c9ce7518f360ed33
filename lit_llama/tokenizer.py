"""One class for SentencePiece (`tokenizer.model`) and Hugging Face (`tokenizer.json`) tokenizers."""

import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

from lit_llama.errors import UserError, short
from lit_llama.storage.files import check_listed, read_json
from lit_llama.storage.integrity import digest

from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer as HFTokenizer

FILE_NAMES = ("tokenizer.model", "tokenizer.json")
CONFIG_NAME = "tokenizer_config.json"  # says which token is the eos of a tokenizer.json
LIKE_CONTROL = re.compile(r"<\|[^<>\s]+\|>|<[a-z_/]+>|\[[A-Z_/]+\]")  # <|eot_id|>, <end_of_turn>, [INST]
ALWAYS_CONTROL = [f"<|{name}|>" for name in ("im_start", "im_end", "start_header_id", "end_header_id", "eot_id")]
EOS_TOKENS = ("</s>", "<|im_end|>", "<|end_of_text|>", "<|endoftext|>")  # if tokenizer_config.json does not say


class Tokenizer:
    """Text to token ids and back, with the beginning and end of sequence as the model itself uses them.

    Attributes:
        vocab_size: number of token ids.
        bos_id: the id that starts every sequence, or None for a model that was trained without one.
        eos_id: the id that ends a response.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        for file in (path, path.with_name(CONFIG_NAME)):
            if file.is_file():
                check_listed(file)
        try:
            if path.suffix == ".json":
                self._hf = HFTokenizer.from_file(str(path))
                self._hf.no_truncation()
                self._hf.no_padding()
                self._hf.encode_special_tokens = True  # text is text: what users write never becomes a control token
                self._sp = None
                self._first_space = getattr(self._hf.pre_tokenizer, "prepend_scheme", "") == "first"
            else:
                self._sp, self._first_space = SentencePieceProcessor(model_file=str(path)), False
        except Exception:  # both libraries raise bare exceptions
            raise UserError(f"{path} is not a tokenizer, or is truncated; copy it again") from None
        if self._sp:
            self.vocab_size, self.eos_id = self._sp.vocab_size(), self._sp.eos_id()
            self.bos_id = self._sp.bos_id() if self._sp.bos_id() >= 0 else None
        else:
            self.vocab_size = self._hf.get_vocab_size()
            self.bos_id = next(iter(self._hf.encode("").ids), None)  # what its own post-processor adds
            self.eos_id = self._find_eos()

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        """How another process gets the same: what the libraries pickle lacks some of the settings above."""
        return type(self), (self.path,)

    def _find_eos(self) -> int:
        config = self.path.with_name(CONFIG_NAME)
        token = content_of(read_json(config).get("eos_token") if config.is_file() else None)
        if not isinstance(token, str | None):
            raise UserError(f"{config} is not valid: eos_token is {short(token)}, expected text; copy it again")
        names = (token,) if token else EOS_TOKENS
        for name in names:
            if (token_id := self._hf.token_to_id(name)) is not None:
                return token_id
        raise UserError(f"{self.path} has no end-of-sequence token (looked for {', '.join(names)})")

    def encode(self, text: str, bos: bool = True, eos: bool = False, within: bool = False) -> list[int]:
        """Token ids of `text`; `bos` puts the model's bos in front, if it has one, `eos` its eos at the end.

        With `within`, it follows a control token: some tokenizers put a space only before the beginning of a text.
        """
        if self._first_space:
            self._hf.pre_tokenizer.prepend_scheme = "never" if within else "first"
        try:
            ids = self._sp.encode(text) if self._sp else self._hf.encode(text, add_special_tokens=False).ids
        except (UnicodeEncodeError, TypeError):  # half of a pair of UTF-16, or a byte of the command line
            raise UserError(f"a text has a character that is not valid Unicode ({short(text)}); remove it") from None
        if bos and self.bos_id is not None:
            ids = [self.bos_id, *ids]
        return [*ids, self.eos_id] if eos else ids

    @cached_property
    def names(self) -> dict[str, str]:
        """What templates call bos_token, eos_token and the like."""
        config = self.path.with_name(CONFIG_NAME)
        fields = read_json(config) if config.is_file() else {}
        given = {name: content_of(fields[name]) for name in fields if name.endswith("_token")}
        ours = {
            "bos_token": "" if self.bos_id is None else self.token(self.bos_id),
            "eos_token": self.token(self.eos_id),
        }
        return ours | {name: token for name, token in given.items() if isinstance(token, str)}

    @cached_property
    def controls(self) -> dict[str, int]:
        """The ids of the control tokens, which only a template's own words become, by their names."""
        if self._sp:
            pieces = {self._sp.id_to_piece(i): i for i in range(self.vocab_size)}
            return {name: i for name, i in pieces.items() if self._sp.is_control(i) or LIKE_CONTROL.fullmatch(name)}
        added = self._hf.get_added_tokens_decoder()
        return {t.content: i for i, t in added.items() if t.special or LIKE_CONTROL.fullmatch(t.content)}

    @cached_property
    def control_pattern(self) -> str:
        """Finds control tokens in a template's own words, with the space that some of them swallow."""
        added = {} if self._sp else {token.content: token for token in self._hf.get_added_tokens_decoder().values()}

        def pattern(name: str) -> str:
            left, right = (r"\s*" * getattr(added.get(name), side, False) for side in ("lstrip", "rstrip"))
            return left + re.escape(name) + right

        names = sorted({*self.controls, *ALWAYS_CONTROL}, key=len, reverse=True)
        return f"(?:{'|'.join(map(pattern, names))})"

    def control_id(self, name: str) -> int:
        if name not in self.controls:
            raise UserError(
                f"{self.path} has no token {name}; choose the --prompt_style that its model was trained with"
            )
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
        return "".join(self._sp.id_to_piece(i) if self._sp.is_control(i) else self._sp.decode([i]) for i in ids)

    def stream(self, ids: Iterable[int], after: list[int] | None = None) -> Iterator[str]:
        """The text of token ids as they come, in pieces of whole characters; `after` are ids whose text they continue.

        A character of several bytes may be split over tokens; it is held back until it is whole. Each piece is decoded
        with the piece before it, since the first token of a text loses its leading space.
        """
        before, pending = list(after or []), []
        for token_id in ids:
            pending.append(token_id)
            piece = self.decode(before + pending)[len(self.decode(before)) :]
            if piece and not piece.endswith("\ufffd"):
                yield piece
                before, pending = pending, []

    def files(self) -> dict[str, bytes]:
        """The files that it was read from, under the names by which they are found next to a model."""
        own_name = "tokenizer.model" if self._sp else "tokenizer.json"
        paths = {own_name: self.path, CONFIG_NAME: self.path.with_name(CONFIG_NAME)}
        return {name: path.read_bytes() for name, path in paths.items() if path.is_file()}

    def check_fits(self, vocab_size: int) -> None:
        """Raise a UserError if a model of `vocab_size` rows does not know all of its tokens."""
        if self.vocab_size > vocab_size:
            raise UserError(f"{self.path} has {self.vocab_size} tokens, the model {vocab_size}; give its own tokenizer")

    def fingerprint(self) -> str:
        """sha256 of the tokenizer's file, by which prepared data is matched to a model."""
        return digest(self.path)


def content_of(token: object) -> object:
    """What tokenizer_config.json says of a token, which may be an object with more about it."""
    return token.get("content", token) if isinstance(token, dict) else token


def find_tokenizer(checkpoint_path: Path, tokenizer_path: Path | None = None) -> Tokenizer:
    """The tokenizer at `tokenizer_path` (a file or a folder), else next to the checkpoint, else one folder up."""
    if tokenizer_path is None:
        places = [folder / name for folder in checkpoint_path.absolute().parents[:2] for name in FILE_NAMES]
    else:
        places = [tokenizer_path, *(tokenizer_path / name for name in FILE_NAMES)]
    for place in places:
        if place.is_file():
            return Tokenizer(place)
    if tokenizer_path is None and not checkpoint_path.exists():
        raise UserError(f"{checkpoint_path} does not exist; name a model, or get one: see howto/download_weights.md")
    where = tokenizer_path or checkpoint_path.parent
    raise UserError(f"no {' or '.join(FILE_NAMES)} in {where}; copy the model's there, or name it by --tokenizer_path")
