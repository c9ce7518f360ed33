"""Reading records of all forms, and what is said of those that cannot be used."""

import json
from pathlib import Path

from lit_llama.data.records import Fields, split_records
from lit_llama.errors import UserError
from lit_llama.prompt import Message

import numpy as np
import pytest
from builders import CONVERSATIONS, RECORDS, read_records

HI = [Message("user", "Hi"), Message("assistant", "Hello")]


def test_json_and_jsonl_are_read_alike(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(RECORDS))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({k: v for k, v in r.items() if v}) for r in RECORDS))
    assert read_records(tmp_path / "a.json") == read_records(tmp_path / "a.jsonl") == CONVERSATIONS


def test_other_names_of_the_fields(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"instruction": "i", "context": "c", "response": "r", "category": "x"}')
    fields = Fields(input="context", output="response")
    assert read_records(tmp_path / "a.jsonl", fields) == [[Message("user", "i", "c"), Message("assistant", "r")]]


def test_unicode_line_separators_do_not_end_a_record(tmp_path: Path) -> None:
    record = {"instruction": "i", "input": "", "output": "a\u2028b\u0085c"}
    (tmp_path / "a.jsonl").write_text((json.dumps(record, ensure_ascii=False) + "\n") * 2)
    assert read_records(tmp_path / "a.jsonl") == [[Message("user", "i"), Message("assistant", "a\u2028b\u0085c")]] * 2


def test_another_encoding_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes('[{"instruction": "é"}]'.encode("latin-1"))
    with pytest.raises(UserError, match="UTF-8"):
        read_records(tmp_path / "a.json")


def test_a_line_in_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n' + '{"text": "é"}\n'.encode("latin-1"))
    with pytest.raises(UserError, match=r"1 of 2 .* line 2 is not text in UTF-8"):
        read_records(tmp_path / "a.jsonl")
    (tmp_path / "a.csv").write_bytes("text\na\né\n".encode("latin-1"))
    with pytest.raises(UserError, match="not text in UTF-8"):
        read_records(tmp_path / "a.csv")


def test_a_jsonl_file_whose_first_line_is_broken_is_still_one_of_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"\n{"text": "b"}\n')
    with pytest.raises(UserError, match=r"1 of 2 .* line 1 is not valid JSON"):
        read_records(tmp_path / "a.jsonl")


MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", json.dumps({"messages": MESSAGES})),
        ("a.json", json.dumps({"data": [{"messages": MESSAGES}]})),
        ("a.json", '[{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}]'),
        ("a.csv", "\ufeffinstruction,output,topic\nHi,Hello,greeting\n"),
        ("a.json", '{"instruction": "Hi", "input": null, "output": "Hello"}'),
    ],
)
def test_forms_of_records(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert read_records(tmp_path / name) == [HI]


def test_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One.\n\nTwo.")
    (tmp_path / "a.jsonl").write_text('{"text": "One."}\n{"text": "Two."}')
    assert read_records(tmp_path / "a.txt") == [[Message("assistant", "One.\n\nTwo.")]]
    assert read_records(tmp_path / "a.jsonl") == [[Message("assistant", "One.")], [Message("assistant", "Two.")]]


def test_parquet_files_and_folders_of_a_data_set(tmp_path: Path) -> None:
    import datasets

    folder = tmp_path / "set"
    folder.mkdir()
    datasets.Dataset.from_list([{"messages": MESSAGES}] * 3).to_parquet(folder / "train.parquet")
    assert read_records(folder / "train.parquet") == read_records(folder) == [HI] * 3


def test_a_csv_with_line_breaks_in_its_cells(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('question,answer\n"Two\nlines","a, ""b"""\nq,\n')
    with pytest.raises(UserError, match="1 of 2 records cannot be used: line 4 has no text in 'answer'"):
        read_records(tmp_path / "a.csv", Fields("question", output="answer"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '[{"instruction": "i", "output": "o"}, {"instruction": "i"}]',
            "1 of 2 .* record 2 has no 'output', only 'instr",
        ),
        ('[{"instruction": "i", "output": ""}]', "record 1 has no text in 'output'"),
        ('[{"instruction": 3, "output": "o"}]', "record 1 has no text in 'instruction'"),
        ('[{"question": "q", "answer": "a"}]', "no 'instruction', only 'question', 'answer'; .* --instruction_key"),
        ('["text"]', "record 1 is of type str"),
        ('{"a": {}}', "record 1 has no 'instruction', only 'a'"),
        ('[{"instruction": "i", ', "neither"),
        ("[" * 100000, "neither"),
        ('{"instruction": "i", "output": "o"}\n{"instruction"', "line 2"),
        ('{"instruction": "i", "output": "\\ud800"}', "half a character"),
        ('{"a": 1}\n' * 5, r"5 of 5 records .*line 3 has no 'instruction', only 'a' \(and 2 more\)"),
        ('{"messages": [{"role": "tool", "content": "x"}]}', "role 'tool', not one of system, user, assistant"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "ends in a question"),
        ('{"messages": [{"role": "assistant", "content": "x"}, {"role": "user", "content": "x"}]}', "take turns"),
        ('{"messages": []}', "take turns"),
        ('{"messages": "hello"}', "take turns"),
        ('{"messages": [{"role": "user"}]}', "no 'value', only 'role'"),
        ('{"text": "a"}\nb\n{"text": "c"}\n{}', "2 of 4 .* line 2 is not valid JSON; line 4 has no 'instruction'"),
    ],
)
def test_malformed_records_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_records(tmp_path / "a.json")
    assert "\n" not in str(error.value)


def test_splits_are_disjoint_and_depend_on_the_seed_alone() -> None:
    train, validation = split_records(100, None, seed=1).values()
    assert (len(train), len(validation)) == (90, 10)
    order = np.random.default_rng(1).permutation(100)
    assert np.array_equal(np.concatenate([validation, train]), order)
    assert len(split_records(100, 25, seed=1)["validation"]) == 25
    with pytest.raises(UserError):
        split_records(100, 100, seed=1)


@pytest.mark.parametrize("name", ["nowhere.json", "no/where/at/all"])
def test_a_file_that_is_not_there(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_records(tmp_path / name)


def test_a_data_set_of_the_hub_is_loaded_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, split: str) -> list[dict[str, object]]:
        if name != "somebody/greetings":
            raise ValueError(f"{name} cannot be found\nat all")
        return [{"messages": MESSAGES}] if split == "train" else []

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert read_records(Path("somebody/greetings")) == [HI]
    with pytest.raises(UserError, match=r"nobody/nothing is not a file, .* \(nobody/nothing cannot be found\)"):
        read_records(Path("nobody/nothing"))
