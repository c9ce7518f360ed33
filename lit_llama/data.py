"""Prepared records as a training run sees them: read from their folder, and drawn from it in optimizer steps.

`lit_llama/prepared.py` says what such a folder holds. Length limit and prompt masking are choices of the training, so
changing them needs no new preparation.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lit_llama.errors import UserError
from lit_llama.files import read_json
from lit_llama.integrity import unsealed
from lit_llama.prepared import ARRAYS
from lit_llama.prompt import TEMPLATES, PromptStyle
from lit_llama.schema import check_types

META = {"sources": list, "tokenizer": str, "prompt_style": str, "records": Mapping, "split_seed": int | None}


class Batch(NamedTuple):
    """Records to be computed at once, packed one after the other into a single row. N of their tokens are targets."""

    input_ids: Tensor  # (1, T)
    lengths: list[int] | None  # of the records, T in all
    select: Tensor  # (N,) indices of the tokens before a target, the only ones that need logits
    targets: Tensor  # (N,)


class Dataset:
    """One split of a prepared folder.

    Records are cut at `block_size` tokens (a response that was cut has no end of sequence); one whose prompt leaves no
    room for a response is dropped and counted in `n_dropped`. Documents are cut into blocks, each a record of its own.
    With `mask_prompt` False, all tokens are trained on. `limit` takes the first so many of the records that are left.
    """

    def __init__(
        self, data_dir: Path, split: str, block_size: int, mask_prompt: bool = True, limit: int | None = None
    ) -> None:
        self.data_dir, self.block_size = data_dir, block_size
        try:
            self.meta = unsealed(data_dir / "meta.json", read_json(data_dir / "meta.json"))
            check_types(self.meta, META, {"sha256": Mapping, "documents": bool})
            if (data_dir / f"{split}_prompt_lengths.npy").is_file():
                raise UserError("it is of version 1.0")
            self.tokens, self.offsets, spans = (
                np.load(data_dir / f"{split}_{name}.npy", mmap_mode="r", allow_pickle=False) for name in ARRAYS
            )
        except Exception as error:  # NumPy raises many kinds
            reason = " ".join(str(error).split())
            raise UserError(f"{data_dir} holds no prepared data ({reason}); run one of scripts/prepare_*.py") from None
        self._check(split, spans)
        self.prompt_style: PromptStyle = self.meta["prompt_style"]
        origin = {name: self.meta[name] for name in ("sources", "tokenizer", "prompt_style", "split_seed", "records")}
        self.fingerprint = hashlib.sha256(json.dumps(origin).encode()).hexdigest()[:16]
        starts, ends = self.offsets[:-1], self.offsets[1:]
        if self.meta.get("documents"):
            blocks = [np.arange(*edges, block_size) for edges in zip(starts, ends, strict=True)]
            starts, ends = np.concatenate(blocks), np.repeat(ends, list(map(len, blocks)))
        lengths = np.minimum(ends - starts, block_size)
        self.targets = spans if mask_prompt else np.stack([self.offsets[:-1], self.offsets[1:]], axis=1)
        counts = self._targets_before(starts + lengths) - self._targets_before(starts + 1)  # nothing predicts the first
        self.index = np.flatnonzero(counts)[:limit]  # of the records that are left
        self.n_dropped = int((counts == 0).sum())
        self.n_cut = int((lengths < ends - starts)[self.index].sum()) if not self.meta.get("documents") else 0
        self.starts, self.lengths, self.target_counts = (a[self.index] for a in (starts, lengths, counts))

    def _targets_before(self, places: np.ndarray) -> np.ndarray:
        """How many of all tokens before each of some places in the file are trained on."""
        starts, ends = self.targets.T
        before = np.searchsorted(ends, places, side="right")  # spans that end there or earlier
        whole = np.concatenate([[0], np.cumsum(ends - starts)])[before]
        begun = np.append(starts, np.iinfo(np.int64).max)[before]  # the span that a place may be in
        return whole + np.maximum(places - begun, 0)

    def _check(self, split: str, spans: np.ndarray) -> None:
        """Raise a UserError unless the arrays are those that meta.json was written for."""
        arrays = dict(zip(ARRAYS, (self.tokens, self.offsets, spans), strict=True))
        wrong = [] if self.meta["prompt_style"] in TEMPLATES else ["the prompt_style of meta.json"]
        for name, expected in self.meta.get("sha256", {}).items():
            kind = name.removeprefix(f"{split}_")
            if kind in arrays and hashlib.sha256(arrays[kind].data).hexdigest() != expected:
                wrong.append(f"{name}.npy")
        wrong += [f"{split}_{name}.npy" for name in impossible(self.tokens, self.offsets, spans)]
        if wrong:
            raise UserError(f"{self.data_dir} is damaged: {wrong[0]} does not match the rest; prepare the data again")

    def __len__(self) -> int:
        return len(self.index)

    def n_tokens(self, records: Sequence[int] | np.ndarray) -> int:
        """How many tokens these records have."""
        return int(self.lengths[records].sum())

    def n_targets(self, records: Sequence[int] | np.ndarray) -> int:
        """How many tokens of these records are trained on."""
        return int(self.target_counts[records].sum())

    def record(self, i: int) -> Tensor:
        """The tokens of a record: its prompt, then its response."""
        start = self.starts[i]
        return torch.from_numpy(self.tokens[start : start + self.lengths[i]].astype(np.int64))

    def spans(self, i: int) -> np.ndarray:
        """The spans (n, 2) of a record's tokens that are trained on, as places in the record."""
        start, end = self.starts[i], self.starts[i] + self.lengths[i]
        first, last = np.searchsorted(self.targets[:, 1], start, side="right"), np.searchsorted(self.targets[:, 0], end)
        return np.clip(self.targets[first:last], start, end) - start

    def last_answer(self, i: int) -> tuple[list[int], list[int]]:
        """The tokens before the last span of a record that is trained on, and those in it."""
        start, end = self.spans(i)[-1]
        tokens = self.record(i).tolist()
        return tokens[:start], tokens[start:end]

    def batch(self, records: Sequence[int] | np.ndarray) -> Batch:
        """These records, packed; no records make a batch of one token without targets."""
        empty = torch.empty(0, dtype=torch.int64)
        inputs, lengths, select, targets = [], [], [empty], [empty]
        for i in records:
            tokens = self.record(i)
            # The token at position t predicts the one at t + 1: the last is no input, the first is no target.
            for start, end in self.spans(i):
                places = torch.arange(max(start, 1), end)
                select.append(places - 1 + sum(lengths))
                targets.append(tokens[places])
            inputs.append(tokens[:-1])
            lengths.append(len(tokens) - 1)
        row = torch.cat(inputs) if inputs else torch.zeros(1, dtype=torch.int64)
        return Batch(row[None], lengths or [1], torch.cat(select), torch.cat(targets))

    def padded_batch(self, records: Sequence[int] | np.ndarray) -> Batch:
        """These records as rows, padded on the right to the longest, as version 1.0 computed them."""
        row, lengths, select, targets = self.batch(records)
        lengths = lengths or [1]
        rows = torch.nn.utils.rnn.pad_sequence(list(row[0].split(lengths)), batch_first=True)  # (B, width)
        places = torch.arange(rows.numel()).view(rows.shape)
        places = torch.cat([line[:n] for line, n in zip(places, lengths, strict=True)])  # (T,)
        return Batch(rows, None, places[select], targets)


