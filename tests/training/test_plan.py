"""What a plan doubts: each fault is named with its numbers, and nothing of a run that is in order."""

from dataclasses import replace
from pathlib import Path

from lit_llama.data.batches import Dataset
from lit_llama.lora import LoRAConfig, add_lora, mark_only_lora_as_trainable
from lit_llama.model import LLaMA
from lit_llama.prompt import STYLES
from lit_llama.tokenizer import Tokenizer
from lit_llama.training.plan import doubts

import pytest
from builders import TINY, prepare_records
from builders_chat import write_chat_tokenizer

ENDLESS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}\n{% endfor %}"
TWO_BOS = "<s><s>" + STYLES["chatml"]
RATE = 5e-4 * (2000 / TINY.n_embd) ** 0.781


def records(first: int, n: int, answer: str = "It is {} and nothing else.") -> list[dict[str, str]]:
    return [{"instruction": f"What is {i}?", "output": answer.replace("{}", str(i))} for i in range(first, first + n)]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return write_chat_tokenizer(tmp_path / "tokenizer")


def found(
    tmp_path: Path,
    tokenizer: Tokenizer,
    train: list | None = None,
    validation: list | None = None,
    style: str = STYLES["chatml"],
    block_size: int = 128,
    own: str | None = STYLES["chatml"],
    rate: float = RATE,
    r: int = 8,
) -> str:
    splits = {"train": train or records(0, 30), "validation": validation or records(100, 10)}
    prepare_records(tmp_path / "data", splits, tokenizer.path, style)
    data, val_data = (Dataset(tmp_path / "data", split, block_size) for split in splits)
    llama = LLaMA(replace(TINY, vocab_size=450, n_embd=256, n_hidden=256))
    add_lora(llama, LoRAConfig(r))
    mark_only_lora_as_trainable(llama)
    return "\n".join(doubts(data, val_data, llama, tokenizer, own, rate * (32 / 256) ** 0.781))


def test_a_run_that_is_in_order_is_not_doubted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    assert found(tmp_path, tokenizer) == ""
    assert found(tmp_path, tokenizer, style=STYLES["llama3"], own=None) == ""
    assert found(tmp_path, tokenizer, [{"text": "A document. " * 99}] * 3, [{"text": "Another one. " * 99}]) == ""
    assert found(tmp_path, tokenizer, rate=10 * RATE) == ""
    assert found(tmp_path, tokenizer, style=STYLES["llama2"], own=None) == ""


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"style": STYLES["alpaca"]}, "note: the data is in the prompt style alpaca, not in the model's own"),
        ({"style": STYLES["chatml"] + " "}, "note: the data is in the prompt style of a file, not in the model's own"),
        ({"style": ENDLESS, "own": None}, "30 of 30 records do not end in a token that ends an answer"),
        ({"style": TWO_BOS, "own": None}, "30 of 30 records begin with two bos"),
        ({"train": records(0, 30, "It is {}.<|im_end|>")}, "30 of 30 records spell control tokens"),
        ({"train": records(0, 30, "[INST] It is {}. [/INST]")}, "30 of 30 records spell control tokens"),
        (
            {"train": records(0, 30, "It is {}. " * 20), "block_size": 64},
            "30 of 30 records are truncated; raise --block_size",
        ),
        ({"validation": records(20, 20)}, "10 of the records to train on are also validated on"),
        ({"validation": records(100, 2)}, "tokens to validate on, so the validation loss says little"),
        ({"rate": 50 * RATE}, "warning: --learning_rate is"),
        ({"rate": RATE / 50}, "is usual for 256 channels"),
        ({"train": records(200, 300), "r": 1}, "tokens are trained on, more than 1,792 parameters can hold"),
    ],
)
def test_a_fault_is_named_alone(fault: dict, message: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    said = found(tmp_path, tokenizer, **fault)
    assert message in said
    assert said.count("\n") == 0
