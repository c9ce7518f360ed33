"""Chat templates, rendered as transformers renders them, but within bounds: a template is a stranger's program.

Jinja's sandbox keeps it from Python's insides; the operating system keeps it from going on for ever or filling the
memory.
"""

import json
import resource
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any, NoReturn

from lit_llama.errors import UserError

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS, BYTES = 3.0, 2**29  # that a rendering may take at most; conversations take milliseconds and kilobytes
LAST = 9.0  # seconds after which the process ends, if it is in code that nothing interrupts, such as a comparison
LONGEST = 2**22  # characters of a template, and of what it makes
NOW = datetime.now()  # one time for all of a run: a conversation that goes on begins as it did


class Generation(Extension):
    """{% generation %}, by which transformers finds the answers."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class Sandbox(ImmutableSandboxedEnvironment):
    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        raise TemplateError(f"it asks for {attribute} of a {type(obj).__name__}, which is not safe")


def tojson(value: Any, **settings: Any) -> str:
    """As transformers has it; Jinja's own writes < and > as in HTML."""
    encoder: Any = json.JSONEncoder
    return "".join(encoder(**{"ensure_ascii": False, **settings}).iterencode(value))  # Python's: it can be interrupted


def raise_exception(message: object) -> NoReturn:
    raise TemplateError(str(message))


@lru_cache(maxsize=16)
def compiled(source: str) -> Template:
    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = tojson
    return environment.from_string(source, {"raise_exception": raise_exception, "strftime_now": NOW.strftime})


@contextmanager
def limited() -> Iterator[None]:
    """Within this, at most so much time and memory more: else a TimeoutError (in the main thread) or a MemoryError."""

    def too_long(*_: object) -> NoReturn:
        raise TimeoutError

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = Path("/proc/self/statm")  # in pages
    before = None
    try:
        if used.exists():
            most = int(used.read_text().split()[0]) * resource.getpagesize() + BYTES
            if soft == resource.RLIM_INFINITY or most < soft:
                resource.setrlimit(resource.RLIMIT_AS, (most, hard))
        if current_thread() is main_thread():
            before = signal.signal(signal.SIGALRM, too_long)
            signal.setitimer(signal.ITIMER_REAL, SECONDS, 1.0)  # again, if the template catches the first
            signal.setitimer(signal.ITIMER_VIRTUAL, LAST)
        yield
    finally:
        if current_thread() is main_thread():
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def render(source: str, messages: Sequence[Mapping[str, str]], names: Mapping[str, str], ask: bool) -> str:
    """The text of a conversation.

    Args:
        names: what the template calls bos_token, eos_token and the like.
        ask: end with how an answer begins.

    Raises:
        UserError: if the template refuses the conversation, with its own words, or cannot be rendered.
    """
    given = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": ask}
    try:
        if len(source) > LONGEST:
            raise TemplateError(f"it has {len(source):,} characters, more than {LONGEST:,}")
        with limited():
            text = compiled(source).render(**{**names, **given})
        if len(text) <= LONGEST:
            return text
        reason = f"it makes {len(text):,} characters, more than {LONGEST:,}"
    except (TimeoutError, MemoryError, OverflowError):
        reason = "it takes far more time or memory than a conversation needs"
    except Exception as error:  # of any kind: it is a program
        reason = f"{type(error).__name__}: {error}" if not isinstance(error, TemplateError) else str(error)
    raise UserError(f"the chat template cannot render this conversation: {' '.join(reason.split())[:200]}")
