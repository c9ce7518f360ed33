"""Templates: how a conversation becomes what a model sees. A model answers best in the one that it was trained with.

A template turns messages into segments of text, each trained on or not, with control tokens between them. The answers
are trained on, each with the token that ends it. If the last message is not an answer, the segments end where one is to
begin, so a prompt is exactly how its training record starts. `lit_llama/formats/chat_templates.py` has the same
templates in Jinja, for other programs.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

from lit_llama.errors import UserError
from lit_llama.tokenizer import Tokenizer

PromptStyle = Literal["plain", "alpaca", "alpaca-stanford", "chatml", "smollm2", "llama2", "llama3", "zephyr"]
Role = Literal["system", "user", "assistant"]


class Message(NamedTuple):
    role: Role
    content: str
    input: str = ""  # what a user's instruction works on, which Alpaca's records keep apart
    learned: bool = True  # whether an answer is trained on


class Segment(NamedTuple):
    text: str
    trained: bool = False


class Control(NamedTuple):
    """A token that no text can become: "bos" or "eos", whatever the tokenizer calls them, or one by its name."""

    name: str
    trained: bool = False


Parts = Iterator[Segment | Control]


def plain(messages: Sequence[Message]) -> Parts:
    """No template: a text to continue and its continuation, or a document alone."""
    yield from one_exchange("plain", messages, with_input)


def alpaca(messages: Sequence[Message]) -> Parts:
    """The template of Stanford Alpaca and a line break, as alpaca-lora and LitGPT use it."""
    yield from one_exchange("alpaca", messages, lambda question: f"{alpaca_text(question)}\n")


def alpaca_stanford(messages: Sequence[Message]) -> Parts:
    """The template as Stanford Alpaca published it, and as the archived Lit-LLaMA and LLaMA-Adapter use it."""
    yield from one_exchange("alpaca-stanford", messages, alpaca_text)


def one_exchange(style: str, messages: Sequence[Message], text: Callable[[Message], str]) -> Parts:
    """A question in the words of `text`, and its answer."""
    roles = [message.role for message in messages]
    if roles not in (["user"], ["user", "assistant"], ["assistant"]):
        raise UserError(f"the prompt style {style} takes one question and its answer, not messages of {roles}")
    yield Control("bos")
    for message in messages:
        if message.role == "user":
            yield Segment(text(message))
        else:
            yield Segment(message.content, trained=True)
            yield Control("eos", trained=True)


def with_input(question: Message) -> str:
    return f"{question.content}\n{question.input}" if question.input else question.content


def alpaca_text(question: Message) -> str:
    context = ", paired with an input that provides further context" if question.input else ""
    given = f"\n\n### Input:\n{question.input}" if question.input else ""
    return (
        f"Below is an instruction that describes a task{context}. "
        "Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{question.content}{given}\n\n### Response:"
    )


def chatml(messages: Sequence[Message]) -> Parts:
    """ChatML, for models whose tokenizer has its two tokens, such as SmolLM2."""
    for message in messages:
        answer = message.role == "assistant"
        yield Control("<|im_start|>")
        yield Segment(f"{message.role}\n")
        yield Segment(with_input(message), trained=answer)
        yield Control("<|im_end|>", trained=answer)
        yield Segment("\n")
    if messages[-1].role != "assistant":
        yield Control("<|im_start|>")
        yield Segment("assistant\n")


SMOLLM2_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def smollm2(messages: Sequence[Message]) -> Parts:
    """ChatML that begins with a system message, by default the one of SmolLM2-Instruct."""
    if messages[0].role != "system":
        messages = [Message("system", SMOLLM2_SYSTEM), *messages]
    yield from chatml(messages)


def llama2(messages: Sequence[Message]) -> Parts:
    """Llama 2 chat, which puts the system message into the first question."""
    system = ""
    for message in messages:
        if message.role == "system":
            system = f"<<SYS>>\n{message.content}\n<</SYS>>\n\n"
        elif message.role == "user":
            yield Control("bos")
            yield Segment(f"[INST] {(system + with_input(message)).strip()} [/INST]")
            system = ""
        else:
            yield Segment(f" {message.content.strip()} ", trained=True)
            yield Control("eos", trained=True)


def llama3(messages: Sequence[Message]) -> Parts:
    """Llama 3 Instruct. (Llama 3.1 and later put the date into a system message; give one if you want it.)"""
    yield Control("bos")
    for message in (*messages, None):
        if message or messages[-1].role != "assistant":
            yield Control("<|start_header_id|>")
            yield Segment(message.role if message else "assistant")
            yield Control("<|end_header_id|>")
            yield Segment("\n\n")
        if message:
            yield Segment(with_input(message).strip(), trained=message.role == "assistant")
            yield Control("<|eot_id|>", trained=message.role == "assistant")


def zephyr(messages: Sequence[Message]) -> Parts:
    """Zephyr's, as TinyLlama-1.1B-Chat uses it."""
    for message in messages:
        yield Segment(f"<|{message.role}|>\n")
        yield Segment(with_input(message), trained=message.role == "assistant")
        yield Control("eos", trained=message.role == "assistant")
        yield Segment("\n")
    if messages[-1].role != "assistant":
        yield Segment("<|assistant|>\n")


