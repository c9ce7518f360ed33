"""Instruction records: read, tokenised once into a folder, and drawn from it in batches of similar length.

A prepared folder holds for each split flat arrays (`train_tokens.npy`, `train_offsets.npy`, `train_prompt_lengths.npy`)
and one `meta.json`. Record i is tokens[offsets[i]:offsets[i + 1]]: its prompt, then its response, then the end of
sequence. Length limit and prompt masking are choices of the training, so changing them needs no new preparation.
"""

import hashlib
import io
import json
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple
from urllib.request import urlopen

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lit_llama.checkpoint import write_file
from lit_llama.cli import UserError
from lit_llama.prompt import format_prompt
from lit_llama.tokenizer import Tokenizer

Record = dict[str, str]  # "instruction", "input" (may be empty), "output"
ARRAYS = ("tokens", "offsets", "prompt_lengths")


def download(url: str, path: Path) -> None:
    """Fetch `url` into `path` unless it is there already."""
    if path.is_file():
        return
    try:
        with urlopen(url, timeout=60) as response:
            content = response.read()
    except (OSError, HTTPException) as error:
        raise UserError(f"could not download {url} ({error}); fetch it by other means and pass --data_file") from None
    write_file(path, content)


def read_records(path: Path, keys: Record | None = None) -> list[Record]:
    """The records of a JSON list or of a JSONL file, each with "instruction", "input" and "output".

    Args:
        keys: what those three are called in the file, where it is not those names; only the input may be missing.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    try:
        text = path.read_text(encoding="utf-8")
        rows = json.loads(text)
    except UnicodeDecodeError:
        raise UserError(f"{path} is not encoded in UTF-8; convert it") from None
    except ValueError as error:
        rows = []
        for number, line in enumerate(text.split("\n"), 1):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except ValueError:
                what = f"line {number} is no JSON" if rows else str(error)
                raise UserError(f"{path} is neither a JSON list nor JSON lines: {what}") from None
    records = []
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
        record = {"input": ""}
        for name in ("instruction", "input", "output"):
            key = (keys or {}).get(name, name)
            value = row.get(key, record.get(name)) if isinstance(row, dict) else None
            if not isinstance(value, str) or (name != "input" and not value.strip()):
                raise UserError(
                    f"{path}, record {number}: {key!r} is missing, empty or no text; mend or remove the record"
                )
            record[name] = value
        records.append(record)
    return records


def split_records(records: list[Record], n_validation: int | None, seed: int) -> dict[str, list[Record]]:
    """Shuffle and set `n_validation` records apart (None: 2,000, or a tenth if that is less)."""
    if n_validation is None:
        n_validation = min(2000, len(records) // 10)
    if not 0 <= n_validation < len(records):
        raise UserError(f"cannot set {n_validation} of {len(records)} records apart for validation")
    order = np.random.default_rng(seed).permutation(len(records))
    shuffled = [records[i] for i in order]
    return {"train": shuffled[n_validation:], "validation": shuffled[:n_validation]}


def prepare(
    data_dir: Path,
    splits: dict[str, list[Record]],
    tokenizer: Tokenizer,
    sources: list[Path],
    prompt_style: str,
    seed: int | None = None,
) -> None:
    """Tokenise the records of all splits into `data_dir`; `meta.json`, which makes them valid, is written last."""
    if not splits["train"]:
        raise UserError(f"no training records in {sources[0]}")
    (data_dir / "meta.json").unlink(missing_ok=True)
    meta = {
        "sources": [{"path": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()} for path in sources],
        "tokenizer": tokenizer.fingerprint(),
        "prompt_style": prompt_style,
        "split_seed": seed,
        "records": {name: len(records) for name, records in splits.items()},
    }
    for name, records in splits.items():
        tokens: list[int] = []
        offsets, prompt_lengths = [0], []
        for record in tqdm(records, desc=f"Tokenising {name}", unit="record"):
            prompt = tokenizer.encode(format_prompt(prompt_style, record["instruction"], record["input"]))
            tokens += prompt + tokenizer.encode(record["output"], bos=False, eos=True)
            offsets.append(len(tokens))
            prompt_lengths.append(len(prompt))
        columns = (np.array(tokens, np.int32), np.array(offsets, np.int64), np.array(prompt_lengths, np.int32))
        for array_name, column in zip(ARRAYS, columns, strict=True):
            buffer = io.BytesIO()
            np.save(buffer, column, allow_pickle=False)
            write_file(data_dir / f"{name}_{array_name}.npy", buffer.getvalue())
    write_file(data_dir / "meta.json", json.dumps(meta, indent=2))


class Batch(NamedTuple):
    """Records padded to the longest. Only `select`, the tokens before a target, need logits; N of them in the batch."""

    input_ids: Tensor  # (B, T)
    select: Tensor  # (N,) indices into the B * T tokens
    targets: Tensor  # (N,)


class Dataset:
    """One split of a prepared folder, as one training run sees it.

    Records are cut at `block_size` tokens (a response that was cut has no end of sequence); one whose prompt leaves no
    room for a response is dropped and counted in `n_dropped`.
    """

    def __init__(
        self, data_dir: Path, split: str, block_size: int, mask_prompt: bool = True, limit: int | None = None
    ) -> None:
        self.data_dir, self.block_size = data_dir, block_size
        try:
            self.meta = json.loads((data_dir / "meta.json").read_text(encoding="utf-8"))
            self.tokens, self.offsets, prompt_lengths = (
                np.load(data_dir / f"{split}_{name}.npy", mmap_mode="r", allow_pickle=False) for name in ARRAYS
            )
        except (OSError, ValueError) as error:
            raise UserError(f"{data_dir} holds no prepared data ({error}); run one of scripts/prepare_*.py") from None
        origin = {name: self.meta[name] for name in ("sources", "tokenizer", "prompt_style", "split_seed", "records")}
        self.fingerprint = hashlib.sha256(json.dumps(origin).encode()).hexdigest()[:16]
        lengths = np.minimum(np.diff(self.offsets), block_size)
        masked = prompt_lengths if mask_prompt else np.ones_like(prompt_lengths)
        self.index = np.flatnonzero(lengths > prompt_lengths)[:limit]  # places of the records in the files
        self.n_dropped = int((lengths <= prompt_lengths).sum())
        self.lengths = lengths[self.index]
        self.first_targets = masked[self.index]

    def __len__(self) -> int:
        return len(self.index)

    def n_tokens(self, records: Sequence[int]) -> int:
        """How many tokens these records have."""
        return int(self.lengths[records].sum())

    def n_targets(self, records: Sequence[int]) -> int:
        """How many tokens of these records are trained on."""
        return int((self.lengths[records] - self.first_targets[records]).sum())

    def prompt(self, record: int) -> list[int]:
        """The tokens of a record that are not trained on: its prompt, unless mask_prompt is False."""
        start = self.offsets[self.index[record]]
        return self.tokens[start : start + self.first_targets[record]].tolist()

    def batch(self, records: Sequence[int]) -> Batch:
        """These records, padded on the right; no records make a batch of one token without targets."""
        width = int(max(self.lengths[records], default=2)) - 1
        input_ids = torch.zeros(max(len(records), 1), width, dtype=torch.int64)
        select, targets = [], []
        for row, i in enumerate(records):
            start, length, first = self.offsets[self.index[i]], self.lengths[i], self.first_targets[i]
            tokens = torch.from_numpy(self.tokens[start : start + length].astype(np.int64))
            input_ids[row, : length - 1] = tokens[:-1]
            select.append(torch.arange(first - 1, length - 1) + row * width)
            targets.append(tokens[first:])
        empty = torch.empty(0, dtype=torch.int64)
        return Batch(input_ids, torch.cat([empty, *select]), torch.cat([empty, *targets]))


class BatchSchedule:
    """Which records each optimizer step of a training run sees: a pure function of the seed and the step.

    Every epoch holds each record once. Records are shuffled, sorted by length within windows and cut into
    micro-batches, so that little of a micro-batch is padding; the micro-batches are shuffled again, but for the
    longest, which comes first so that a shortage of memory shows at once. Each step takes `batch_size` records, over
    all devices.
    """

    window = 64  # micro-batches that are sorted together

    def __init__(self, lengths: np.ndarray, batch_size: int, micro_batch_size: int, seed: int) -> None:
        if not len(lengths):
            raise UserError("no records to train on, or none with room for a response in --block_size tokens")
        if batch_size % micro_batch_size:
            raise UserError(f"--batch_size {batch_size} is no multiple of --micro_batch_size {micro_batch_size}")
        self.lengths, self.micro_batch_size, self.seed = lengths, micro_batch_size, seed
        self.accumulation = batch_size // micro_batch_size  # micro-batches a step
        n_micro_batches = -(-len(lengths) // micro_batch_size)
        self.steps_per_epoch = -(-n_micro_batches // self.accumulation)
        self._epoch, self._micro_batches = -1, []

    @classmethod
    def of_one_step(cls, lengths: np.ndarray, micro_batch_size: int) -> "BatchSchedule":
        """All records in a single step, for what is evaluated and not trained on."""
        return cls(lengths, -(-len(lengths) // micro_batch_size) * micro_batch_size, micro_batch_size, seed=0)

    def __getitem__(self, step: int) -> list[np.ndarray]:
        """The micro-batches of an optimizer step, counted from 0 over all epochs: each an array of record numbers."""
        epoch, step = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._micro_batches = epoch, self._shuffle(epoch)
        return self._micro_batches[step * self.accumulation : (step + 1) * self.accumulation]

    def share(self, step: int, rank: int, world_size: int) -> list[np.ndarray]:
        """The micro-batches that one of several processes computes; all get as many, if need be an empty one."""
        micro_batches = self[step]
        empty = [np.empty(0, np.int64)] * (-len(micro_batches) % world_size)
        return (micro_batches + empty)[rank::world_size]

    def _shuffle(self, epoch: int) -> list[np.ndarray]:
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(len(self.lengths))
        size = self.micro_batch_size
        micro_batches = []
        for start in range(0, len(order), self.window * size):
            records = order[start : start + self.window * size]
            records = records[np.argsort(-self.lengths[records], kind="stable")]
            micro_batches += [records[i : i + size] for i in range(0, len(records), size)]
        rng.shuffle(micro_batches)  # type: ignore[arg-type]
        longest = max(range(len(micro_batches)), key=lambda i: self.lengths[micro_batches[i]].sum())
        micro_batches.insert(0, micro_batches.pop(longest))
        return micro_batches
