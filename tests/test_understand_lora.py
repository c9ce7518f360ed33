"""What howto/understand_lora.md claims: its code prints what it says, its quotes are the source, its tests exist."""

import ast
import contextlib
import io
import re

from lit_llama.lora import LoRAConfig, LoRALinear
from lit_llama.model import Linear

import pytest
import torch
from builders import ROOT

GUIDE = (ROOT / "howto" / "understand_lora.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", GUIDE, re.DOTALL)
PROGRAMS = [block for block in BLOCKS if block[1]]
QUOTES = [code for code, output in BLOCKS if not output]


@pytest.mark.parametrize("program", PROGRAMS, ids=range(len(PROGRAMS)))
def test_a_program_prints_what_stands_below_it(program: tuple[str, str]) -> None:
    code, expected = program
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(compile(code, "understand_lora.md", "exec"), {})
    assert output.getvalue() == expected


@pytest.mark.parametrize("quote", QUOTES, ids=range(len(QUOTES)))
def test_a_quote_is_the_source(quote: str) -> None:
    assert quote in (ROOT / "lit_llama" / "lora.py").read_text(encoding="utf-8")


def test_there_are_programs_and_quotes() -> None:
    assert len(PROGRAMS) >= 2
    assert len(QUOTES) >= 4


def test_every_test_that_is_named_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", GUIDE)
    assert len(named) >= 8
    for file, test in named:
        functions = [node.name for node in ast.walk(ast.parse((ROOT / file).read_text())) if hasattr(node, "name")]
        assert test in functions, f"{file} has no {test}"


def layer_with_gradients(B_is_zero: bool) -> tuple[LoRALinear, torch.Tensor, torch.Tensor]:
    """A layer after a backward pass, its inputs (tokens, in) and the gradients of its outputs (tokens, out)."""
    layer = LoRALinear(Linear(12, 9), {"projection": 9}, LoRAConfig(3, 5, 0.0, ("projection",)))
    if not B_is_zero:
        layer.lora_B.data.normal_()
    x, dh = torch.randn(4, 12), torch.randn(4, 9)
    layer(x).backward(dh)
    return layer, x, dh


def test_gradients_are_those_of_the_guide() -> None:
    layer, x, dh = layer_with_gradients(B_is_zero=False)
    A, B, s = layer.lora_A.detach(), layer.lora_B.detach(), 5 / 3
    tokens = list(zip(x, dh, strict=True))
    dB = sum(s * torch.outer(dh_t, A @ x_t) for x_t, dh_t in tokens)
    dA = sum(s * torch.outer(B.T @ dh_t, x_t) for x_t, dh_t in tokens)
    torch.testing.assert_close(layer.lora_B.grad, dB)
    torch.testing.assert_close(layer.lora_A.grad, dA)


def test_only_B_moves_in_the_first_step() -> None:
    layer, x, dh = layer_with_gradients(B_is_zero=True)
    A, B = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()
    optimizer = torch.optim.AdamW([layer.lora_A, layer.lora_B], lr=0.1, weight_decay=0.0)
    optimizer.step()
    assert torch.equal(layer.lora_A, A)
    assert not torch.equal(layer.lora_B, B)
    optimizer.zero_grad()
    layer(x).backward(dh)
    optimizer.step()
    assert not torch.equal(layer.lora_A, A)


def test_twice_the_scale_moves_the_update_twice_as_far_in_the_first_step_of_adamw() -> None:
    moved = []
    for alpha in (8, 16):
        torch.manual_seed(0)
        layer = LoRALinear(Linear(12, 9), {"projection": 9}, LoRAConfig(4, alpha, 0.0, ("projection",)))
        optimizer = torch.optim.AdamW([layer.lora_A, layer.lora_B], lr=0.1, eps=1e-12)
        layer(torch.randn(4, 12)).backward(torch.randn(4, 9))
        optimizer.step()
        moved.append(layer.delta().detach())
    torch.testing.assert_close(moved[1], 2 * moved[0])


LAB = (ROOT / "howto" / "lab.md").read_text(encoding="utf-8")


def test_the_guide_is_one_sitting_with_a_picture_in_each_of_its_ideas() -> None:
    assert GUIDE.count("\n") <= 300
    first_seven = GUIDE.partition("\n## 8.")[0]
    assert len(re.findall(r"^!\[[^]]{20,}\]", first_seven, re.MULTILINE)) >= 5


@pytest.mark.parametrize("section", re.split(r"^## ", LAB, flags=re.MULTILINE)[3:], ids=lambda text: text[:20])
def test_numbers_of_the_labs_prose_are_those_of_its_tables(section: str) -> None:
    """Each decimal and each percentage that the text of an experiment names is a cell of its table, or rounded."""
    figures = "".join(re.findall(r"<!-- figures:.*?<!-- end of", section, re.DOTALL))
    prose = re.sub(
        r"<!-- figures:.*?<!-- end of [\w-]+ -->|\]\([^)]*\)|[Ss]ection \d\.\d", "", section, flags=re.DOTALL
    )
    known = {float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", figures.replace(",", ""))}
    for number in re.findall(r"(?<![\w.])-?\d+\.\d+(?![\w.])", prose):
        digits = len(number.partition(".")[2])
        assert any(round(abs(value), digits) == abs(float(number)) for value in known), f"{number} is in no table"
