"""The instruction data that ships with the repository."""

import re
from pathlib import Path

import pytest
from builders import read_records

FOLDER = Path(__file__).parent.parent / "data" / "ml_questions"


def normalised(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def test_there_are_enough_records_and_none_is_in_two_files() -> None:
    train, validation = read_records(FOLDER / "train.json"), read_records(FOLDER / "validation.json")
    new_topics = read_records(FOLDER / "validation_new_topics.json")
    assert len(new_topics) == 20
    assert len(train) >= 300
    assert len(validation) >= 30
    questions = [normalised(f"{asked.content} {asked.input}") for asked, _ in train + validation + new_topics]
    assert len(set(questions)) == len(questions)
    assert "Please explain how weight decay works" in [asked.content for asked, _ in validation]


@pytest.mark.parametrize("name", ["train", "validation", "validation_new_topics"])
def test_answers_are_short(name: str) -> None:
    for record in read_records(FOLDER / f"{name}.json"):
        assert 15 <= len(record[1].content.split()) <= 80, record
