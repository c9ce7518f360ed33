"""Prepared records as a training run sees them: cut, masked, and drawn from their folder in optimizer steps."""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lit_llama.data.preparation import read_split
from lit_llama.data.sources import shuffled
from lit_llama.errors import UserError
from lit_llama.model import LLaMA
from lit_llama.progress import say
from lit_llama.prompt import EXCHANGED, attempt, stored_template
from lit_llama.tokenizer import Tokenizer, find_tokenizer

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor, nn


class Batch(NamedTuple):
    """Records to be computed at once, packed one after the other into a single row. N of their tokens are targets."""

    input_ids: Tensor  # (1, T)
    lengths: list[int]  # of the records, T in all
    select: Tensor  # (N,) indices of the tokens before a target, the only ones that need logits
    targets: Tensor  # (N,)


class Dataset:
    """One split of a prepared folder.

    Records are cut at `block_size` tokens (a response that was cut has no end of sequence); one whose prompt leaves no
    room for a response is dropped and counted in `n_dropped`. Documents are cut into blocks, each a record of its own.
    With `mask_prompt` False, all tokens are trained on. `limit` takes the first so many of the records that are left.
    The arrays stay on the disk; 20 bytes of each record are held in memory.
    """

    def __init__(
        self, data_dir: Path, split: str, block_size: int, mask_prompt: bool = True, limit: int | None = None
    ) -> None:
        self.data_dir, self.block_size = data_dir, block_size
        self.meta, (self.tokens, self.offsets, spans, self.documents, numbers) = read_split(data_dir, split)
        self.prompt_style = stored_template(self.meta["prompt_style"])
        origin = [self.meta[name] for name in ("tokenizer", "prompt_style", "sha256")]  # the last is of the arrays
        self.fingerprint = hashlib.sha256(json.dumps(origin).encode()).hexdigest()[:16]
        self.targets = spans if mask_prompt else sliding_window_view(self.offsets, 2)
        n_targets = np.concatenate([[0], np.cumsum(self.targets[:, 1] - self.targets[:, 0])])  # before each span
        starts, ends = self.offsets[numbers], self.offsets[numbers + 1]
        sizes = np.where(np.isin(numbers, self.documents), block_size, np.maximum(ends - starts, 1))
        numbers, starts, ends = split_documents(numbers, starts, ends, sizes)
        lengths = np.minimum(ends - starts, block_size)
        first, last = starts + 1, starts + lengths  # nothing predicts the first token
        counts = targets_before(last, self.targets, n_targets) - targets_before(first, self.targets, n_targets)
        left = np.flatnonzero(counts)
        self.n_dropped = len(numbers) - len(left)
        left = left[:limit]
        self.n_cut = int((lengths < ends - starts)[left].sum())
        self.index = numbers[left]  # in the folder; of a block, its document's
        self.starts = starts[left]  # as places in `tokens`
        self.lengths, self.target_counts = lengths[left].astype(np.int32), counts[left].astype(np.int32)

    def __len__(self) -> int:
        return len(self.index)

    def n_tokens(self, records: Sequence[int] | np.ndarray) -> int:
        return int(self.lengths[records].sum())

    def n_targets(self, records: Sequence[int] | np.ndarray) -> int:
        return int(self.target_counts[records].sum())

    def record(self, i: int) -> Tensor:
        """The tokens of a record: its prompt, then its response."""
        return torch.from_numpy(self.tokens[self.starts[i] :][: self.lengths[i]].astype(np.int64))

    def is_whole(self, i: int) -> bool:
        """Whether a record is a conversation that was not cut."""
        record = self.index[i]
        return record not in self.documents and self.starts[i] + self.lengths[i] == self.offsets[record + 1]

    def spans(self, i: int) -> np.ndarray:
        """The spans (n, 2) of a record's tokens that are trained on, as places in the record."""
        start, end = self.starts[i], self.starts[i] + self.lengths[i]
        first, last = np.searchsorted(self.targets[:, 1], start, side="right"), np.searchsorted(self.targets[:, 0], end)
        return np.clip(self.targets[first:last], start, end) - start

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


def split_documents(
    numbers: np.ndarray, starts: np.ndarray, ends: np.ndarray, sizes: np.ndarray
) -> tuple[np.ndarray, ...]:
    """The same three of each record's blocks, which are of at most its size in tokens."""
    n = -(-(ends - starts) // sizes)  # blocks of each record
    place = np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n)  # of each block in its record
    block_starts = np.repeat(starts, n) + np.repeat(sizes, n) * place
    return np.repeat(numbers, n), block_starts, np.minimum(block_starts + np.repeat(sizes, n), np.repeat(ends, n))


def targets_before(places: np.ndarray, spans: np.ndarray, n_targets: np.ndarray) -> np.ndarray:
    """How many tokens before each place are in spans; `n_targets` has the number of those before each span."""
    n = np.searchsorted(spans[:, 0], places)  # spans that start before each place; the last of them may end after it
    return n_targets[n] - np.maximum(spans[n - 1, 1] - places, 0) * (n > 0)


