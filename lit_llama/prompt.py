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
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

from lit_llama.errors import UserError, short
from lit_llama.progress import say
from lit_llama.sandbox import render
from lit_llama.storage.files import read_text
from lit_llama.tokenizer import Tokenizer

from torch import Tensor

Role = Literal["system", "user", "assistant"]
Names = tuple[tuple[str, str], ...]  # what a template calls tokens, and their texts


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
STANFORD = EXCHANGE.replace(
    "QUESTION",
    "Below is an instruction that describes a task"
    "{% if message['input'] %}, paired with an input that provides further context{% endif %}. "
    "Write a response that appropriately completes the request.{{ '\n\n' }}"
    "### Instruction:{{ '\n' + message['content'] + '\n\n' }}"
    "{% if message['input'] %}### Input:{{ '\n' + message['input'] + '\n\n' }}{% endif %}### Response:",
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
    # The text alone, for a model to continue.
    "plain": EXCHANGE.replace("QUESTION", "{{ message['content'] }}"),
    # Stanford Alpaca's and a line break, as alpaca-lora and LitGPT use it.
    "alpaca": STANFORD.replace("### Response:", "### Response:{{ '\n' }}"),
    # As Stanford Alpaca published it, and as the archived Lit-LLaMA and LLaMA-Adapter use it.
    "alpaca-stanford": STANFORD,
    "chatml": CHATML.replace("START", ""),
    # SmolLM2-Instruct's own: ChatML that begins with a system message.
    "smollm2": CHATML.replace("START", SMOLLM2_START),
    # Llama 2 chat, which puts the system message into the first question.
    "llama2": (
        "{% set found = namespace(system='') %}{% for message in messages %}"
        "{% if message['role'] == 'system' %}"
        "{% set found.system = '<<SYS>>\n' + message['content'] + '\n<</SYS>>\n\n' %}"
        "{% elif message['role'] == 'user' %}{{ bos_token }}"
        "{{ '[INST] ' + (found.system + message['content']) | trim + ' [/INST]' }}{% set found.system = '' %}"
        "{% else %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    # Llama 3 Instruct. (That of Llama 3.1 puts the date into a system message.)
    "llama3": (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
        "{{ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    # As TinyLlama-1.1B-Chat uses it.
    "zephyr": (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
}
TEXTS = [STYLES[name] for name in ("plain", "alpaca", "alpaca-stanford")]  # they begin as any text of the model
EXCHANGED = [Message("user", "Hi"), Message("assistant", "Hi")]  # what templates are tried with
TURNS = re.compile("(system )?(user assistant )*user( assistant)?|assistant")  # a document is an answer alone
FIRST_MARK = 0xF0000  # from here on, characters are for private use


def find_template(style: str | None, own: str | None, otherwise: str | None = None) -> str:
    """The template that `--prompt_style` names: "own", one of STYLES, a file that holds one, or its text.

    Args:
        own: the model's, which is the default; if it has none, that is the style `otherwise`.
    """
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
    it ends there, even if a token would reach from it into the answer.

    Raises:
        UserError: if the template refuses the conversation, leaves out a message, or changes what it says.
    """
    check_order(messages)
    template = stored_template("plain" if messages[0].role == "assistant" else template)
    text, mask, answers, prompts = find_answers(template, messages, tokenizer)
    edges, learns = [edge for answer in answers for edge in answer[:2]], any(learned for _, _, learned in answers)

    def is_trained(place: int) -> bool:
        return any(start <= place < end and learned for start, end, learned in answers)

    ids, trained, place = [], [], 0
    for control in (*re.finditer(tokenizer.control_pattern, mask), None):
        end = control.start() if control else len(text)
        n = len(ids)  # the ids from here on are those of the text from `place` on
        for a, b in pairwise((place, *(edge for edge in edges if place < edge < end), end)):
            within = place > 0 and template not in TEXTS
            before, new = ids[n:], tokenizer.encode(text[place:b], bos=False, within=within)
            if a in prompts and new[: len(before)] != before:
                n, place, before, new = len(ids), a, [], tokenizer.encode(text[a:b], bos=False, within=True)
            same = next((i for i, pair in enumerate(zip(before, new, strict=False)) if len({*pair}) > 1), len(before))
            ids[n:], trained[n + same :] = new, [learns] * (same < len(before))  # for a token across an edge
            trained += [is_trained(a)] * (len(ids) - len(trained))
        if control:
            ids.append(tokenizer.control_id(control[0].strip()))
            trained.append(is_trained(end))
            place = control.end()
    return Encoded(ids, trained)


def find_answers(
    template: str, messages: Sequence[Message], tokenizer: Tokenizer
) -> tuple[str, str, list[tuple[int, int, bool]], set[int]]:
    """The text of a conversation; the same with a mark for each character of the messages; and places in them.

    These are where each answer starts and ends, and whether it is learned, and the starts at which a prompt ends.
    """
    names, (marked, said) = tuple(names_of(template, tokenizer).items()), mark(messages)
    text, with_marks = rendered(template, messages, names), rendered_marks(template, marked, names)
    as_long = {sign: chr(sign) * len(text) for sign, text in said.items()}
    if with_marks.translate(said) != text:
        raise UserError("the chat template changes what a message says, or goes by it; choose another --prompt_style")
    mask, any_mark = with_marks.translate(as_long), f"[{chr(FIRST_MARK)}-{chr(FIRST_MARK + len(said))}]"
    answers, prompts, after = [], set(), re.compile(f"{any_mark}|{tokenizer.control_pattern}")
    for i, message in enumerate(messages):
        own = "".join(re.findall(any_mark, marked[i].content + marked[i].input))
        places = [match.span() for match in re.finditer(f"[{own}]+", mask)] if own else []
        if own and not places:
            left_out = f"message {i + 1} ({message.role})"
            raise UserError(f"the chat template leaves out {left_out}; choose another --prompt_style")
        if message.role == "assistant":
            before = re.split(any_mark, marked[i].content)[0]  # space, or the tag of a thought
            start = places[0][0] if places else len(mask)
            start -= len(before) * mask.endswith(before, 0, start)
            prompt = rendered_marks(template, marked[:i], names).translate(as_long)
            if mask.startswith(prompt):
                start = len(prompt)
                prompts.add(start)
            end = places[-1][1] if places else start
            token = after.search(mask, end)
            end = token.end() if token and ord(token[0][0]) not in said else end
            answers.append((start, end, message.learned))
    return text, mask, answers, prompts


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


def rendered(template: str, messages: Sequence[Message], names: Names) -> str:
    """The text that a template makes of messages; if the last is not an answer, it asks for one."""
    if "message['input']" in template:
        fields = [message._asdict() for message in messages]
    else:
        fields = [{"role": message.role, "content": with_input(message)} for message in messages]
    return render(template, fields, dict(names), ask=not messages or messages[-1].role != "assistant")


rendered_marks = lru_cache(256)(rendered)  # with marks for what is said, conversations are alike in most records


def with_input(question: Message) -> str:
    return f"{question.content}\n{question.input}" if question.input else question.content


def names_of(template: str, tokenizer: Tokenizer) -> dict[str, str]:
    """What a template calls bos_token and the like. Before a text goes what the tokenizer itself puts there."""
    bos = "" if tokenizer.bos_id is None else tokenizer.token(tokenizer.bos_id)
    return {**tokenizer.names, "bos_token": bos if template in TEXTS else tokenizer.names.get("bos_token", "")}


def portable(template: str, tokenizer: Tokenizer) -> str:
    """A template as other programs are to have it, which may have another idea of the bos, if the model has none."""
    has_bos = names_of(template, tokenizer)["bos_token"]
    return template if has_bos or template not in STYLES.values() else template.replace("{{ bos_token }}", "")


def encode_prompt(template: str, prompt: str, context: str, tokenizer: Tokenizer) -> list[int]:
    """The token ids of one question with the input, or "", that it works on."""
    return encode(template, [Message("user", prompt, context)], tokenizer).ids


def stop_ids(template: str, tokenizer: Tokenizer) -> set[int]:
    """The tokens that end an answer: those that end any text, and the control token that the template puts there."""
    end = turn_end(template, tokenizer)
    return {*tokenizer.end_ids} | ({end} if end is not None else set())


def unlearned(template: str, tokenizer: Tokenizer, embedding: Tensor) -> list[str]:
    """The control tokens of a template that a model has not learned: its rows (V, C) for them are zero or the same."""
    try:
        used = {*encode(template, EXCHANGED, tokenizer).ids} & {*tokenizer.controls.values()}
    except UserError:  # which is raised where it is used
        return []
    rows = {i: embedding[i] for i in tokenizer.controls.values() if i < len(embedding)}
    same = {i: sum(bool((row == rows[i]).all()) for row in rows.values()) for i in sorted(used & rows.keys())}
    return [tokenizer.token(i) for i, n in same.items() if n > 1 or not rows[i].any()]


def turn_end(template: str, tokenizer: Tokenizer) -> int | None:
    """The control token that a template puts after an answer, if it does."""
    try:
        ids, trained = encode(template, EXCHANGED, tokenizer)
    except UserError:  # which is raised where it is used
        return None
    last = [token_id for token_id, is_trained in zip(ids, trained, strict=True) if is_trained][-1]
    return last if last in tokenizer.controls.values() else None


def tried(template: object) -> str | None:
    """A chat template that comes with a model, if any; says so if it cannot render a conversation."""
    if not isinstance(template, str):
        return None
    try:
        rendered(template, EXCHANGED, (("bos_token", "<s>"), ("eos_token", "</s>")))
    except UserError as error:
        say(f"warning: {error}; pass a --prompt_style to every script that takes one")
    return template


def takes_turns(template: str, tokenizer: Tokenizer) -> bool:
    """Whether a template takes more than one question."""
    try:
        encode(template, [*EXCHANGED, Message("user", "Hi")], tokenizer)
    except UserError:
        return False
    return True


def check_order(messages: Sequence[Message]) -> None:
    """Raise a UserError unless questions and answers take turns, perhaps after a system message."""
    roles = [message.role for message in messages]
    if not TURNS.fullmatch(" ".join(roles)):
        raise UserError(f"user and assistant must take turns, after at most one system message; found {roles}")
