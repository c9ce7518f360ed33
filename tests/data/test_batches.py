import hashlib
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from lit_llama.data.batches import BatchSchedule, Dataset, deal, loss_sum
from lit_llama.data.preparation import TYPES, Encoder, prepare
from lit_llama.errors import UserError
from lit_llama.prompt import Message, encode
from lit_llama.storage import files
from lit_llama.tokenizer import Tokenizer

import numpy as np
import pytest
import torch
from builders import RECORDS, TINY, Lengths, prepare_records, random_model
from evaluate import last_answer
from torch.nn import functional as F


@pytest.fixture
def tokenizer(model_folder: Path) -> Tokenizer:
    return Tokenizer(model_folder / "tokenizer.json")


def test_unmasked_targets_are_the_response_and_eos_exactly(data_dir: Path, tokenizer: Tokenizer) -> None:
    dataset = Dataset(data_dir, "train", block_size=128)
    for i, record in enumerate(RECORDS[:11]):
        targets = dataset.batch([i]).targets.tolist()
        assert targets[-1] == tokenizer.eos_id
        assert tokenizer.decode(targets[:-1]) == record["output"]


def test_the_prompt_at_training_is_the_prompt_at_generation(data_dir: Path, tokenizer: Tokenizer) -> None:
    dataset = Dataset(data_dir, "train", block_size=128)
    for i, record in enumerate(RECORDS[:11]):
        prompt = encode("plain", [Message("user", record["instruction"], record["input"])], tokenizer).ids
        ids, _, select, _ = dataset.batch([i])
        assert ids[0, : len(prompt)].tolist() == prompt
        assert select[0] == len(prompt) - 1  # the last prompt token predicts the first of the response


def test_targets_follow_their_inputs_in_a_batch(data_dir: Path) -> None:
    dataset = Dataset(data_dir, "train", block_size=128, mask_prompt=False)
    records = [0, 5, 10]
    ids, lengths, select, targets = dataset.batch(records)
    assert lengths == (dataset.lengths[records] - 1).tolist()
    assert ids.shape == (1, sum(lengths))
    assert len(targets) == dataset.n_targets(records) == sum(dataset.lengths[records]) - 3
    last = torch.tensor(lengths).cumsum(0) - 1
    inner = ~torch.isin(select, last)
    assert torch.equal(ids[0, select[inner] + 1], targets[inner])


@torch.no_grad()
def test_packed_records_give_what_each_gives_alone(data_dir: Path) -> None:
    model, dataset = random_model(TINY), Dataset(data_dir, "train", 128)
    records = [4, 0, 10, 7]
    alone = torch.cat([model(dataset.batch([i]).input_ids, select=dataset.batch([i]).select) for i in records])
    batch = dataset.batch(records)
    logits = model(batch.input_ids, lengths=batch.lengths, select=batch.select)
    torch.testing.assert_close(logits, alone, atol=1e-5, rtol=0)
    assert torch.equal(batch.targets, torch.cat([dataset.batch([i]).targets for i in records]))


def test_a_truncated_response_has_no_eos_and_a_prompt_without_room_is_dropped(
    data_dir: Path, tokenizer: Tokenizer
) -> None:
    longest = len(encode("plain", [Message("user", RECORDS[8]["instruction"], RECORDS[8]["input"])], tokenizer).ids)
    dataset = Dataset(data_dir, "train", block_size=longest)
    assert dataset.n_dropped > 0
    assert len(dataset) + dataset.n_dropped == 11
    for i in range(len(dataset)):
        targets = dataset.batch([i]).targets
        assert len(targets) > 0
        if dataset.lengths[i] == longest:
            assert targets[-1] != tokenizer.eos_id


