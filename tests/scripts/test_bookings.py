"""The quickstart's task: nothing that it is scored on is in the training records, and answers are counted rightly."""

import json
import re
from pathlib import Path

from lit_llama.prompt import STYLES, Encoded
from lit_llama.storage.files import read_json

import bookings
import pytest
from bookings import REQUEST, SETS, WORDS, Record, make_records, read_answer, report
from builders import run_script

RECORDS = make_records(220, seed=1)  # those of the quickstart


def words(text: str) -> set[str]:
    return {*re.findall(r"\w+", text.lower())}


def skeleton(record: Record) -> str:
    """A sentence without its name, place, number, day and time, in small letters and without punctuation."""
    fields = json.loads(record["output"])
    text = record["instruction"].removeprefix(REQUEST)
    number = read_json(WORDS)["numbers"].split()[fields["people"] - 1]
    for value in (fields["time"], fields["name"], fields["place"], fields["day"]):
        text = text.replace(value, "X")
    return " ".join(re.findall(r"\w+", re.sub(rf"\b({fields['people']}|{number})\b", "X", text).lower()))


@pytest.mark.parametrize("name", SETS)
def test_no_name_or_place_that_is_scored_is_in_a_training_record(name: str) -> None:
    known = words(" ".join(record["instruction"] for record in RECORDS["train"]))
    for record in RECORDS[name]:
        fields = json.loads(record["output"])
        assert not words(fields["name"]) & known
        assert not words(fields["place"]) & known


def test_no_new_wording_is_in_a_training_record() -> None:
    known = {skeleton(record) for record in RECORDS["train"]}
    new = {skeleton(record) for record in RECORDS["new_wordings"]}
    assert len(known) > 150
    assert len(new) == 10
    openings = {" ".join(text.split()[:3]) for text in known}
    assert not new & known
    assert not {" ".join(text.split()[:3]) for text in new} & openings


def test_sentences_hold_what_their_answers_say_and_none_occurs_twice() -> None:
    everything = [record for records in RECORDS.values() for record in records]
    assert len({record["instruction"] for record in everything}) == len(everything)
    for record in everything:
        fields = json.loads(record["output"])
        assert list(fields) == ["name", "place", "people", "day", "time"]
        assert all(str(fields[key]) in record["instruction"] for key in ("name", "place", "day", "time"))


def test_a_seed_makes_the_same_records() -> None:
    assert make_records(5, seed=1) == make_records(5, seed=1)
    assert make_records(5, seed=1) != make_records(5, seed=2)


def test_valid_is_what_a_parser_takes_for_an_object_and_exact_each_field() -> None:
    right = {"name": "Ada", "place": "Old Oak", "people": 2, "day": "Friday", "time": "8 pm"}
    assert read_answer(json.dumps(right)) == right
    assert [read_answer(text) for text in ("", "[1]", "Sure! {}", '{"name": "Ada"', "2")] == [None] * 5
    reordered = dict(reversed(right.items()))
    answers = [json.dumps(reordered), json.dumps({**right, "people": "2"}), json.dumps({**right, "extra": 1}), "no"]
    records = [{"instruction": f"{REQUEST}Sentence {i}.", "output": json.dumps(right)} for i in range(4)]
    lines = report("new", records, answers, show=1).splitlines()
    assert lines[:4] == ["> Sentence 0.", f"{answers[0]} (right)", "> Sentence 1.", f"{answers[1]} (wrong)"]
    assert lines[4] == "new: 3 of 4 valid JSON, 1 exact"


def test_a_model_is_asked_with_and_without_examples(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    asked: list[int] = []

    def parrot(_model: object, prompts: list[list[int]], *_: object) -> list[list[int]]:
        asked.extend(map(len, prompts))
        return [[65]] * len(prompts)

    monkeypatch.setattr(bookings, "generate_batch", parrot)
    monkeypatch.setattr(bookings, "encode", lambda _, messages, __: Encoded([0] * len(messages), []))
    monkeypatch.setattr(bookings, "STYLE", STYLES["plain"])
    assert run_script("bookings", "--records_dir", tmp_path) is None
    flags = ("--records_dir", tmp_path, "--checkpoint_path", checkpoint, "--score", "true", "--n", 3)
    assert run_script("bookings", *flags, "--show", 2) is None
    assert run_script("bookings", *flags, "--shots", 3) is None
    out = capsys.readouterr().out
    assert out.count("new names and places: 0 of 3 valid JSON, 0 exact") == 2
    assert out.count("new wordings, too: 0 of 3 valid JSON, 0 exact") == 2
    assert asked == [1] * 6 + [7] * 6  # messages: three examples are six of them
