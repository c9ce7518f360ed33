"""Templates that mean harm, or are broken, end in one line and soon."""

import subprocess
import sys
import time

from lit_llama import sandbox
from lit_llama.errors import UserError
from lit_llama.sandbox import render

import pytest

TWICE = (
    "{% set n = namespace(x='xx') %}{% for i in range(99) %}{% set n.x = EXPRESSION %}{% endfor %}{{ n.x | tojson }}"
)
ENDLESS = [
    "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    f"{{% for i in range(100000) %}}{'y' * 20000}{{% endfor %}}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% for i in range(1000) recursive %}{{ loop(range(1000)) }}{% endfor %}",
    *(
        TWICE.replace("EXPRESSION", doubled)
        for doubled in ("n.x ~ n.x", "n.x + n.x", "[n.x, n.x]", "dict(a=n.x, b=n.x)")
    ),
    *("{{ 'x' * 10**9 }}", "{{ ([1] * 10**9) | length }}", "{{ 9**(9**9) }}", "{{ 'x' | center(10**9) }}"),
    *("{{ 'x'.ljust(10**9) }}", "{{ {'a': 1} | tojson(indent=10**9) }}", "{{ [1] | batch(10**9, 'x') | list }}"),
    *("{{ '%1000000000d' % 1 }}", "{{ '%*d' | format(10**9, 1) }}", "{{ '{:1000000000}'.format(1) }}"),
    *("{{ '{:{w}}'.format(1, w=10**9) }}", "{% set s = 'x' * 10000 %}{{ s.replace('x', s).replace('x', s) }}"),
]
INSIDES = [
    *("{{ ''.__class__ }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ '' | attr('__class__') }}"),
    *("{{ '{0.__class__}'.format('') }}", "{{ raise_exception.__globals__ }}", "{{ strftime_now.__self__ }}"),
    *("{{ self._TemplateReference__context }}", "{{ messages.append(1) }}"),
]
BROKEN = {
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "maximum recursion depth",
    "{% for %}": "Expected an expression",
    "{{ 1 | nosuch }}": "No filter named 'nosuch'",
    "{% include '/etc/passwd' %}": "no loader",
    f"{{{{ {'(' * 5000}1{')' * 5000} }}}}": "maximum recursion depth",
    "x" * 10**7: "makes more than 4,194,304 characters",
    "{{ tools.name.first }}": "has no attribute 'name'",
    "{{ raise_exception('Only\ntwo roles') }}": "conversation: Only two roles",
}


def refusal(template: str) -> str:
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        render(template, [{"role": "user", "content": "Hi"}], {}, ask=True)
    assert time.monotonic() - start < 5
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("template", ENDLESS, ids=range(len(ENDLESS)))
def test_a_template_that_would_not_end_or_fill_the_memory_is_refused(
    template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "SECONDS", 0.4)
    assert any(reason in refusal(template) for reason in ("far more time", "characters", "recursion"))


DEEP = TWICE.replace("EXPRESSION", "(n.x, n.x)").split("{{")[0]


@pytest.mark.slow
def test_what_no_python_interrupts_ends_with_the_process_and_one_line() -> None:
    """To hash a tuple of tuples of tuples is one step of Python, and would take longer than the sun shines."""
    code = "from lit_llama import sandbox as s; s.SECONDS = 0.1; s.LAST = 1.2; s.render({!r}, [], {{}}, True)"
    for use in ("{{ {n.x: 1} }}", "{{ [n.x, n.x] | unique | list }}"):
        command = [sys.executable, "-c", code.format(DEEP + use)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 1
        assert done.stderr.startswith("error: the chat template cannot render this conversation: it takes far more")
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("template", INSIDES)
def test_a_template_that_reaches_for_the_insides_of_python_is_refused(template: str) -> None:
    assert "is unsafe" in refusal(template)


@pytest.mark.parametrize("template", BROKEN, ids=BROKEN.values())
def test_a_template_that_is_broken_or_refuses_says_why(template: str) -> None:
    assert BROKEN[template] in refusal(template)
