from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from lit_llama.errors import UserError
from lit_llama.generation import Sampling, generate
from lit_llama.model import LLaMA
from lit_llama.prompt import Message, encode, stop_ids
from lit_llama.tokenizer import Tokenizer

import conversation as module
import pytest
from builders import TINY, random_model
from conversation import Conversation

GREEDY = Sampling(12, temperature=0)


@pytest.fixture
def tokenizer(model_folder: Path) -> Tokenizer:
    return Tokenizer(model_folder / "tokenizer.json")


@pytest.fixture
def model() -> LLaMA:
    return random_model(replace(TINY, block_size=1024))


@pytest.fixture
def talk(model: LLaMA, tokenizer: Tokenizer) -> Conversation:
    return Conversation(model, tokenizer, "zephyr")


def answer(talk: Conversation, question: str, sampling: Sampling = GREEDY) -> str:
    return "".join(talk.ask(question, sampling))


def lengths(model: LLaMA) -> list[int]:
    """Gets the number of tokens of each of the model's calls."""
    found: list[int] = []
    model.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].size(1)))
    return found


def test_cached_turns_give_the_ids_of_a_run_over_the_whole_conversation(talk: Conversation) -> None:
    for turn, system in enumerate(["", "", "Be brief.", "Be brief.", "Be long.", ""]):
        talk.set_system(system)
        asked = [*talk.messages, Message("user", f"question {turn} <|im_end|>")]
        prompt = encode("zephyr", asked, talk.tokenizer).ids
        expected = list(generate(talk.model, prompt, GREEDY, stop_ids("zephyr", talk.tokenizer)))
        text = answer(talk, asked[-1].content)
        assert talk.cached == (prompt + expected)[: len(talk.cached)]
        assert len(talk.cached) == len(prompt) + len(expected) - (not talk.ended)
        assert talk.messages == [*asked, Message("assistant", text)]


def test_only_new_tokens_are_computed(talk: Conversation) -> None:
    computed = lengths(talk.model)
    answer(talk, "first")
    before = list(talk.cached)
    computed.clear()
    answer(talk, "second")
    prompt = encode("zephyr", talk.messages[:-1], talk.tokenizer).ids
    assert prompt[: len(prompt) - computed[0]] == before[: len(prompt) - computed[0]]
    assert computed[0] <= len(prompt) - len(encode("zephyr", [Message("user", "first")], talk.tokenizer).ids)
    assert set(computed[1:]) == {1}
    talk.forget()
    computed.clear()
    answer(talk, "third")
    assert computed[0] == len(encode("zephyr", talk.messages[:-1], talk.tokenizer).ids)


@pytest.mark.parametrize("at", ["in the model", "between pieces"])
def test_an_answer_that_is_broken_off_stays_and_the_next_one_is_right(talk: Conversation, at: str) -> None:
    answer(talk, "first")
    if at == "in the model":
        calls = iter(range(100))

        def interrupt(*_: object) -> None:
            if next(calls) == 5:
                raise KeyboardInterrupt

        hook = talk.model.transformer.h[1].register_forward_pre_hook(interrupt)  # only the other layer is filled
        pieces = []
        with pytest.raises(KeyboardInterrupt):
            pieces.extend(talk.ask("second", GREEDY))
        hook.remove()
    else:
        stream: Iterator[str] = talk.ask("second", GREEDY)
        pieces = [next(stream), next(stream)]
    assert talk.messages[-1] == Message("assistant", "".join(pieces))
    asked = [*talk.messages, Message("user", "third")]
    prompt = encode("zephyr", asked, talk.tokenizer).ids
    expected = list(generate(talk.model, prompt, GREEDY, stop_ids("zephyr", talk.tokenizer)))
    answer(talk, "third")
    assert talk.cached == (prompt + expected)[: len(talk.cached)]


def test_a_question_without_an_answer_is_forgotten(talk: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(module, "next_tokens", lambda *_: iter([[talk.tokenizer.eos_id]]))
        assert answer(talk, "first") == ""
    answer(talk, "second")
    assert [message.content for message in talk.messages if message.role == "user"] == ["second"]


def test_the_cache_grows_with_the_conversation(talk: Conversation) -> None:
    answer(talk, "first", replace(GREEDY, max_new_tokens=2))
    before = talk.cache.room
    answer(talk, "second " * 50)
    assert before < talk.cache.room <= talk.model.config.block_size


def test_a_full_context_ends_an_answer_and_refuses_the_next_question(tokenizer: Tokenizer) -> None:
    talk = Conversation(random_model(TINY), tokenizer, "zephyr")
    answer(talk, "first", replace(GREEDY, max_new_tokens=500))
    assert (talk.is_full, talk.ended) == (True, False)
    messages = talk.messages
    with pytest.raises(UserError, match="context has 128"):
        answer(talk, "second")
    assert talk.messages == messages
    talk.reset()
    answer(talk, "third")
    assert not talk.is_full


def test_styles_of_one_question_begin_anew_and_take_no_system_message(model: LLaMA, tokenizer: Tokenizer) -> None:
    talk = Conversation(model, tokenizer, "alpaca")
    answer(talk, "first")
    answer(talk, "second")
    assert [message.content for message in talk.messages[:1]] == ["second"]
    with pytest.raises(UserError, match="no system message"):
        talk.set_system("Be brief.")
