"""Prepared folders: records, tokenised once.

A folder holds for each split flat arrays (`train_tokens.npy`, `train_offsets.npy`, `train_spans.npy`) and one
`meta.json`. Record i is tokens[offsets[i]:offsets[i + 1]]. Of all tokens, those in tokens[start:end] for each of the
spans (start, end) are trained on. `lit_llama/data.py` draws batches from it.
"""

import hashlib
import io
import json
import re
from pathlib import Path

import numpy as np

from lit_llama.errors import UserError
from lit_llama.files import replacing_folder, write_file
from lit_llama.integrity import sealed
from lit_llama.progress import progress, say
from lit_llama.prompt import PromptStyle, encode
from lit_llama.records import Conversation
from lit_llama.tokenizer import Tokenizer

ARRAYS = ("tokens", "offsets", "spans")
DATA_FILES = r"(meta\.json|(train|validation)_(tokens|offsets|spans|prompt_lengths)\.npy)(\.part)?"


def prepare(
    data_dir: Path,
    splits: dict[str, list[Conversation]],
    tokenizer: Tokenizer,
    sources: list[Path],
    prompt_style: PromptStyle,
    seed: int | None = None,
) -> None:
    """Tokenise the records of all splits into `data_dir`, whose earlier arrays are replaced as a whole.

    Args:
        sources: what the records were read from.
        seed: of the split, if they were split here.
    """
    if not splits["train"]:
        raise UserError(f"no training records in {sources[0]}")
    for source in sources:
        if source.resolve().parent == data_dir.resolve() and re.fullmatch(DATA_FILES, source.name):
            raise UserError(f"{source} would be replaced; give another --data_dir")
    meta = {
        "sources": [{"path": str(path), "sha256": digest(path, splits)} for path in sources],
        "tokenizer": tokenizer.fingerprint(),
        "prompt_style": prompt_style,
        "documents": all(len(record) == 1 for record in splits["train"]),
        "split_seed": seed,
        "records": {name: len(records) for name, records in splits.items()},
    }
    checksums = {}
    with replacing_folder(data_dir, DATA_FILES) as part:
        for split, records in splits.items():
            for name, array in zip(ARRAYS, tokenise(split, records, tokenizer, prompt_style), strict=True):
                buffer = io.BytesIO()
                np.save(buffer, array, allow_pickle=False)
                write_file(part / f"{split}_{name}.npy", buffer.getvalue())
                checksums[f"{split}_{name}"] = hashlib.sha256(array.data).hexdigest()
        write_file(part / "meta.json", sealed({**meta, "sha256": checksums}))
    if (n := len(splits.get("validation", []))) < 2:
        what = "one record to validate on: its loss says little" if n else "no records to validate on"
        say(f"warning: {what}; hold out more, or give a --validation_file")


def digest(source: Path, splits: dict[str, list[Conversation]]) -> str:
    """sha256 of a file; of a data set that is not one file, of its records."""
    content = source.read_bytes() if source.is_file() else json.dumps(splits).encode()
    return hashlib.sha256(content).hexdigest()


def tokenise(
    split: str, records: list[Conversation], tokenizer: Tokenizer, prompt_style: PromptStyle
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The arrays of a split, in the order of ARRAYS. What comes after a record's last trained token is left out."""
    tokens: list[int] = []
    offsets, spans = [0], []
    for i, record in enumerate(progress(records, f"Tokenising {split}", "record"), 1):
        try:
            ids, trained = encode(prompt_style, record, tokenizer)
        except UserError as error:
            raise UserError(f"record {i} of {split}: {error}") from None
        edges = np.flatnonzero(np.diff(trained, prepend=False, append=False))  # where a span starts or ends
        spans.append(len(tokens) + edges.reshape(-1, 2))
        tokens += ids[: edges[-1]]
        offsets.append(len(tokens))
    all_spans = np.concatenate(spans) if spans else np.empty((0, 2))
    return np.array(tokens, np.int32), np.array(offsets, np.int64), all_spans.astype(np.int64)
