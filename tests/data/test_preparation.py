"""Preparing more records than fit into memory, in several processes."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from lit_llama.data import preparation
from lit_llama.data.batches import Dataset
from lit_llama.data.preparation import TYPES, Encoder, in_processes, prepare
from lit_llama.data.records import Fields, conversation
from lit_llama.errors import UserError
from lit_llama.prompt import encode
from lit_llama.tokenizer import Tokenizer

import numpy as np
import pytest
from builders import RECORDS, command, peak_of


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """300 records, all different, which are several chunks if one has 10."""
    path = tmp_path / "records.jsonl"
    rows = ({**RECORDS[i % 14], "instruction": f"{i}: {RECORDS[i % 14]['instruction']}"} for i in range(300))
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def encoder(model_folder: Path) -> Encoder:
    return Encoder(Tokenizer(model_folder / "tokenizer.json"), "plain")


class Processes:
    def __getitem__(self, number: int) -> tuple[int, int]:
        return number, os.getpid()


def end_process(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_calls_are_shared_by_processes_in_order_and_not_drawn_far_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "N_CORES", 2)
    drawn = []
    results = in_processes(Processes(), (drawn.append(i) or i for i in range(200)), num_workers=2)
    first = next(results)
    assert len(drawn) < 30
    numbers, processes = zip(first, *results, strict=True)
    assert numbers == tuple(range(200))
    assert len({*processes}) == 2
    assert os.getpid() not in processes
    assert [*in_processes(Processes(), range(3), num_workers=2)] == [Processes()[i] for i in range(3)]


def read_arrays(folder: Path) -> list[np.ndarray]:
    return [np.frombuffer((folder / f"{name}.bin").read_bytes(), dtype) for name, dtype in TYPES.items()]


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_arrays_are_those_of_records_encoded_one_by_one_and_splits_those_of_a_shuffle(
    tmp_path: Path, encoder: Encoder, source: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    monkeypatch.setattr(preparation, "N_CORES", 2)
    monkeypatch.setattr(preparation, "CHUNK", 10)
    prepare(tmp_path / "out", {"train": source}, encoder, 7, 20, num_workers)
    records = [conversation(json.loads(line), Fields()) for line in source.read_text().split("\n")]
    tokens, offsets, spans = [], [0], []
    for ids, trained in (encode("plain", record, encoder.tokenizer) for record in records):
        spans += [offsets[-1] + trained.index(True), offsets[-1] + len(ids)]
        tokens += ids
        offsets.append(len(tokens))
    order = np.random.default_rng(7).permutation(300)
    expected = tokens, offsets, spans, [], order[20:], order[:20]
    for array, values in zip(read_arrays(tmp_path / "out"), expected, strict=True):
        assert np.array_equal(array, values)


def test_records_of_a_validation_file_follow_those_to_train_on(tmp_path: Path, encoder: Encoder, source: Path) -> None:
    (tmp_path / "others.jsonl").write_text("\n".join(source.read_text().split("\n")[:5]))
    prepare(tmp_path / "out", {"train": source, "validation": tmp_path / "others.jsonl"}, encoder)
    tokens, offsets, _, _, train, validation = read_arrays(tmp_path / "out")
    assert train.tolist() == [*range(300)]
    assert validation.tolist() == [*range(300, 305)]
    assert np.array_equal(tokens[: offsets[5]], tokens[offsets[300] :])


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_record_that_a_template_cannot_take_is_named_by_its_place(
    tmp_path: Path, encoder: Encoder, source: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    monkeypatch.setattr(preparation, "N_CORES", 2)
    monkeypatch.setattr(preparation, "CHUNK", 10)
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user", "assistant")]
    source.write_text(f"{source.read_text()}\n{json.dumps({'messages': turns})}")
    message = r"records\.jsonl: 1 of 301 records .*: line 301 does not fit: the chat template .* it takes one question"
    with pytest.raises(UserError, match=message) as error:
        prepare(tmp_path / "out", {"train": source}, encoder, num_workers=num_workers)
    assert "\n" not in str(error.value)
    assert [*tmp_path.iterdir()] == [source]


def test_a_process_that_dies_ends_the_preparation_which_leaves_nothing(
    tmp_path: Path, encoder: Encoder, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "N_CORES", 2)
    monkeypatch.setattr(preparation, "CHUNK", 10)
    monkeypatch.setattr(Encoder, "__getitem__", end_process)
    with pytest.raises(UserError, match=r"worker.*(killed|exited)"):
        prepare(tmp_path / "out", {"train": source}, encoder, num_workers=2)
    assert [*tmp_path.iterdir()] == [source]


def test_a_source_that_cannot_be_read_is_named_and_not_the_folder(
    tmp_path: Path, encoder: Encoder, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_source: Path) -> Iterator[tuple[str, object]]:
        yield "line 1", RECORDS[0]
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(preparation, "read_rows", broken)
    with pytest.raises(UserError, match=r"^could not read .*records\.jsonl: Input/output error$"):
        prepare(tmp_path / "out", {"train": source}, encoder)
    assert [*tmp_path.iterdir()] == [source]


@pytest.mark.slow
def test_preparing_and_opening_records_takes_less_memory_than_their_tokens(tmp_path: Path, model_folder: Path) -> None:
    actions = []
    for name, n in (("few", 500), ("many", 8_000)):
        rows = ({"text": f"{i} is a number that is followed by others, and so on. " * 12} for i in range(n))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        source, out = f"Path({str(tmp_path / name)!r} + '.jsonl')", f"Path({str(tmp_path / name)!r})"
        actions.append(f"prepare({out}, {{'train': {source}}}, encoder, 1, 10); Dataset({out}, 'train', 512)")
    before = f"""
