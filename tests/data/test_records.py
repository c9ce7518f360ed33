"""Reading records of all forms, and what is said of those that cannot be used."""

import gzip
import json
import subprocess
from pathlib import Path

from lit_llama.data.records import Fields, conversation
from lit_llama.data.sources import split_records
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


TWICE = '{"instruction": "a", "output": "b", "output": "c"}', '{"messages": [{"role": "user", "role": "assistant"}]}'


@pytest.mark.parametrize("record", TWICE, ids=["record", "message"])
@pytest.mark.parametrize("form", ["{0}\n{0}", "[{0}, {0}]"], ids=["lines", "list"])
def test_a_field_that_comes_twice_is_told(record: str, form: str, tmp_path: Path) -> None:
    """Python takes the last one, without a word."""
    (tmp_path / "a.json").write_text(form.format(record))
    with pytest.raises(UserError, match=r"2 of 2 .* has '(output|role)' twice"):
        read_records(tmp_path / "a.json")


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
        ('[{"instruction": {"a": 3}, "output": "o"}]', "record 1 has a value of type dict in 'instruction', not text"),
        ('[{"question": "q", "answer": "a"}]', "no 'instruction', only 'question', 'answer'; .* --instruction_key"),
        ('["text"]', "record 1 is of type str"),
        ('{"a": {}}', "record 1 has no 'instruction', only 'a'"),
        ('[{"instruction": "i", ', "neither"),
        ("[" * 100000, "neither"),
        ('{"instruction": "i", "output": "o"}\n{"instruction"', "line 2"),
        ('{"instruction": "i", "output": "\\ud800"}', "half a character"),
        (
            '{"a": 1}\n' * 5,
            r"5 of 5 records .*line 1 has no 'instruction', only 'a' \(likewise line 2, line 3, 2 more\)",
        ),
        ('{"messages": [{"role": "tool", "content": "x"}]}', "role 'tool', not one of system, user, assistant"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "ends in a question"),
        ('{"messages": [{"role": "assistant", "content": "x"}, {"role": "user", "content": "x"}]}', "take turns"),
        ('{"messages": []}', "has no messages"),
        ('{"messages": "hello"}', "messages that are of type str, not a list"),
        ('{"messages": {"role": "user"}}', "messages that are of type dict, not a list"),
        ('{"messages": [{"role": "user"}]}', "no 'content', only 'role'"),
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


def conversation_of(**row: object) -> list[Message]:
    return conversation(row, Fields())


ALPACA, CHAT = {"instruction": "Hi", "output": "Hello"}, {"messages": MESSAGES}


@pytest.mark.parametrize("row", [ALPACA, CHAT])
def test_a_system_message_and_the_history_come_first(row: dict) -> None:
    system = Message("system", "Be kind.")
    assert conversation_of(**row, system="Be kind.") == [system, *HI]
    assert conversation_of(**row, system_prompt="Be kind.", id=3, source="web", score=0.5) == [system, *HI]
    assert conversation_of(**row, system=" ", tools=[], images=None, weight=1, label=True) == HI
    earlier = [Message("user", "1?"), Message("assistant", "2.")]
    assert conversation_of(**ALPACA, system="Be kind.", history=[["1?", "2."]]) == [system, *earlier, *HI]


