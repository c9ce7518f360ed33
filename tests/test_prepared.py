"""Preparing more records than fit into memory, in several processes."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from builders import RECORDS, command, peak_of

from lit_llama import arrays, encoder
from lit_llama.encoder import Encoder, in_processes
from lit_llama.errors import UserError
from lit_llama.prepared import ARRAYS, prepare
from lit_llama.prompt import encode
from lit_llama.records import Fields, conversation
from lit_llama.tokenizer import Tokenizer


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """300 records, all different, which are several chunks if one has 10."""
    path = tmp_path / "records.jsonl"
    rows = ({**RECORDS[i % 14], "instruction": f"{i}: {RECORDS[i % 14]['instruction']}"} for i in range(300))
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def process_of(number: int) -> tuple[int, int]:
    return number, os.getpid()


def test_calls_are_shared_by_processes_in_order_and_not_drawn_far_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "N_CORES", 2)
    drawn = []
    results = in_processes(process_of, (drawn.append(i) or i for i in range(200)), num_workers=2)
    first = next(results)
    assert len(drawn) < 30
    numbers, processes = zip(first, *results, strict=True)
    assert numbers == tuple(range(200))
    assert len({*processes}) == 2
    assert os.getpid() not in processes
    assert [*in_processes(process_of, range(3), num_workers=2)] == [process_of(i) for i in range(3)]


@pytest.mark.parametrize(("num_workers", "most_pieces", "most_values"), [(1, 2**16, 2**22), (2, 70, 300), (3, 1, 1)])
def test_arrays_are_those_of_records_encoded_one_by_one_in_the_order_of_the_split(
    tmp_path: Path,
    model_folder: Path,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    num_workers: int,
    most_pieces: int,
    most_values: int,
) -> None:
    tokenizer = Tokenizer(model_folder / "tokenizer.json")
    monkeypatch.setattr(encoder, "N_CORES", 2)
    monkeypatch.setattr(encoder, "CHUNK", 10)
    monkeypatch.setattr(arrays, "MOST_PIECES", most_pieces)
    monkeypatch.setattr(arrays, "MOST_VALUES", most_values)
    prepare(tmp_path / "out", {"train": source}, Encoder(tokenizer, "plain"), 7, 20, num_workers)
    records = [conversation(json.loads(line), Fields()) for line in source.read_text().split("\n")]
    order = np.random.default_rng(7).permutation(300)
    for split, numbers in (("validation", order[:20]), ("train", order[20:])):
        tokens, offsets, spans = [], [0], []
        for ids, trained in (encode("plain", records[i], tokenizer) for i in numbers):
            spans.append([offsets[-1] + trained.index(True), offsets[-1] + len(ids)])
            tokens += ids
            offsets.append(len(tokens))
        expected = np.array(tokens, np.int32), np.array(offsets, np.int64), np.array(spans, np.int64)
        for name, array in zip(ARRAYS, expected, strict=True):
            np.save(tmp_path / "expected.npy", array)
            assert (tmp_path / "out" / f"{split}_{name}.npy").read_bytes() == (tmp_path / "expected.npy").read_bytes()


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_record_that_a_template_cannot_take_is_named_by_its_place(
    tmp_path: Path, model_folder: Path, source: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    monkeypatch.setattr(encoder, "N_CORES", 2)
    monkeypatch.setattr(encoder, "CHUNK", 10)
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user", "assistant")]
    source.write_text(f"{source.read_text()}\n{json.dumps({'messages': turns})}")
    to_alpaca = Encoder(Tokenizer(model_folder / "tokenizer.json"), "alpaca")
    with pytest.raises(
        UserError, match=r"records\.jsonl, line 301: the prompt style alpaca takes one question"
    ) as error:
        prepare(tmp_path / "out", {"train": source}, to_alpaca, num_workers=num_workers)
    assert "\n" not in str(error.value)
    assert [*tmp_path.iterdir()] == [source]


@pytest.mark.slow
def test_preparing_and_opening_records_takes_less_memory_than_their_tokens(tmp_path: Path, model_folder: Path) -> None:
    actions = []
    for name, n in (("few", 500), ("many", 20_000)):
        rows = ({"text": f"{i} is a number that is followed by others, and so on. " * 4} for i in range(n))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        source, out = f"Path({str(tmp_path / name)!r} + '.jsonl')", f"Path({str(tmp_path / name)!r})"
        actions.append(f"prepare({out}, {{'train': {source}}}, encoder, 1, 10); Dataset({out}, 'train', 64)")
    before = f"""
import lit_llama.arrays, lit_llama.data
from lit_llama.data import Dataset
from lit_llama.encoder import Encoder
from lit_llama.prepared import prepare
from lit_llama.tokenizer import Tokenizer
lit_llama.arrays.MOST_VALUES = 2**16
lit_llama.arrays.BLOCK = lit_llama.data.BLOCK = 2**10
encoder = Encoder(Tokenizer(Path({str(model_folder / "tokenizer.json")!r})), "plain")
{actions[0]}"""
    peak = peak_of(before, actions[1])
    assert peak < (tmp_path / "many" / "train_tokens.npy").stat().st_size


@pytest.fixture
def running(tmp_path: Path, checkpoint: Path, source: Path) -> subprocess.Popen[str]:
    """A preparation that is tokenising, with some seconds to go."""
    source.write_text("\n".join([source.read_text()] * 300))
    flags = ("--train_file", source, "--data_dir", tmp_path / "out", "--pretrained_path", checkpoint)
    process = subprocess.Popen(
        command("scripts/prepare_json.py", *flags), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stderr
    assert "Checking" in process.stderr.readline()
    time.sleep(0.5)
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
