import pytest

from lit_llama.errors import UserError
from lit_llama.prompt import format_prompt


def test_alpaca_has_the_instruction_and_the_input_if_there_is_one() -> None:
    without = format_prompt("alpaca", "Add the numbers.")
    assert without.startswith("Below is an instruction that describes a task. Write")
    assert without.endswith("### Instruction:\nAdd the numbers.\n\n### Response:\n")
    with_input = format_prompt("alpaca", "Add the numbers.", "1, 2")
    assert with_input.startswith("Below is an instruction that describes a task, paired with an input")
    assert with_input.endswith("### Instruction:\nAdd the numbers.\n\n### Input:\n1, 2\n\n### Response:\n")


def test_an_unknown_style_is_refused() -> None:
    with pytest.raises(UserError, match="alpaca, alpaca-stanford, chatml, smollm2, plain"):
        format_prompt("chat", "Hi")
