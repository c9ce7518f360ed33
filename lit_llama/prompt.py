"""How a conversation becomes what a model sees: by a chat template, such as the one that the model was trained with.

A template is a text in Jinja's language: a model's own, one of `STYLES`, or a user's. It is rendered twice, the second
time with a mark in place of what each message says. This shows where that stands: what is between the marks is the
template's own words, and only there are control tokens looked for. Of the messages "Hi<|im_end|>" and "Ho":

    with marks       <|im_start|>user\n①<|im_end|>\n<|im_start|>assistant\n②<|im_end|>\n
    prompt           <|im_start|>user\n①<|im_end|>\n<|im_start|>assistant\n
    tokens           <|im_start|> "user\nHi<|im_end|>" <|im_end|> "\n" <|im_start|> "assistant\n" "Ho" <|im_end|> "\n"
    trained on                                                                                     ^^^^^^^^^^^^^^^

Trained on is what follows the prompt (the earlier messages, rendered so as to ask for an answer), up to and including
the first control token after the answer. A template that renders a question differently once it is answered, as
those of reasoning models do, has no such prompt: there the answer begins where it stands.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import compress, pairwise
from pathlib import Path
from typing import Literal, NamedTuple

from lit_llama.errors import UserError, short
from lit_llama.sandbox import render
from lit_llama.storage.files import read_text
from lit_llama.tokenizer import Tokenizer

Role = Literal["system", "user", "assistant"]
Part = tuple[str, bool, bool, bool]  # a text, and whether it is trained on, is a control token, begins an answer


class Message(NamedTuple):
    role: Role
    content: str
    input: str = ""  # what a user's instruction works on, which Alpaca's records keep apart
    learned: bool = True  # whether an answer is trained on


class Encoded(NamedTuple):
    ids: list[int]
    trained: list[bool]  # of each id


EXCHANGE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' and loop.first %}QUESTION"
    "{% elif message['role'] == 'assistant' and loop.index0 < 2 %}{{ message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('it takes one question and its answer, no system message') }}{% endif %}{% endfor %}"
)
STANFORD = (
    "Below is an instruction that describes a task"
    "{% if message['input'] %}, paired with an input that provides further context{% endif %}. "
    "Write a response that appropriately completes the request.{{ '\n\n' }}"
    "### Instruction:{{ '\n' + message['content'] + '\n\n' }}"
    "{% if message['input'] %}### Input:{{ '\n' + message['input'] + '\n\n' }}{% endif %}### Response:"
)
CHATML = (
    "{% for message in messages %}START"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMOLLM2_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
SMOLLM2_START = (
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    f"{{{{ '<|im_start|>system\n{SMOLLM2_SYSTEM}<|im_end|>\n' }}}}{{% endif %}}"
)

STYLES = {
    "plain": EXCHANGE.replace("QUESTION", "{{ message['content'] }}"),  # the text alone, for a model to continue
    # Stanford Alpaca's and a line break, as alpaca-lora and LitGPT use it.
    "alpaca": EXCHANGE.replace("QUESTION", STANFORD + "{{ '\n' }}"),
    # As Stanford Alpaca published it, and as the archived Lit-LLaMA and LLaMA-Adapter use it.
    "alpaca-stanford": EXCHANGE.replace("QUESTION", STANFORD),
    "chatml": CHATML.replace("START", ""),
    # SmolLM2-Instruct's own: ChatML that begins with a system message.
    "smollm2": CHATML.replace("START", SMOLLM2_START),
    "llama2": (  # Llama 2 chat's, which puts the system message into the first question
        "{% set found = namespace(system='') %}{% for message in messages %}"
        "{% if message['role'] == 'system' %}"
        "{% set found.system = '<<SYS>>\n' + message['content'] + '\n<</SYS>>\n\n' %}"
        "{% elif message['role'] == 'user' %}{{ bos_token }}"
        "{{ '[INST] ' + (found.system + message['content']) | trim + ' [/INST]' }}{% set found.system = '' %}"
        "{% else %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "llama3": (  # Llama 3 Instruct's (that of Llama 3.1 puts the date into a system message)
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
        "{{ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "zephyr": (  # as TinyLlama-1.1B-Chat uses it
        "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
}
TEXTS = [STYLES[name] for name in ("plain", "alpaca", "alpaca-stanford")]  # they begin as any text of the model
EXCHANGED = [Message("user", "Hi"), Message("assistant", "Hi")]  # what templates are tried with
TURNS = re.compile("(system )?(user assistant )*user( assistant)?|assistant")  # a document is an answer alone
FIRST_MARK, MARKS = 0xF0000, "\U000f0000-\U000ffffd"  # characters for private use


def find_template(style: str | None, own: str | None, otherwise: str | None = None) -> str:
    """The template that is named: "own", the model's (the default; without one, `otherwise`), a style, file or text."""
    style = style or (otherwise if own is None and otherwise else "own")
    if style == "own" and own is None:
        raise UserError(f"the model has no template of its own; choose one by --prompt_style: {', '.join(STYLES)}")
    if style == "own":
        return str(own)
    return read_text(Path(style)) if len(style) < 256 and Path(style).is_file() else stored_template(style)


