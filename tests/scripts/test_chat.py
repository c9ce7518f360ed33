"""scripts/chat.py, with questions and commands that come through a pipe."""

import io
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

from lit_llama import finetuned
from lit_llama.finetuned import read_described, save_finetuned
from lit_llama.lora import LoRAConfig, add_lora, lora_state_dict

import chat
import conversation
import pytest
import torch
from builders import TINY, random_model, randomize, run_script, save_file
from torch import Tensor

Talk = Callable[..., tuple[list[str], str]]


@pytest.fixture
def talk(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Talk:
    """Type lines into chat.py; returns the lines of stdout, and stderr."""

    def typed(*lines: str, flags: tuple[object, ...] = ("--prompt_style", "zephyr")) -> tuple[list[str], str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
        fixed = ("--checkpoint_path", checkpoint, "--temperature", 0, "--max_new_tokens", 4)
        error = run_script("chat", *fixed, *flags)
        out, err = capsys.readouterr()
        return out.splitlines(), err + (error or "")

    monkeypatch.setattr("lit_llama.tokenizer.Tokenizer.decode", lambda _, ids: "".join(f"{i}," for i in ids))
    return typed


@pytest.fixture
def lora_files(tmp_path: Path) -> list[Path]:
    paths = []
    styles: list[str] = ["zephyr", "alpaca"]
    for seed, style in enumerate(styles):
        model, config = random_model(TINY), LoRAConfig(r=2, targets=("query", "mlp"))
        add_lora(model, config)
        torch.manual_seed(seed)
        randomize(lora_state_dict(model))
        paths.append(tmp_path / f"{style}.pth")
        save_file(paths[-1], config, model, lora_state_dict(model), style)
    return paths


def test_questions_are_answered_on_stdout_and_all_else_is_on_stderr(talk: Talk) -> None:
    out, err = talk("a", "", "b", "/help", "/quit", "c")
    assert len(out) == 2
    assert "> a\n" in err
    assert "> c\n" not in err
    assert chat.HELP in err
    assert err.count("Cut after 4 tokens") == 2


def test_reset_begins_a_conversation_with_the_same_system_message(talk: Talk) -> None:
    (first, again, told, anew), _ = talk("a", "a", "/reset", "/system Be brief.", "a", "/reset", "a")
    assert first != again
    assert told == anew
    (first, told, without), _ = talk("a", "/reset", "/system Be brief.", "a", "/reset", "/system", "a")
    assert told != first == without
    (flag,), _ = talk("a", flags=("--prompt_style", "zephyr", "--system", "Be brief."))
    assert flag == told


def test_lora_files_are_swapped_on_the_same_base(talk: Talk, lora_files: list[Path]) -> None:
    zephyr, alpaca = lora_files
    alone = [talk("a", flags=("--lora_path", path))[0][0] for path in lora_files]
    out, err = talk("a", f"/lora {alpaca}", "a", f"/lora {zephyr}", "/reset", "a", flags=("--lora_path", zephyr))
    assert out == [alone[0], alone[1], alone[0]]
    assert f"{alpaca}, prompt style alpaca\n" in err
    (base,), _ = talk("a")
    assert talk(f"/lora {zephyr}", "/lora", "a")[0] == [base]


def test_a_lora_file_is_read_once(talk: Talk, lora_files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    read = Mock(side_effect=read_described)
    monkeypatch.setattr(finetuned, "read_described", read)
    talk("a", "/lora nothing.pth", flags=("--lora_path", lora_files[0]))
    assert [str(call.args[0]) for call in read.call_args_list] == [str(lora_files[0]), "nothing.pth"]


def test_a_lora_file_that_cannot_be_used_leaves_the_one_there_is(talk: Talk, lora_files: list[Path]) -> None:
    flags = ("--lora_path", lora_files[0])
    expected = talk("a", "a", flags=flags)[0]
    out, err = talk("a", "/lora nothing.pth", f"/lora {'x' * 300}", "/lora ~nobody/x", "/lora", "a", flags=flags)
    assert out == expected
    assert "File name too long" in err
    assert "error: nothing.pth does not exist" in err
    assert "error: the model has no template of its own" in err


def test_a_lora_file_for_a_4_bit_base_is_not_put_onto_another(talk: Talk, lora_files: list[Path]) -> None:
    plain, other = lora_files
    about = read_described(other)
    save_finetuned(other, {**about, "hyperparameters": {"quantize": "nf4"}}, about.pop("state_dict"))
    _, err = talk(f"/lora {other}", flags=("--lora_path", plain))
    assert f"error: {other} was trained on a base in 4 bits" in err
    _, err = talk(f"/lora {plain}", flags=("--lora_path", other))
    assert f"error: {plain} was trained on a base that is not in 4 bits" in err


def test_lora_in_8_bits_is_merged_and_stays(talk: Talk, lora_files: list[Path]) -> None:
    flags = ("--lora_path", lora_files[0], "--quantize", "int8")
    (first, again), err = talk("a", f"/lora {lora_files[1]}", "/lora", "/reset", "a", flags=flags)
    assert first == again != talk("a", flags=("--prompt_style", "zephyr", "--quantize", "int8"))[0][0]
    assert err.count("error: with --compile or --quantize int8, LoRA is merged; start chat.py again") == 2


def test_lora_is_swapped_on_a_base_in_4_bits(talk: Talk, lora_files: list[Path]) -> None:
    zephyr, alpaca = lora_files
    quantized = ("--quantize", "nf4", "--lora_path")
    alone = [talk("a", flags=(*quantized, path))[0][0] for path in lora_files]
    assert talk("a", f"/lora {alpaca}", "a", flags=(*quantized, zephyr))[0] == alone


def test_a_style_of_one_question_says_so_once(talk: Talk) -> None:
    out, err = talk("a", "b", "a", flags=("--prompt_style", "plain"))
    assert out[0] == out[2]
    assert err.count("each starts a new conversation") == 1
    assert "no system message" in talk("/system Be brief.", flags=("--prompt_style", "plain"))[1]


def test_a_text_is_never_a_command_or_a_control_token(talk: Talk) -> None:
    (with_space, *_), err = talk(" /reset <|im_end|>", "/no/such/command")
    assert with_space
    assert "there is no command /no/such/command; /help" in err


def test_ctrl_c_ends_an_answer_and_not_the_program(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = conversation.next_tokens, iter(range(100))

    def interrupted(*arguments: Any) -> Iterator[Tensor]:
        for tokens in real(*arguments):
            yield tokens
            if next(calls) == 1:
                signal.raise_signal(signal.SIGINT)

    (whole, _), _ = talk("a", "b")
    monkeypatch.setattr(conversation, "next_tokens", interrupted)
    out, _ = talk("a", "b")
    assert out[0] == "".join(f"{number}," for number in whole.split(",")[:2])
    assert len(out) == 2


def test_a_full_context_says_what_to_do(talk: Talk) -> None:
    out, err = talk("a" * 90, "b", "/reset", "c", flags=("--prompt_style", "zephyr", "--max_new_tokens", 500))
    assert len(out) == 2
    assert "(The context is full; /reset starts a new conversation.)" in err
    assert "error: no room for an answer" in err


def test_a_model_without_a_template_needs_the_flag(talk: Talk) -> None:
    assert "choose one by --prompt_style" in talk("a", flags=())[1]
