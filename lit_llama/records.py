"""Instruction records: read from JSON, split, and tokenised once into a folder.

A prepared folder holds for each split flat arrays (`train_tokens.npy`, `train_offsets.npy`, `train_prompt_lengths.npy`)
and one `meta.json`. Record i is tokens[offsets[i]:offsets[i + 1]]: its prompt, then its response, then the end of
sequence. `lit_llama/data.py` draws batches from it.
"""

import hashlib
import io
import re
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

import numpy as np
from tqdm import tqdm

from lit_llama.errors import UserError
from lit_llama.files import parse_json, read_text, replacing_folder, write_file
from lit_llama.integrity import sealed
from lit_llama.prompt import PromptStyle, format_prompt
from lit_llama.tokenizer import Tokenizer

Record = dict[str, str]  # "instruction", "input" (may be empty), "output"
ARRAYS = ("tokens", "offsets", "prompt_lengths")
DATA_FILES = rf"(meta\.json|(train|validation)_({'|'.join(ARRAYS)})\.npy)(\.part)?"


def download(url: str, path: Path) -> None:
    """Fetch `url` into `path` unless it is there already."""
    if path.is_file():
        return
    try:
        with urlopen(url, timeout=60) as response:
            content = response.read()
            expected = response.headers.get("Content-Length")
    except (OSError, HTTPException) as error:
        raise UserError(f"could not download {url} ({error}); fetch it by other means and pass --data_file") from None
    if expected and int(expected) != len(content):
        raise UserError(f"the download of {url} broke off after {len(content)} of {expected} bytes; run this again")
    write_file(path, content)


def read_records(path: Path, keys: Record | None = None) -> list[Record]:
    """The records of a JSON list or of a JSONL file, each with "instruction", "input" and "output".

    Args:
        keys: what those three are called in the file, if not by those names; only the input may be missing.
    """
    rows = read_rows(path)
    records = []
    for number, row in enumerate(rows, 1):
        record = {"input": ""}
        for name in ("instruction", "input", "output"):
            key = (keys or {}).get(name, name)
            value = row.get(key, record.get(name)) if isinstance(row, dict) else None
            if not isinstance(value, str) or (name != "input" and not value.strip()):
                raise UserError(
                    f"{path}, record {number}: {key!r} is missing, empty or not text; fix or remove the record"
                )
            record[name] = value
        records.append(record)
    return records


def read_rows(path: Path) -> list[object]:
    """The values of a JSON list, or of the lines of a JSONL file."""
    text = read_text(path)
    try:
        content = parse_json(text)
        return content if isinstance(content, list) else [content]
    except ValueError as error:
        reason = str(error)
    rows: list[object] = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            rows += [parse_json(line)] if line.strip() else []
        except ValueError:
            what = f"line {number} is not valid JSON" if rows else reason
            raise UserError(f"{path} is neither a JSON list nor JSON lines: {what}") from None
    return rows


def split_records(records: list[Record], n_validation: int | None, seed: int) -> dict[str, list[Record]]:
    """Shuffle and hold out `n_validation` records (None: 2,000, or a tenth if that is less)."""
    if n_validation is None:
        n_validation = min(2000, len(records) // 10)
    if not 0 <= n_validation < len(records):
        raise UserError(f"cannot hold out {n_validation} of {len(records)} records for validation")
    order = np.random.default_rng(seed).permutation(len(records))
    shuffled = [records[i] for i in order]
    return {"train": shuffled[n_validation:], "validation": shuffled[:n_validation]}


def prepare(
    data_dir: Path,
    splits: dict[str, list[Record]],
    tokenizer: Tokenizer,
    sources: list[Path],
    prompt_style: PromptStyle,
    seed: int | None = None,
) -> None:
    """Tokenise the records of all splits into `data_dir`, whose earlier arrays are replaced as a whole.

    Args:
        sources: the files that the records were read from.
        seed: of the split, if they were split here.
    """
    if not splits["train"]:
        raise UserError(f"no training records in {sources[0]}")
    for source in sources:
        if source.resolve().parent == data_dir.resolve() and re.fullmatch(DATA_FILES, source.name):
            raise UserError(f"{source} would be replaced; give another --data_dir")
    meta = {
        "sources": [{"path": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()} for path in sources],
        "tokenizer": tokenizer.fingerprint(),
        "prompt_style": prompt_style,
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


def tokenise(
    split: str, records: list[Record], tokenizer: Tokenizer, prompt_style: PromptStyle
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The arrays of a split, in the order of ARRAYS."""
    tokens: list[int] = []
    offsets, prompt_lengths = [0], []
    for record in tqdm(records, desc=f"Tokenising {split}", unit="record"):
        prompt = tokenizer.encode(format_prompt(prompt_style, record["instruction"], record["input"]))
        tokens += prompt + tokenizer.encode(record["output"], bos=False, eos=True)
        offsets.append(len(tokens))
        prompt_lengths.append(len(prompt))
    return np.array(tokens, np.int32), np.array(offsets, np.int64), np.array(prompt_lengths, np.int32)