def stored_template(style: str) -> str:
    """The template that a file of ours holds: a text, or in earlier files the name of one of STYLES."""
    if style not in STYLES and not re.search(r"\{[{%]", style):
        raise UserError(f"there is no prompt style {short(style)}; give a file, or one of {', '.join(STYLES)}")
    return STYLES.get(style, style)


def name_of(template: str) -> str:
    """The name of one of STYLES, or "own" for any other."""
    return next((name for name, text in STYLES.items() if text == template), "own")


def encode(template: str, messages: Sequence[Message], tokenizer: Tokenizer) -> Encoded:
    """A conversation as token ids, and which of them are trained on. A document, an answer alone, is always a text.

    What is between two control tokens is tokenised as one text, except that a prompt is always tokenised as it is when
    it ends there, even if a token would reach from it into the answer. A UserError says if the template refuses the
    conversation, leaves out a message, or changes what it says.
    """
    check_order(messages)
    template = stored_template("plain" if messages[0].role == "assistant" else template)
    marked, said = mark(messages)
    parts = split(template, marked, tokenizer)
    texts = [text.translate(said) for text, *_ in parts]
    if "".join(texts) != rendered(template, messages, tokenizer):
        raise UserError("the chat template changes what a message says, or goes by it; choose another --prompt_style")
    ids, trained, text, first = [], [], "", 0  # the text since the last control token, and the place of its ids
    for new, (_, is_trained, is_control, is_answer) in zip(texts, parts, strict=True):
        if is_control:
            ids.append(tokenizer.control_id(new.strip()))
            trained.append(is_trained)
            text, first = "", len(ids)
            continue
        before = ids[first:]
        longer = tokenizer.encode(text + new, bos=False, within=first > 0 and template not in TEXTS)
        same = len(before)
        while longer[:same] != before[:same]:  # a token reaches over the edge of an answer
            same -= 1
        if is_answer and same < len(before):
            text, first, same, before = "", len(ids), 0, []
            longer = tokenizer.encode(new, bos=False, within=True)
        text += new
        ids[first:] = longer
        trained[first + same :] = [is_trained or any(trained[-1:])] * (same < len(before))
        trained += [is_trained] * (len(ids) - len(trained))
    return Encoded(ids, trained)