import lit_llama.data.batches, lit_llama.data.preparation
from lit_llama.data.batches import Dataset
from lit_llama.data.preparation import Encoder, prepare
from lit_llama.tokenizer import Tokenizer
encoder = Encoder(Tokenizer(Path({str(model_folder / "tokenizer.json")!r})), "plain")
{actions[0]}"""
    peak = peak_of(before, actions[1])
    assert peak < (tmp_path / "many" / "tokens.bin").stat().st_size


@pytest.fixture
def running(tmp_path: Path, checkpoint: Path, source: Path) -> subprocess.Popen[str]:
    """A preparation that is tokenising, with some seconds to go."""
    source.write_text("\n".join([source.read_text()] * 300))
    flags = ("--train_file", source, "--data_dir", tmp_path / "out", "--pretrained_path", checkpoint)
    process = subprocess.Popen(
        command("scripts/prepare_json.py", *flags), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    written = tmp_path / ".out.part" / "tokens.bin"
    while not (written.exists() and written.stat().st_size) and process.poll() is None:
        time.sleep(0.05)
    return process


@pytest.mark.slow
def test_an_interrupted_preparation_ends_in_one_line_and_leaves_nothing(
    tmp_path: Path, source: Path, running: subprocess.Popen[str]
) -> None:
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does
    assert running.communicate()[1] == "interrupted\n"
    assert running.returncode == 128 + signal.SIGINT
    assert [*tmp_path.iterdir()] == [source]


@pytest.mark.slow
def test_no_process_outlives_a_preparation_that_is_killed(running: subprocess.Popen[str]) -> None:
    running.kill()
    assert running.communicate(timeout=20)[1] == ""  # it returns once no process is left that could write


def test_bad_records_are_left_out_on_request_and_counted_by_reason(
    tmp_path: Path, encoder: Encoder, source: Path, capsys: pytest.CaptureFixture
) -> None:
    bad = ['{"instruction": "a"}', '{"instruction": "b", "output": " "}', '{"instruction": "c", "output": null}']
    source.write_text("\n".join([bad[0], source.read_text(), *bad[1:]]))
    with pytest.raises(UserError, match=r"3 of 303 records cannot .*\(likewise line 303\); line 1 .*--skip_bad true"):
        prepare(tmp_path / "out", {"train": source}, encoder)
    prepare(tmp_path / "out", {"train": source}, replace(encoder, skip_bad=True))
    assert np.fromfile(tmp_path / "out/train.bin", "<i4").tolist() == [*range(300)]
    assert "3 of 303 records cannot be used: line 302 has no text in 'output'" in capsys.readouterr().err


def test_documents_among_questions_are_cut_into_blocks_of_which_each_is_trained_on(
    tmp_path: Path, encoder: Encoder
) -> None:
    text, question = "word " * 300, {"instruction": "Why?", "output": "Because. " * 40}
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [{"text": text}, question, {"text": text}])))
    prepare(tmp_path / "out", {"train": tmp_path / "a.jsonl"}, encoder)
    dataset = Dataset(tmp_path / "out", "train", 64)
    n = len(encoder.tokenizer.encode(text, bos=False))
    numbers = dataset.index.tolist()
    assert numbers == sorted(numbers)
    assert numbers.count(0) == numbers.count(2) == -(-n // 64) or numbers.count(0) == -(-(n + 2) // 64)
    assert numbers.count(1) == 1  # a conversation is cut, not divided
    assert dataset.n_cut == 1
