"""Prepared records as a training run sees them: read from their folder, and drawn from it in optimizer steps.

`lit_llama/prepared.py` says what such a folder holds. Length limit and prompt masking are choices of the training, so
changing them needs no new preparation.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from lit_llama.arrays import BLOCK, number_type
from lit_llama.errors import UserError
from lit_llama.prepared import read_split
from lit_llama.prompt import PromptStyle
from lit_llama.records import shuffled


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
    The arrays stay on the disk; 12 bytes of each record are held in memory, 20 of each block of a document.

    Attributes:
        index: the numbers, in the folder, of the records that are left.
        lengths: their tokens.
        target_counts: how many of those are trained on.
    """

    def __init__(
        self, data_dir: Path, split: str, block_size: int, mask_prompt: bool = True, limit: int | None = None
    ) -> None:
        self.data_dir, self.block_size = data_dir, block_size
        self.meta, (self.tokens, self.offsets, spans) = read_split(data_dir, split)
        self.has_checksum = f"{split}_tokens" in self.meta.get("sha256", {})
        self.prompt_style: PromptStyle = self.meta["prompt_style"]
        origin = {name: self.meta[name] for name in ("sources", "tokenizer", "prompt_style", "split_seed", "records")}
        self.fingerprint = hashlib.sha256(json.dumps(origin).encode()).hexdigest()[:16]
        self.targets = spans if mask_prompt else sliding_window_view(self.offsets, 2)
        self._measure(limit)

    def _measure(self, limit: int | None) -> None:
        """Find the records that are left, and how long they are."""
        documents, size = self.meta.get("documents", False), self.block_size
        kind = number_type(len(self.offsets) + len(self.tokens) // size)
        n_seen = self.n_dropped = self.n_cut = n = 0
        all_starts, parts = [], []
        for first in range(0, max(len(self.offsets) - 1, 1), BLOCK):
            edges = np.array(self.offsets[first : first + BLOCK + 1])
            starts, ends = cut(edges, size) if documents else (edges[:-1], edges[1:])
            lengths = np.minimum(ends - starts, size)
            spans = np.array(self._spans(edges[0], edges[-1]))
            # Nothing predicts the first token.
            counts = targets_before(spans, starts + lengths) - targets_before(spans, starts + 1)
            left = np.flatnonzero(counts)
            taken = left if limit is None else left[: max(limit - n, 0)]
            self.n_dropped += len(starts) - len(left)
            self.n_cut += 0 if documents else int((lengths < ends - starts)[taken].sum())
            parts.append(((n_seen + taken).astype(kind), *(a[taken].astype(np.int32) for a in (lengths, counts))))
            all_starts += [starts] if documents else []
            n_seen, n = n_seen + len(starts), n + len(taken)
        self.index, self.lengths, self.target_counts = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        self._starts = np.concatenate(all_starts) if documents else self.offsets

    def _spans(self, start: int, end: int) -> np.ndarray:
        """The spans that reach into tokens[start:end]."""
        first, last = np.searchsorted(self.targets[:, 1], start, side="right"), np.searchsorted(self.targets[:, 0], end)
        return self.targets[first:last]

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
        start = self._starts[self.index[i]]
        return torch.from_numpy(self.tokens[start : start + self.lengths[i]].astype(np.int64))

    def spans(self, i: int) -> np.ndarray:
        """The spans (n, 2) of a record's tokens that are trained on, as places in the record."""
        start = self._starts[self.index[i]]
        end = start + self.lengths[i]
        return np.clip(self._spans(start, end), start, end) - start

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


def cut(edges: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Blocks of `size` tokens of documents: their starts, and the ends of their documents."""
    n = -(-np.diff(edges) // size)  # of each document
    number = np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n)  # of each block in its document
    return np.repeat(edges[:-1], n) + size * number, np.repeat(edges[1:], n)


def targets_before(spans: np.ndarray, places: np.ndarray) -> np.ndarray:
    """How many tokens before each of some places lie in spans (S, 2)."""
    starts, ends = spans.T
    before = np.searchsorted(ends, places, side="right")  # spans that end there or earlier
    whole = np.concatenate([[0], np.cumsum(ends - starts)])[before]
    begun = np.append(starts, np.iinfo(np.int64).max)[before]  # the span that a place may be in
    return whole + np.maximum(places - begun, 0)


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
        return list(self.batches(rank, world_size))

    def batches(self, rank: int, world_size: int) -> Iterator[Batch]:
        """The same, each drawn when it is its turn."""
        empty = [np.empty(0, np.int64)] * (-len(self.micro_batches) % world_size)
        batch = self.dataset.padded_batch if self.padded else self.dataset.batch
        return (batch(records) for records in (self.micro_batches + empty)[rank::world_size])


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
        self._order, self._largest = np.empty(0, np.int32), 0  # of the epoch

    def step(self, number: int) -> Step:
        """An optimizer step, counted from 0 over all epochs."""
        epoch, place = divmod(number, self.steps_per_epoch)
        if epoch != self._epoch:
            self._draw(np.random.default_rng((self.seed, epoch)))
            self._epoch = epoch
        return self._step(place)

    def _draw(self, rng: np.random.Generator) -> None:
        """Shuffle the records for an epoch."""
        self._order = shuffled(len(self.dataset), rng)
        self._largest = self._find_largest()

    def _step(self, place: int) -> Step:
        """A step of the epoch; the largest is taken out of its place and put first."""
        if place <= self._largest:
            place = (place - 1) % (self._largest + 1)
        records = self._order[place * self.batch_size :][: self.batch_size]
        return Step(self.dataset, deal(records, self.dataset.lengths, self.micro_batch_size))

    def _find_largest(self) -> int:
        """The first of the steps whose largest micro-batch has the most tokens."""
        lengths, size = self.dataset.lengths, self.batch_size
        n_whole = len(self._order) // size * size
        dealt = seats(size, size // self.micro_batch_size)
        order = np.argsort(dealt, kind="stable")
        starts = np.searchsorted(dealt[order], np.arange(size // self.micro_batch_size))  # of each micro-batch
        n = max(BLOCK // size, 1) * size  # records at a time
        most = []  # tokens of a micro-batch, of each step
        for first in range(0, n_whole, n):
            steps = lengths[self._order[first : min(first + n, n_whole)]].reshape(-1, size)  # (steps, size)
            steps = np.sort(steps)[:, ::-1]
            most.append(np.add.reduceat(steps[:, order], starts, axis=1).max(1))  # (steps,)
        if n_whole < len(self._order):
            rest = deal(self._order[n_whole:], lengths, self.micro_batch_size)
            most.append(np.array([max(map(self.dataset.n_tokens, rest))]))
        return int(np.concatenate(most).argmax())


def deal(records: np.ndarray, lengths: np.ndarray, most: int) -> list[np.ndarray]:
    """Cut records into as few micro-batches of at most `most` records as possible, with about as many tokens in each.

    The longest go out first, to one micro-batch after the other and back again, as cards to players.
    """
    n = math.ceil(len(records) / most)
    records = records[np.argsort(-lengths[records], kind="stable")]
    dealt = seats(len(records), n)
    return np.split(records[np.argsort(dealt, kind="stable")], np.cumsum(np.bincount(dealt))[:-1])[:n]


def seats(n: int, n_players: int) -> np.ndarray:
    """Which of the players gets each of n cards."""
    place = np.arange(n) % (2 * n_players)
    return np.minimum(place, 2 * n_players - 1 - place)  # 0, 1, ... n - 1, n - 1, ... 1, 0, 0, 1, ...


def single_step(dataset: Dataset, micro_batch_size: int) -> Step:
    """All records in one step, for what is evaluated and not trained on."""
    return Step(dataset, deal(np.arange(len(dataset)), dataset.lengths, micro_batch_size))


class GroupedSchedule(BatchSchedule):
    """The schedule of version 1.0, kept to finish runs that it began and as a baseline for benchmarks.

    Records are sorted by length within windows and cut into padded micro-batches, which are shuffled again. Where a
    step has few micro-batches, its records are of one length, and its gradient is not that of a random sample.
    """

    window = 64  # micro-batches that are sorted together

    def _draw(self, rng: np.random.Generator) -> None:
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
        self._steps = [micro_batches[start : start + n] for start in range(0, len(micro_batches), n)]

    def _step(self, place: int) -> Step:
        return Step(self.dataset, self._steps[place], padded=True)


SCHEDULES = {1: GroupedSchedule, 2: BatchSchedule}  # by the version that a training state was written by
