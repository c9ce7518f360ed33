"""Prepared folders: records, tokenised once.

A folder holds for each split flat arrays (`train_tokens.npy`, `train_offsets.npy`, `train_spans.npy`) and one
`meta.json`. Record i is tokens[offsets[i]:offsets[i + 1]]. Of all tokens, those in tokens[start:end] for each of the
spans (start, end) are trained on. `lit_llama/data.py` draws batches from it.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from lit_llama import files
from lit_llama.arrays import ArrayFile, rises
from lit_llama.checks import check_types
from lit_llama.encoder import Encoder, Spools, count_records, tokenised
from lit_llama.errors import UserError
from lit_llama.integrity import digest
from lit_llama.progress import progress, say
from lit_llama.prompt import TEMPLATES
from lit_llama.records import split_records

ARRAYS = ("tokens", "offsets", "spans")
DATA_FILES = r"(meta\.json|(train|validation)_(tokens|offsets|spans|prompt_lengths)\.npy)(\.part)?"
META = {"sources": list, "tokenizer": str, "prompt_style": str, "records": Mapping, "split_seed": int | None}


def prepare(
    data_dir: Path,
    sources: Mapping[str, Path],
    encoder: Encoder,
    split_seed: int | None = None,
    n_validation: int | None = None,
    num_workers: int = 1,
) -> None:
    """Tokenise records into `data_dir`, whose earlier arrays are replaced as a whole.

    Args:
        sources: what the records of each split are read from.
        split_seed: if given, the records of "train" are shuffled, and some of them held out as "validation".
        n_validation: how many; None: 2,000, or a tenth if that is less.
        num_workers: processes that tokenise; the result does not depend on it.
    """
    check_not_replaced(sources, data_dir)
    counts = {name: count_records(source, encoder.fields, num_workers) for name, source in sources.items()}
    if not counts["train"]:
        raise UserError(f"no training records in {sources['train']}")
    if split_seed is None:
        splits = {name: {name: np.arange(n)} for name, n in counts.items()}
    else:
        splits = {"train": split_records(counts["train"], n_validation, split_seed)}
    n_records = {split: len(records) for parts in splits.values() for split, records in parts.items()}
    checksums, documents = {}, {}
    with files.replacing_folder(data_dir, DATA_FILES) as part:
        for name, source in sources.items():
            with tokenised(source, counts[name], encoder, part, num_workers) as spools:
                for split, records in splits[name].items():
                    checksums |= write_split(part, split, spools, records)
                    documents[split] = bool(spools.documents[records].all())
        meta = {
            "sources": [{"path": str(path), "sha256": identify(path, checksums)} for path in sources.values()],
            "tokenizer": encoder.tokenizer.fingerprint(),
            "prompt_style": encoder.prompt_style,
            "documents": documents["train"],
            "split_seed": split_seed,
            "records": n_records,
        }
        files.write_file(part / "meta.json", json.dumps({**meta, "sha256": checksums}, indent=2))
    warn_if_few(n_records.get("validation", 0))


def check_not_replaced(sources: Mapping[str, Path], data_dir: Path) -> None:
    for source in sources.values():
        if source.resolve().parent == data_dir.resolve() and re.fullmatch(DATA_FILES, source.name):
            raise UserError(f"{source} would be replaced; give another --data_dir")


def warn_if_few(n: int) -> None:
    if n < 2:
        what = "one record to validate on: its loss says little" if n else "no records to validate on"
        say(f"warning: {what}; hold out more, or give a --validation_file")


def identify(source: Path, checksums: Mapping[str, str]) -> str:
    """sha256 of a file; of a data set that is not one file, of what was made of it."""
    return digest(source) if source.is_file() else hashlib.sha256(json.dumps(checksums).encode()).hexdigest()


def write_split(folder: Path, split: str, spools: Spools, records: np.ndarray) -> dict[str, str]:
    """Write the arrays of a split that has these records in this order; their sha256s by their names."""
    n_tokens, n_edges = (spool.total(records) for spool in (spools.tokens, spools.edges))

    def array_file(name: str, kind: type, *shape: int) -> closing[ArrayFile]:
        return closing(ArrayFile(folder / f"{split}_{name}.npy", kind, shape))

    with (
        array_file("tokens", np.int32, n_tokens) as tokens,
        array_file("offsets", np.int64, len(records) + 1) as offsets,
        array_file("spans", np.int64, n_edges // 2, 2) as spans,
    ):
        end = 0
        offsets.write(np.zeros(1))
        for block in progress(spools.tokens.blocks(records), f"Writing {split}", "record", n=len(records), count=len):
            lengths = spools.tokens.lengths(block)
            ends = end + np.cumsum(lengths)
            tokens.write(spools.tokens.read(block))
            offsets.write(ends)
            spans.write(spools.edges.read(block) + np.repeat(ends - lengths, spools.edges.lengths(block)))
            end = ends[-1]
    return {f"{split}_{name}": a.sha256.hexdigest() for name, a in zip(ARRAYS, (tokens, offsets, spans), strict=True)}


def read_split(data_dir: Path, split: str) -> tuple[dict[str, Any], list[np.ndarray]]:
    """meta.json, and the arrays of a split in the order of ARRAYS, mapped from their files after a check of those."""
    try:
        meta = files.read_json(data_dir / "meta.json")
        check_types(meta, META, {"sha256": Mapping, "documents": bool, "checksum": str})
        if (data_dir / f"{split}_prompt_lengths.npy").is_file():
            raise UserError("it is of version 1.0")
        paths = [data_dir / f"{split}_{name}.npy" for name in ARRAYS]
        arrays = [np.load(path, mmap_mode="r", allow_pickle=False) for path in paths]
    except Exception as error:  # NumPy raises many kinds
        reason = " ".join(str(error).split())
        raise UserError(f"{data_dir} holds no prepared data ({reason}); run one of scripts/prepare_*.py") from None
    wrong = [] if meta["prompt_style"] in TEMPLATES else ["the prompt_style of meta.json"]
    if not files.check_all:
        say(f"{paths[0]} was read without comparing it with its checksum")
    for path, array in zip(paths, arrays, strict=True):
        expected = meta.get("sha256", {}).get(path.stem)
        is_checked = expected and (files.check_all or not path.stem.endswith("tokens"))
        if is_checked and digest(path, array.offset + array.nbytes, array.offset) != expected:
            wrong.append(path.name)
    wrong += [f"{split}_{name}.npy" for name in impossible(*arrays)]
    if wrong:
        raise UserError(f"{data_dir} is damaged: {wrong[0]} does not match the rest; prepare the data again")
    return meta, arrays


def impossible(tokens: np.ndarray, offsets: np.ndarray, spans: np.ndarray) -> Iterator[str]:
    """The names of arrays that cannot be right, whatever the records were."""
    kinds = (np.int32, 1, ()), (np.int64, 1, ()), (np.int64, 2, (2,))
    for name, array, kind in zip(ARRAYS, (tokens, offsets, spans), kinds, strict=True):
        if (array.dtype, array.ndim, array.shape[1:]) != kind or not array.flags.c_contiguous:
            yield name
            return
    if len(offsets) < 1 or (offsets[0], offsets[-1]) != (0, len(tokens)) or not rises(offsets, 1):
        yield "offsets"
    edges = spans.reshape(-1)  # starts and ends in turn
    if len(edges) and (edges[0] < 0 or edges[-1] > len(tokens) or not rises(edges, 0)):
        yield "spans"
