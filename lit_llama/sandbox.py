"""Chat templates, rendered as transformers renders them, but within bounds: a template is a stranger's program.

Jinja's sandbox keeps it from Python's insides, the operating system from going on for ever or filling the memory.
"""

import ctypes
import json
import os
import re
import resource
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import lru_cache, partial
from threading import current_thread, main_thread
from typing import Any, NoReturn

from lit_llama.errors import UserError

from jinja2 import Template, TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS, BYTES = 3.0, 2**29  # that a rendering may take at most; conversations take milliseconds and kilobytes
LAST = 6.0  # seconds after which the process ends, if it is in code that nothing interrupts, such as a comparison
TOO_MUCH = "it takes far more time or memory than a conversation needs"
LONGEST = 2**22  # characters that a template may make
NOW = datetime.now()  # one time for all of a run: a conversation that goes on begins as it did
WAKE = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: None)  # lets Python call `stop` even in the midst of C code
ctypes.CDLL(None).signal(int(signal.SIGVTALRM), WAKE)
GENERATION = re.compile(r"(\{%[-+]?\s*)(end)?generation(?=\s*[-+]?%\})")  # by which transformers finds the answers


def stop(started: float, *_: object) -> NoReturn:
    if time.process_time() - started > LAST - 1:
        os.write(2, f"error: the chat template cannot render this conversation: {TOO_MUCH}\n".encode())
        os._exit(1)
    raise TemplateError(TOO_MUCH)


class Sandbox(ImmutableSandboxedEnvironment):
    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        raise TemplateError(f"it asks for {attribute} of a {type(obj).__name__}, which is unsafe")


def tojson(value: Any, ensure_ascii: bool = False, **settings: Any) -> str:
    """As transformers has it; Jinja's own writes < and > as in HTML."""
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, **settings)
    return "".join(encoder.iterencode(value))  # in Python, which can be interrupted


def raise_exception(message: object, *_: object) -> NoReturn:
    raise TemplateError(str(message))


@lru_cache(maxsize=16)
def compiled(source: str) -> Template:
    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = tojson
    scoped = GENERATION.sub(r"\1\2with", source)
    return environment.from_string(scoped, {"raise_exception": raise_exception, "strftime_now": NOW.strftime})


@contextmanager
def limited() -> Iterator[None]:
    """Within this, at most so much time (in the main thread) and memory more: else a TemplateError or MemoryError."""
    timers = {signal.ITIMER_REAL: SECONDS, signal.ITIMER_VIRTUAL: LAST} if current_thread() is main_thread() else {}
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, partial(stop, time.process_time())) if timers else None
    try:
        with suppress(OSError), open("/proc/self/statm", "rb", buffering=0) as file:
            most = int(file.read().split()[0]) * resource.getpagesize() + BYTES
            resource.setrlimit(resource.RLIMIT_AS, (most if soft < 0 else min(most, soft), hard))
        for timer, seconds in timers.items():
            signal.setitimer(timer, seconds, 1.0)  # and again, if that is caught
        yield
    finally:
        for timer in timers:
            signal.setitimer(timer, 0)
        if timers:
            signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def render(source: str, messages: Sequence[Mapping[str, str]], names: Mapping[str, str], ask: bool) -> str:
    """The text of a conversation; a UserError if the template refuses it, with its own words, or cannot be rendered.

    `names` are what it calls bos_token and the like; with `ask`, the text ends with how an answer begins.
    """
    given = {**names, "messages": messages, "tools": None, "documents": None, "add_generation_prompt": ask}
    try:
        with limited():
            text = compiled(source).render(given)
        if len(text) <= LONGEST:
            return text
        reason = f"it makes more than {LONGEST:,} characters"
    except (MemoryError, OverflowError):
        reason = TOO_MUCH
    except Exception as error:  # of any kind: it is a program
        reason = f"{type(error).__name__}: {error}" if not isinstance(error, TemplateError) else str(error)
    raise UserError(f"the chat template cannot render this conversation: {' '.join(reason.split())[:200]}")