def impossible(tokens: np.ndarray, offsets: np.ndarray, spans: np.ndarray) -> Iterator[str]:
    """The names of arrays that cannot be right, whatever the records were."""
    for name, array, shape in (("tokens", tokens, (-1,)), ("offsets", offsets, (-1,)), ("spans", spans, (-1, 2))):
        if array.dtype.kind != "i" or array.ndim != len(shape) or array.shape[1:] != shape[1:]:
            yield name
            return
    if len(offsets) < 1 or (offsets[0], offsets[-1]) != (0, len(tokens)) or (np.diff(offsets) < 1).any():
        yield "offsets"
    edges = spans.reshape(-1)  # starts and ends in turn
    if len(edges) and (edges[0] < 0 or edges[-1] > len(tokens) or (np.diff(edges) < 0).any()):
        yield "spans"


@dataclass(frozen=True)
class Step:
    """What one optimizer step learns from: micro-batches, each an array of record numbers."""

    dataset: Dataset
    micro_batches: list[np.ndarray]
    padded: bool = False

    @property
    def records(self) -> np.ndarray:
        return np.concatenate(self.micro_batches)

    @property
    def n_records(self) -> int:
        return len(self.records)

    @property
    def n_tokens(self) -> int:
        return self.dataset.n_tokens(self.records)

    @property
    def n_targets(self) -> int:
        return self.dataset.n_targets(self.records)

    def share(self, rank: int, world_size: int) -> list[Batch]:
        """The micro-batches that one of several processes computes; all get equally many, padded with empty ones."""
        empty = [np.empty(0, np.int64)] * (-len(self.micro_batches) % world_size)
        batch = self.dataset.padded_batch if self.padded else self.dataset.batch
        return [batch(records) for records in (self.micro_batches + empty)[rank::world_size]]