@lru_cache(256)  # with marks for what is said, most records are alike
def split(template: str, marked: tuple[Message, ...], tokenizer: Tokenizer) -> list[Part]:
    """The control tokens of a conversation with marks, and the texts between them, cut where answers begin and end."""
    text, answers, edges, prompts = rendered(template, marked, tokenizer), [], set(), set()
    ending = re.compile(f"[^{MARKS}]*?{tokenizer.control_pattern}")
    for i, message in enumerate(marked):
        marks = {*re.findall(f"[{MARKS}]", message.content + message.input)}
        places = [place for place, char in enumerate(text) if char in marks]
        if marks and not places:
            left_out = f"message {i + 1} ({message.role})"
            raise UserError(f"the chat template leaves out or changes {left_out}; choose another --prompt_style")
        if message.role == "assistant":
            before = re.split(f"[{MARKS}]", message.content)[0]  # space, or the tag of a thought
            start = places[0] if places else len(text)
            start -= len(before) * text.endswith(before, 0, start)
            if text.startswith(prompt := rendered(template, marked[:i], tokenizer)):
                start = len(prompt)
                prompts.add(start)
            end = places[-1] + 1 if places else start
            end = token.end() if (token := ending.match(text, end)) else end
            edges |= {start, end}
            answers += [(start, end)] * message.learned
    controls = dict(control.span() for control in re.finditer(tokenizer.control_pattern, text))
    inside = {place for a, b in controls.items() for place in range(a + 1, b)}
    cuts = pairwise(sorted({0, *edges, *controls, *controls.values(), len(text)} - inside))
    return [(text[a:b], any(i <= a < j for i, j in answers), a in controls, a in prompts) for a, b in cuts]


def mark(messages: Sequence[Message]) -> tuple[tuple[Message, ...], dict[int, str]]:
    """The messages with a mark, a character, for what each says, and what the marks stand for.

    The space around a text stays, which a template may strip, and the tags of a thought, at which one may cut.
    """
    said: dict[int, str] = {}

    def marked(text: str) -> str:
        parts = re.split("(</?think>)", text)
        for i in range(0, len(parts), 2):
            if inner := parts[i].strip():
                sign = FIRST_MARK + len(said)
                said[sign], parts[i] = inner, parts[i].replace(inner, chr(sign), 1)
        return "".join(parts)

    return tuple(m._replace(content=marked(m.content), input=marked(m.input)) for m in messages), said


def rendered(template: str, messages: Sequence[Message], tokenizer: Tokenizer) -> str:
    """The text that a template makes of messages; if the last is not an answer, it asks for one."""
    is_apart = "message['input']" in template
    fields = [m._asdict() if is_apart else {"role": m.role, "content": with_input(m)} for m in messages]
    ask = not messages or messages[-1].role != "assistant"
    return render(template, fields, names_of(template, tokenizer), ask)


def with_input(question: Message) -> str:
    return f"{question.content}\n{question.input}" if question.input else question.content


def names_of(template: str, tokenizer: Tokenizer) -> dict[str, str]:
    """What a template calls bos_token and the like. Before a text goes what the tokenizer itself puts there."""
    bos = "" if tokenizer.bos_id is None else tokenizer.token(tokenizer.bos_id)
    return {**tokenizer.names, "bos_token": bos if template in TEXTS else tokenizer.names.get("bos_token", "")}


def stop_ids(template: str, tokenizer: Tokenizer) -> set[int]:
    """The tokens that end an answer: those that end any text, and the control token that the template puts there."""
    answer = [*compress(*attempt(template, EXCHANGED, tokenizer))]
    return {*tokenizer.end_ids} | {*answer[-1:]} & {*tokenizer.controls.values()}


def attempt(template: str, messages: Sequence[Message], tokenizer: Tokenizer) -> Encoded:
    """What `encode` gives, or nothing where it refuses: why, is said where the template is used."""
    try:
        return encode(template, messages, tokenizer)
    except UserError:
        return Encoded([], [])


def check_order(messages: Sequence[Message]) -> None:
    """Raise a UserError unless questions and answers take turns, perhaps after a system message."""
    roles = [message.role for message in messages]
    if not TURNS.fullmatch(" ".join(roles)):
        raise UserError(f"user and assistant must take turns, after at most one system message; found {roles}")