TEMPLATES: dict[PromptStyle, Callable[[Sequence[Message]], Parts]] = {
    "plain": plain,
    "alpaca": alpaca,
    "alpaca-stanford": alpaca_stanford,
    "chatml": chatml,
    "smollm2": smollm2,
    "llama2": llama2,
    "llama3": llama3,
    "zephyr": zephyr,
}
ONE_QUESTION = ("plain", "alpaca", "alpaca-stanford")  # the styles without turns and system messages
TURN_ENDS = {"chatml": "<|im_end|>", "smollm2": "<|im_end|>", "llama3": "<|eot_id|>"}  # elsewhere it is the eos


class Encoded(NamedTuple):
    ids: list[int]
    trained: list[bool]  # of each id


def encode(style: PromptStyle, messages: Sequence[Message], tokenizer: Tokenizer) -> Encoded:
    """A conversation as token ids, and which of them are trained on.

    Segments that follow each other are tokenised as one text, unless a token would reach over the end of one: what
    comes before an answer is always tokenised as if there were no answer, as it will be when the answer is asked for.
    """
    check_order(messages)
    ids, trained = [], []
    text, before = "", []  # since the last control token
    for part in template(style)(messages):
        if isinstance(part, Control):
            text, before = "", []
            token_id = tokenizer.control_id(part.name)
            new = [] if token_id is None else [token_id]  # a model may have no bos
        else:
            text += part.text
            whole = tokenizer.encode(text, bos=False)
            new = whole[len(before) :] if whole[: len(before)] == before else tokenizer.encode(part.text, bos=False)
            before = before + new
        ids += new
        trained += [part.trained] * len(new)
    return Encoded(ids, trained)


def encode_prompt(style: PromptStyle, prompt: str, context: str, tokenizer: Tokenizer) -> list[int]:
    """The token ids of one question with the input, or "", that it works on."""
    return encode(style, [Message("user", prompt, context)], tokenizer).ids


def stop_ids(style: PromptStyle, tokenizer: Tokenizer) -> set[int]:
    """The tokens that end an answer."""
    turn_end = tokenizer.control_id(TURN_ENDS.get(style, "eos"))
    return {*tokenizer.end_ids} | ({turn_end} if turn_end is not None else set())


def template(style: PromptStyle) -> Callable[[Sequence[Message]], Parts]:
    if style not in TEMPLATES:  # as read from a file
        raise UserError(f"there is no prompt style {style!r}; the styles are {', '.join(TEMPLATES)}")
    return TEMPLATES[style]


def check_order(messages: Sequence[Message]) -> None:
    """Raise a UserError unless questions and answers take turns, perhaps after a system message."""
    roles = [message.role for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    in_turn = all(role == ("user", "assistant")[i % 2] for i, role in enumerate(turns))
    if not (turns and in_turn) and roles != ["assistant"]:  # a document is an answer alone
        raise UserError(f"user and assistant must take turns, after at most one system message; found {roles}")