@pytest.mark.parametrize("name", ["weight", "loss_weight", "loss", "train", "trainable"])
@pytest.mark.parametrize("value", [0, 0.0, False, "0", "false"])
def test_an_answer_of_weight_0_is_not_learned(name: str, value: object) -> None:
    with pytest.raises(ValueError, match="marked as not to be learned"):
        conversation_of(**ALPACA, **{name: value})
    turns = [*MESSAGES[:1], {**MESSAGES[1], name: value}]
    with pytest.raises(ValueError, match="all have the weight 0"):
        conversation_of(messages=turns)
    messages = conversation_of(messages=[*turns, *MESSAGES])
    assert [message.learned for message in messages if message.role == "assistant"] == [False, True]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**ALPACA, "label": False}, "marked as not to be learned"),
        ({**CHAT, "kto_tag": False}, "marked as not to be learned"),
        ({**CHAT, **ALPACA}, "has 'instruction' beside messages"),
        ({"train": [ALPACA], "test": [ALPACA]}, "has no 'instruction', only 'train', 'test'"),
        ({"messages": [MESSAGES[0], {**MESSAGES[1], "reasoning": "hm"}]}, "has 'reasoning'"),
        ({**ALPACA, "weight": 0.5}, "has a weight of 0.5, expected 0 or 1"),
        ({**ALPACA, "tools": [{"name": "f"}]}, "has 'tools', which cannot be used here"),
        ({**ALPACA, "images": ["a.png"]}, "has 'images'"),
        ({**ALPACA, "context": "It rained."}, "has 'context'"),
        ({**ALPACA, "history": ["a", "b"]}, "not a list of pairs"),
        ({"messages": [MESSAGES[0], {**MESSAGES[1], "tool_calls": [{}]}]}, "has 'tool_calls'"),
        ({"messages": [MESSAGES[0], {**MESSAGES[1], "reasoning_content": "hm"}]}, "has 'reasoning_content'"),
        ({"text": "Hi", "role": "prompter"}, "has 'role' beside 'text'"),
        ({"text": "bad film", "label": 1}, "has 'label' beside 'text'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "a part of type image_url in 'content'"),
        ({**ALPACA, "output": {"a": 1}}, "a value of type dict in 'output'"),
        ({**ALPACA, "history": True}, "not a list of pairs"),
        ({**CHAT, "history": [["a", "b"]]}, "has a 'history', which goes with an instruction"),
        ({"messages": [{"role": "user", "content": None}]}, "has no text in 'content'"),
        ({"messages": [{"content": "Hi"}]}, "a message of role 'none'"),
    ],
)
def test_what_would_be_left_out_is_refused_by_its_name(row: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        conversation(row, Fields())


def test_fields_are_used_under_another_name_or_ignored_on_request() -> None:
    row = {"instruction": "Why?", "context": "It rained.", "output": "Clouds.", "images": ["a.png"]}
    fields = Fields(input="context", ignored=("images",))
    assert conversation(row, fields) == [Message("user", "Why?", "It rained."), Message("assistant", "Clouds.")]


def test_numbers_parts_and_nothing_are_read_as_they_are_meant() -> None:
    assert conversation_of(instruction="6 x 7?", input=0, output=42) == [
        Message("user", "6 x 7?", "0"),
        Message("assistant", "42"),
    ]
    assert conversation_of(instruction="True?", input=float("nan"), output=True)[1].content == "true"
    assert conversation_of(instruction="Hi", input=[], output="Hello", messages=None) == HI
    parts = [{"type": "text", "text": "He"}, {"type": "text", "text": "llo"}]
    turns = [{"role": "user", "content": "Hi", "from": None}, {"role": "assistant", "content": parts}]
    assert conversation_of(messages=turns) == conversation_of(messages=None, conversations=turns) == HI
    assert conversation_of(messages=json.dumps(MESSAGES)) == HI


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.CSV", b"instruction,output\nHi,Hello\n"),
        ("a.tsv", b"instruction\toutput\r\nHi\tHello\r\n"),
        ("a.csv", "\ufeff instruction ;output;;\n\nHi;Hello;;\n;;;\n".encode()),
        ("a.csv", b"sep=|\r\ninstruction|output\r\nHi|Hello\r\n"),
        ("a.csv", "instruction\toutput\nHi\tHello\n".encode("utf-16")),
        ("a.jsonl", f"{json.dumps(ALPACA)}\n".encode("utf-16")),
        ("a.json", json.dumps([ALPACA], indent=1).encode("utf-16")),
        ("a.jsonl.gz", gzip.compress(json.dumps(ALPACA).encode() + b"\n", mtime=0)),
        ("a.json", gzip.compress(json.dumps([ALPACA]).encode(), mtime=0)),
        ("a.csv.gz", gzip.compress(b"instruction,output\nHi,Hello\n", mtime=0)),
        ("a.JSON", json.dumps([ALPACA]).encode()),
    ],
)
def test_tables_and_compressed_files(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert read_records(tmp_path / name) == [HI]


def test_json_lines_in_utf_16_are_cut_at_line_feeds_alone(tmp_path: Path) -> None:
    lines = [json.dumps(ALPACA | {"output": text}, ensure_ascii=False) for text in ("a\u2028b", "c\x85d")]
    (tmp_path / "a.jsonl").write_bytes("\r\n".join(lines).encode("utf-16"))
    assert [record[1].content for record in read_records(tmp_path / "a.jsonl")] == ["a\u2028b", "c\x85d"]


def test_a_row_with_more_or_fewer_cells_than_the_header_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("instruction,output\nHi,Hello, there\nHi\nHi,Hello\n")
    with pytest.raises(UserError, match=r"2 of 3 .*line 2 has 3 cells.*expected 2.*line 3 has 1 cell"):
        read_records(tmp_path / "a.csv")


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("instruction,output,output,,\nHi,Hello,there,,\n")
    with pytest.raises(UserError, match="two columns are called 'output'; rename one"):
        read_records(tmp_path / "a.csv")


def test_a_long_cell_is_read_and_broken_quotes_are_named_by_their_line(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"instruction,output\nHi,{'x' * 200_000}\n")
    assert len(read_records(tmp_path / "a.csv")[0][1].content) == 200_000
    (tmp_path / "a.csv").write_text('instruction,output\nHi,Hello\nHi,"Hel"lo\n')
    with pytest.raises(UserError, match="line 3: not valid CSV"):
        read_records(tmp_path / "a.csv")


def test_another_encoding_is_named_with_line_and_byte(tmp_path: Path) -> None:
    (tmp_path / "my a.csv").write_bytes("instruction,output\nHi,Grüße\n".encode("cp1252"))
    with pytest.raises(UserError, match=r"not text in UTF-8 \(line 2, byte 6\); convert it") as raised:
        read_records(tmp_path / "my a.csv")
    command = str(raised.value).partition("as by ")[2]
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    assert read_records(tmp_path / "utf8-my a.csv")[0][1].content == "Grüße"


def test_a_missing_file_is_not_looked_up_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("looked up"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for path in ("data/mine", "somewhere/mine.jsonl", "somewhere/mine.CSV.gz", "somewhere/mine.parquet"):
        with pytest.raises(UserError, match="does not exist"):
            read_records(Path(path))


def test_a_truncated_gz_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps(ALPACA).encode() * 99)[:-20])
    with pytest.raises(UserError, match=r"could not read .*a\.jsonl\.gz"):
        read_records(tmp_path / "a.jsonl.gz")