def test_an_empty_batch_contributes_zero(data_dir: Path) -> None:
    model = random_model(TINY)
    loss = loss_sum(model, Dataset(data_dir, "train", 128).batch(np.empty(0, np.int64)))
    assert loss == 0
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_gradient_accumulation_over_ragged_micro_batches_equals_one_large_batch(data_dir: Path) -> None:
    dataset = Dataset(data_dir, "train", 128, limit=8)
    grads = []
    for max_tokens, n in ((1, 8), (dataset.lengths.sum() // 2, 3), (dataset.lengths.sum(), 1)):
        model = random_model(TINY).double()
        step = BatchSchedule(dataset, 8, max_tokens, seed=0).step(0)
        assert sorted(step.records) == list(range(8))
        batches = step.share(0, 1)
        assert len(batches) == n
        for batch in batches:
            (loss_sum(model, batch) / step.n_targets).backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert grads[0].abs().max() > 0.1
    for grad in grads[1:]:
        torch.testing.assert_close(grad, grads[0], atol=1e-6, rtol=0)


def test_the_loss_is_the_mean_over_target_tokens(data_dir: Path) -> None:
    model, dataset = random_model(TINY), Dataset(data_dir, "train", 128)
    losses = []
    for i in range(3):
        start, length, first = dataset.starts[i], dataset.lengths[i], dataset.spans(i)[0, 0]
        ids = torch.from_numpy(dataset.tokens[start : start + length].astype(np.int64))
        logits = model(ids[None, :-1])[0]
        losses += [F.cross_entropy(logits[t - 1], ids[t]) for t in range(first, length)]
    mean = loss_sum(model, dataset.batch([0, 1, 2])) / dataset.n_targets([0, 1, 2])
    torch.testing.assert_close(mean, torch.stack(losses).mean())


def random_lengths(n: int, high: int = 100) -> Lengths:
    return Lengths(np.random.default_rng(0).integers(2, high, n))


@pytest.mark.parametrize(("n", "batch_size", "max_tokens"), [(100, 16, 400), (37, 9, 300), (5, 128, 400), (9, 2, 1)])
def test_every_epoch_has_every_record_once(n: int, batch_size: int, max_tokens: int) -> None:
    dataset = random_lengths(n)
    schedule = BatchSchedule(dataset, batch_size, max_tokens, seed=1)
    epochs = []
    for epoch in range(3):
        steps = [schedule.step(epoch * schedule.steps_per_epoch + i) for i in range(schedule.steps_per_epoch)]
        parts = [records for step in steps for records in step.micro_batches()]
        assert all(dataset.n_tokens(records) <= max_tokens or len(records) == 1 for records in parts)
        assert all(step.n_records <= batch_size for step in steps)
        epochs.append([record for step in steps for record in step.records])
        assert sorted(epochs[-1]) == list(range(n))
    assert n < 30 or epochs[0] != epochs[1] != epochs[2]


def test_a_steps_records_follow_from_seed_and_step_whatever_a_micro_batch_holds() -> None:
    dataset = random_lengths(60)
    one, other, another = (BatchSchedule(dataset, 8, *rest) for rest in ((200, 1), (99, 1), (200, 2)))
    for step in (20, 3, 11):
        assert np.array_equal(one.step(step).records, other.step(step).records)
    assert not np.array_equal(one.step(3).records, another.step(3).records)


@pytest.mark.parametrize("world_size", [1, 4])
def test_as_few_micro_batches_as_needed_hold_about_as_many_tokens_the_fullest_first(world_size: int) -> None:
    dataset, most = random_lengths(4000, 500), 2000
    schedule = BatchSchedule(dataset, 128, most, seed=0)
    steps = [schedule.step(i) for i in range(schedule.steps_per_epoch)]
    sizes = [[dataset.n_tokens(records) for records in step.micro_batches(world_size)] for step in steps]
    assert steps[0].n_tokens == max(step.n_tokens for step in steps)
    for step, parts in zip(steps, sizes, strict=True):
        assert most >= parts[0] == max(parts) < 1.25 * min(parts)
        needed = -(-step.n_tokens // most)
        assert len(parts) % world_size == 0
        assert needed <= len(parts) <= needed + world_size


def test_a_steps_records_do_not_depend_on_their_lengths() -> None:
    """Shuffled anew, the lengths of a step's records are as different as those of all records."""
    dataset = random_lengths(4000, 500)
    schedule = BatchSchedule(dataset, 4, 2000, seed=0)
    steps = [schedule.step(i) for i in range(schedule.steps_per_epoch)]
    spread = np.mean([dataset.lengths[step.records].var(ddof=1) for step in steps])
    assert spread == pytest.approx(dataset.lengths.var(), rel=0.05)


@pytest.mark.parametrize(("n", "batch_size", "max_tokens"), [(100, 16, 80), (37, 9, 60), (96, 8, 160), (5, 128, 80)])
def test_an_epoch_is_a_shuffle_cut_into_steps_of_which_the_largest_comes_first(
    n: int, batch_size: int, max_tokens: int
) -> None:
    dataset = random_lengths(n, high=20)
    schedule = BatchSchedule(dataset, batch_size, max_tokens, seed=3)
    for epoch in range(3):
        order = np.random.default_rng((3, epoch)).permutation(n)
        steps = [order[start : start + batch_size] for start in range(0, n, batch_size)]
        largest = max(range(len(steps)), key=lambda i: dataset.n_tokens(steps[i]))
        steps.insert(0, steps.pop(largest))
        for i, expected in enumerate(steps):
            assert list(schedule.step(epoch * len(steps) + i).records) == list(expected)


def test_records_go_to_micro_batches_in_turn_and_back_the_longest_first() -> None:
    lengths = np.array([1, 9, 5, 8, 2, 7, 3])
    assert [part.tolist() for part in deal(np.arange(7), lengths, 12)] == [[1, 4, 0], [5, 2], [3, 6]]
    assert [part.tolist() for part in deal(np.arange(2), lengths, 9, multiple=4)] == [[1], [0], [], []]
    assert [part.tolist() for part in deal(np.arange(3), lengths, 4)] == [[1], [2], [0]]  # longer than they may be


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_processes_share_a_step_without_overlap_and_in_equal_numbers(data_dir: Path, world_size: int) -> None:
    dataset = Dataset(data_dir, "train", 128)
    schedule = BatchSchedule(dataset, 8, 40, seed=0)
    for number in range(schedule.steps_per_epoch):
        step = schedule.step(number)
        shares = [step.share(rank, world_size) for rank in range(world_size)]
        assert len({len(share) for share in shares}) == 1
        targets = torch.cat([batch.targets for share in shares for batch in share])
        expected = torch.cat([dataset.batch([i]).targets for i in step.records])
        assert torch.equal(targets.sort().values, expected.sort().values)


def change_array(folder: Path, name: str, change: Callable[[np.ndarray], np.ndarray], seal: bool = False) -> None:
    """Write another array in place of one of a prepared folder; with `seal`, and its checksum."""
    path, meta = folder / f"{name}.bin", json.loads((folder / "meta.json").read_text())
    path.write_bytes(change(np.frombuffer(path.read_bytes(), TYPES[name])).tobytes())
    if seal:
        meta["sha256"][name] = hashlib.sha256(path.read_bytes()).hexdigest()
        (folder / "meta.json").write_text(json.dumps(meta))


@pytest.mark.parametrize("name", ["tokens", "offsets", "spans", "train"])
def test_changed_or_exchanged_arrays_are_noticed(data_dir: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(data_dir, tmp_path, dirs_exist_ok=True)
    change_array(tmp_path, name, lambda array: array + (np.arange(len(array)) == len(array) // 2))
    with pytest.raises(UserError, match=f"damaged: {name}.bin"):
        Dataset(tmp_path, "train", 128)


def test_an_array_without_a_checksum_is_refused(data_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(data_dir, tmp_path, dirs_exist_ok=True)
    meta = json.loads((tmp_path / "meta.json").read_text())
    del meta["sha256"]["tokens"]
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match=r"damaged: tokens\.bin"):
        Dataset(tmp_path, "train", 128)


def test_a_damaged_split_leaves_the_other_readable(data_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(data_dir, tmp_path, dirs_exist_ok=True)
    change_array(tmp_path, "train", lambda array: array[::-1])
    with pytest.raises(UserError, match=r"damaged: train\.bin"):
        Dataset(tmp_path, "train", 128)
    Dataset(tmp_path, "validation", 128)


def test_without_check_files_only_the_tokens_are_not_compared(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(files, "check_all", False)
    shutil.copytree(data_dir, tmp_path, dirs_exist_ok=True)
    change_array(tmp_path, "tokens", lambda array: array - 1)
    Dataset(tmp_path, "train", 128)
    assert "tokens.bin was read without comparing" in capsys.readouterr().err
    change_array(tmp_path, "train", lambda array: array[::-1])
    with pytest.raises(UserError, match=r"damaged: train\.bin"):
        Dataset(tmp_path, "train", 128)


def test_a_source_is_not_written_over(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = tmp_path / "meta.json"
    source.write_text(json.dumps(RECORDS))
    with pytest.raises(UserError, match="would be replaced"):
        prepare(tmp_path, {"train": source}, Encoder(tokenizer, "plain"))
    assert json.loads(source.read_text()) == RECORDS


def test_preparing_no_records_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="no training records"):
        prepare_records(tmp_path / "out", {"train": [], "validation": []}, tokenizer.path)
    assert not (tmp_path / "out").exists()


def test_data_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="prepare_"):
        Dataset(tmp_path, "train", 128)


def as_row(record: list[Message]) -> dict:
    return {"messages": [{"role": message.role, "content": message.content} for message in record]}


def long_conversation(n_turns: int) -> list[Message]:
    return [Message("user" if i % 2 == 0 else "assistant", f"words {i}") for i in range(2 * n_turns)]


@pytest.mark.parametrize("block_size", [10, 37, 60, 1000])
def test_all_answers_of_a_conversation_are_trained_on_up_to_the_limit(
    tmp_path: Path, tokenizer: Tokenizer, block_size: int
) -> None:
    records = [long_conversation(n) for n in (1, 4, 2)]
    prepare_records(tmp_path / "data", {"train": [as_row(record) for record in records]}, tokenizer.path, "zephyr")
    dataset = Dataset(tmp_path / "data", "train", block_size)
    used = []
    for record in records:
        ids, trained = encode("zephyr", record, tokenizer)
        expected = [token for token, is_trained in zip(ids[:block_size], trained, strict=False) if is_trained]
        used += [expected] if expected else []
    assert [dataset.batch([i]).targets.tolist() for i in range(len(dataset))] == used
    assert [dataset.n_targets([i]) for i in range(len(dataset))] == list(map(len, used))
    assert dataset.n_dropped == len(records) - len(used)
    for i in range(len(dataset)):
        ids, _, select, targets = dataset.batch([i])
        assert torch.equal(dataset.record(i)[select + 1], targets)
        assert torch.equal(ids[0], dataset.record(i)[:-1])
    if block_size == 1000:
        prompt, answer = last_answer(dataset, 1)
        assert tokenizer.decode(answer[:-1]) == "words 7"
        assert prompt == encode("zephyr", records[1][:-1], tokenizer).ids


def test_documents_are_cut_into_blocks_and_trained_on_as_a_whole(tmp_path: Path, tokenizer: Tokenizer) -> None:
    records = [[Message("assistant", "a b c d e f g h i j k")], [Message("assistant", "short")]]
    prepare_records(tmp_path / "data", {"train": [as_row(record) for record in records]}, tokenizer.path)
    dataset = Dataset(tmp_path / "data", "train", block_size=8)
    blocks = [dataset.record(i).tolist() for i in range(len(dataset))]
    whole = [encode("plain", record, tokenizer).ids for record in records]
    assert [*itertools.chain(*blocks)] == [*itertools.chain(*whole)]
    assert max(map(len, blocks)) == 8
    assert (dataset.n_dropped, dataset.n_cut) == (0, 0)
    for i, block in enumerate(blocks):
        assert dataset.batch([i]).targets.tolist() == block[1:]


@pytest.mark.parametrize(("name", "size"), [("tokens", 5), ("spans", 24)])
def test_an_array_of_an_odd_size_is_refused(data_dir: Path, tmp_path: Path, name: str, size: int) -> None:
    shutil.copytree(data_dir, tmp_path, dirs_exist_ok=True)
    (tmp_path / f"{name}.bin").write_bytes(bytes(size))
    with pytest.raises(UserError, match="holds no prepared data"):
        Dataset(tmp_path, "train", 128)