@dataclass(frozen=True)
class Step:
    """What one optimizer step learns from: records, by their numbers, in micro-batches of at most `max_tokens`."""

    dataset: Dataset
    records: np.ndarray
    max_tokens: int

    def micro_batches(self, world_size: int = 1) -> list[np.ndarray]:
        """The records of each micro-batch, as many of them for each of several processes; the fullest comes first."""
        return deal(self.records, self.dataset.lengths, self.max_tokens, world_size)

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
        return list(self.batches(rank, world_size))

    def batches(self, rank: int, world_size: int) -> Iterator[Batch]:
        """The micro-batches that one of several processes computes; all get equally many, if few records empty ones."""
        return map(self.dataset.batch, self.micro_batches(world_size)[rank::world_size])


class BatchSchedule:
    """Which records each optimizer step of a training run sees: a pure function of the seed and the step.

    Every epoch holds each record once, in random steps of `batch_size` records over all devices. Which records a step
    has depends neither on their lengths nor on `max_tokens`: a run may be resumed with another. The step with the most
    tokens comes first, so that running out of memory shows soon.
    """

    def __init__(self, dataset: Dataset, batch_size: int, max_tokens: int, seed: int) -> None:
        if not len(dataset):
            raise UserError("no records to train on, or none with room for a response in --block_size tokens")
        self.dataset, self.batch_size, self.max_tokens, self.seed = dataset, batch_size, max_tokens, seed
        self.steps_per_epoch = math.ceil(len(dataset) / batch_size)
        self._epoch: int | None = None

    def step(self, number: int) -> Step:
        """An optimizer step, counted from 0 over all epochs."""
        epoch, place = divmod(number, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, shuffled(len(self.dataset), np.random.default_rng((self.seed, epoch)))
            starts = np.arange(0, len(self.dataset), self.batch_size)
            largest = int(np.add.reduceat(self.dataset.lengths[self._order], starts).argmax())
            self._places = [largest, *(i for i in range(self.steps_per_epoch) if i != largest)]
        records = self._order[self._places[place] * self.batch_size :][: self.batch_size]
        return Step(self.dataset, records, self.max_tokens)


def deal(records: np.ndarray, lengths: np.ndarray, max_tokens: int, multiple: int = 1) -> list[np.ndarray]:
    """Deal records evenly to as few micro-batches as can hold them, each at most `max_tokens` or one longer record.

    The longest records go first, one to each micro-batch, then the next ones in the opposite direction, and so on.
    Their number is a multiple of `multiple`. The fullest micro-batch comes first.
    """
    records = records[np.argsort(-lengths[records], kind="stable")]
    n = math.ceil(min(max(1, lengths[records].sum()) / max_tokens, len(records)) / multiple) * multiple
    while True:
        place = np.arange(len(records)) % (2 * n)
        micro_batch = np.minimum(place, 2 * n - 1 - place)  # 0, 1, ... n - 1, n - 1, ... 1, 0, 0, 1, ...
        sizes = np.bincount(micro_batch, lengths[records], minlength=n)  # in tokens
        if sizes.max() <= max_tokens or n >= len(records):
            break
        n += math.ceil(n / 100 / multiple) * multiple  # of many, a hundredth more
    ends = np.bincount(micro_batch, minlength=n).cumsum()
    parts = np.split(records[np.argsort(micro_batch, kind="stable")], ends[:-1])
    return [parts[i] for i in np.argsort(-sizes, kind="stable")]


def single_step(dataset: Dataset, max_tokens: int) -> Step:
    """All records in one step, for what is evaluated and not trained on."""
    return Step(dataset, np.arange(len(dataset)), max_tokens)


def loss_sum(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Cross-entropy of a batch, summed over its targets; 0 if it has none."""
    return model(batch.input_ids, lengths=batch.lengths, select=batch.select, targets=batch.targets)


def matching_tokenizer(dataset: Dataset, model: LLaMA, pretrained_path: Path, tokenizer_path: Path | None) -> Tokenizer:
    """The model's tokenizer, or a UserError if the data was tokenised with another one or is too long for the model."""
    if dataset.block_size > model.config.block_size:
        raise UserError(f"--block_size {dataset.block_size} is more than the model's {model.config.block_size} tokens")
    tokenizer = find_tokenizer(pretrained_path, tokenizer_path)
    tokenizer.check_fits(model.config.vocab_size)
    if tokenizer.fingerprint() != dataset.meta["tokenizer"]:
        raise UserError(
            f"{dataset.data_dir} was not prepared with {tokenizer.path}; prepare the data again with that tokenizer"
        )
    if names := unlearned(dataset.prompt_style, tokenizer, model.transformer.wte.weight):
        say(
            f"warning: the base model has never learned {', '.join(names)}, so answers may not end; prepare the data "
            "in a --prompt_style without control tokens, such as alpaca, or take a model that was trained in this one"
        )
    return tokenizer


def unlearned(template: str, tokenizer: Tokenizer, embedding: Tensor) -> list[str]:
    """The control tokens of a template that a model has not learned: its rows (V, C) for them are zero or the same."""
    rows = {i: embedding[i] for i in tokenizer.controls.values() if i < len(embedding)}
    used = sorted({*attempt(template, EXCHANGED, tokenizer).ids} & rows.keys())
    same = {i: sum(bool((row == rows[i]).all()) for row in rows.values()) for i in used}
    return [tokenizer.token(i) for i, n in same.items() if n > 1 or not rows[i].any()]
