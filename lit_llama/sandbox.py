"""Chat templates, rendered as transformers renders them, but within bounds: a template is a program by a stranger.

Jinja's sandbox keeps it from Python's insides, but not from going on for ever or filling the memory. So what it does is
paid for from a budget, far larger than a conversation needs: turns of loops, calls, filters, operators, prints. The
price is the most that can come of it: the product of what is given.
"""

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache, wraps
from math import prod
from typing import Any, NoReturn

from lit_llama.errors import UserError

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

BUDGET, SECONDS = 10**8, 3.0  # characters, more or less, and how long a rendering may take
LONGEST = 2**18  # characters of a template; the longest published ones have some 20,000
WIDE = re.compile(r"%[^%a-zA-Z]*(\*|\d{4})|\{[^}]*\d{4}")  # a format that pads to thousands of characters
NOW = datetime.now()  # one time for all of a run: a conversation that goes on begins as it did


class Generation(Extension):
    """{% generation %}, by which transformers finds the answers."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class Metered(NodeTransformer):
    """Makes filters, which are paid for, of loops, of lists and of `a ~ b`."""

    def visit(self, node: Any) -> Any:
        self.generic_visit(node)
        if isinstance(node, nodes.For) and node.recursive:
            raise TemplateError("it has a loop that calls itself")
        if isinstance(node, nodes.For):
            node.iter = filtered(node.iter, "turns")
        elif isinstance(node, nodes.Concat):
            return filtered(nodes.List(node.nodes), "join")
        elif isinstance(node, nodes.List | nodes.Dict | nodes.Tuple) and getattr(node, "ctx", "load") == "load":
            return filtered(node, "built")
        return node


def filtered(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one template."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, source: str) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
        self.turn = len(source)  # more than this of its own text does not come of a turn
        self.filters |= {"tojson": tojson, "turns": self.turns, "built": lambda value: value}
        self.filters = {name: self.metered(name, function) for name, function in self.filters.items()}
        given: dict[str, Any] = {"raise_exception": raise_exception, "strftime_now": NOW.strftime}
        self.globals.update(given)
        del self.globals["lipsum"]
        self.finalize = lambda value: (self.pay(size(value)), value)[1]  # what is printed
        self.start()
        self.template = self.from_string(source)

    def _parse(self, *source: Any) -> Any:
        return Metered().visit(super()._parse(*source)).set_environment(self)

    def start(self) -> None:
        self.left, self.deadline = BUDGET, time.monotonic() + SECONDS

    def pay(self, price: int) -> None:
        self.left -= price
        if self.left < 0 or time.monotonic() > self.deadline:
            raise TemplateError("it does far more than a conversation needs")

    def pay_for(self, name: str, given: Iterable[Any]) -> None:
        if name in ("format", "format_map", "%") and any(isinstance(g, str) and WIDE.search(g) for g in given):
            raise TemplateError("it pads a text to thousands of characters")
        self.pay(self.turn + prod(max(1, abs(g) if isinstance(g, int) else size(g)) for g in given))

    def metered(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def paid(*given: Any, **named: Any) -> Any:
            self.pay_for(name, (*given, *named.values()))
            return function(*given, **named)

        return paid

    def turns(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self.pay(self.turn)
            yield value

    def call(self, context: Any, function: Any, /, *given: Any, **named: Any) -> Any:
        method = getattr(function, "__wrapped__", function)  # of str.format, which Jinja wraps
        owner = getattr(method, "__self__", None)
        self.pay_for(getattr(method, "__name__", ""), (owner, *given, *named.values()))
        return super().call(context, function, *given, **named)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":
            self.pay(size(left) + size(right))
        else:
            self.pay_for(operator, (left, right))
        return super().call_binop(context, operator, left, right)

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        raise TemplateError(f"it asks for {attribute} of a {type(obj).__name__}, which is not safe")


def size(value: Any) -> int:
    """The characters of a text; of a list, dictionary or range those in it, and the number of what else is in it."""
    if isinstance(value, str):
        return len(value)
    total, left = 0, [value]
    while left and total < BUDGET:
        value = left.pop()
        total += len(value) if isinstance(value, str | range) else 100 * (total > 10**5) + 1  # such a list is hostile
        if isinstance(value, dict | list | tuple | set):
            left += value if not isinstance(value, dict) else [*value, *value.values()]
    return total


def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **settings: Any) -> str:
    """As transformers has it; Jinja's own writes < and > as in HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **settings)


def raise_exception(message: object) -> NoReturn:
    raise TemplateError(str(message))


@lru_cache(maxsize=16)
def compiled(source: str) -> Sandbox:
    if len(source) > LONGEST:
        raise TemplateError(f"it has {len(source)} characters, expected at most {LONGEST}")
    return Sandbox(source)


def render(source: str, messages: Sequence[Mapping[str, str]], names: Mapping[str, str], ask: bool) -> str:
    """The text of a conversation.

    Args:
        names: what the template calls bos_token, eos_token and the like.
        ask: end in how an answer begins.

    Raises:
        UserError: if the template refuses the conversation, with its own words, or cannot be rendered.
    """
    try:
        sandbox = compiled(source)
        sandbox.start()
        given = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": ask}
        return sandbox.template.render(**{**names, **given})
    except Exception as error:  # of any kind: it is a program
        reason = f"{type(error).__name__}: {error}" if not isinstance(error, TemplateError) else str(error)
    raise UserError(f"the chat template cannot render this conversation: {' '.join(reason.split())[:200]}")