class BatchSchedule:
    """Which records each optimizer step of a training run sees: a pure function of the seed and the step.

    Every epoch holds each record once, in random steps of `batch_size` records over all devices. Only which of a step's
    micro-batches a record is in depends on its length: long and short ones are dealt out so that all of them have about
    as many tokens. The step with the largest micro-batch comes first, so that running out of memory shows immediately.
    """

    def __init__(self, dataset: Dataset, batch_size: int, micro_batch_size: int, seed: int) -> None:
        if not len(dataset):
            raise UserError("no records to train on, or none with room for a response in --block_size tokens")
        if batch_size % micro_batch_size:
            raise UserError(f"--batch_size {batch_size} is not a multiple of --micro_batch_size {micro_batch_size}")
        self.dataset, self.batch_size, self.micro_batch_size, self.seed = dataset, batch_size, micro_batch_size, seed
        self.steps_per_epoch = math.ceil(len(dataset) / batch_size)
        self._epoch: int | None = None
        self._steps: list[Step] = []

    def step(self, number: int) -> Step:
        """An optimizer step, counted from 0 over all epochs."""
        epoch, place = divmod(number, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._steps = epoch, self._draw(np.random.default_rng((self.seed, epoch)))
        return self._steps[place]

    def _draw(self, rng: np.random.Generator) -> list[Step]:
        """The steps of an epoch."""
        order = rng.permutation(len(self.dataset))
        steps = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        dealt = [deal(records, self.dataset.lengths, self.micro_batch_size) for records in steps]
        largest = max(range(len(dealt)), key=lambda i: max(map(self.dataset.n_tokens, dealt[i])))
        dealt.insert(0, dealt.pop(largest))
        return [Step(self.dataset, micro_batches) for micro_batches in dealt]


def deal(records: np.ndarray, lengths: np.ndarray, most: int) -> list[np.ndarray]:
    """Cut records into as few micro-batches of at most `most` records as possible, with about as many tokens in each.

    The longest go out first, to one micro-batch after the other and back again, as cards to players.
    """
    n = math.ceil(len(records) / most)
    records = records[np.argsort(-lengths[records], kind="stable")]
    place = np.arange(len(records)) % (2 * n)
    place = np.minimum(place, 2 * n - 1 - place)  # 0, 1, ... n - 1, n - 1, ... 1, 0, 0, 1, ...
    return [records[place == i] for i in range(n)]


def single_step(dataset: Dataset, micro_batch_size: int) -> Step:
    """All records in one step, for what is evaluated and not trained on."""
    return Step(dataset, deal(np.arange(len(dataset)), dataset.lengths, micro_batch_size))


class GroupedSchedule(BatchSchedule):
    """The schedule of version 1.0, kept to finish runs that it began and as a baseline for benchmarks.

    Records are sorted by length within windows and cut into padded micro-batches, which are shuffled again. Where a
    step has few micro-batches, its records are of one length, and its gradient is not that of a random sample.
    """

    window = 64  # micro-batches that are sorted together

    def _draw(self, rng: np.random.Generator) -> list[Step]:
        order, size, lengths = rng.permutation(len(self.dataset)), self.micro_batch_size, self.dataset.lengths
        micro_batches: list[np.ndarray] = []
        for start in range(0, len(order), self.window * size):
            records = order[start : start + self.window * size]
            records = records[np.argsort(-lengths[records], kind="stable")]
            micro_batches += [records[i : i + size] for i in range(0, len(records), size)]
        rng.shuffle(micro_batches)
        longest = max(range(len(micro_batches)), key=lambda i: lengths[micro_batches[i]].sum())
        micro_batches.insert(0, micro_batches.pop(longest))
        n = self.batch_size // size
        steps = [micro_batches[start : start + n] for start in range(0, len(micro_batches), n)]
        return [Step(self.dataset, step, padded=True) for step in steps]


SCHEDULES = {1: GroupedSchedule, 2: BatchSchedule}  # by the version that a training state was written by
