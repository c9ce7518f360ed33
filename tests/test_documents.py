"""What README, guides and Makefile tell users to type exists: scripts, flags, settings, files, links, quoted code."""

import ast
import re
import shlex
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

from lit_llama.cli import find_constants

import pytest
from builders import ROOT

FOLDERS = ("", "lit_llama/", "lit_llama/*/", "scripts/", "scripts/*/", "tests/", "tests/*/", "tests/*/*/", "howto/*/")
PAGES = ("README.md", "CONTRIBUTING.md", "howto/*.md", "howto/*/*.md", "data/ml_questions/README.md", "Makefile")
DOCUMENTS = [path for page in PAGES for path in sorted(ROOT.glob(page))]
OURS = re.compile(r"(?<![\w./-])(?<!no `)(?:(?:lit_llama|scripts|howto|tests|data/ml_questions)/[\w./*-]*|\w+\.py\b)")
PYTHON = re.compile(r"((?:.+\n)+)\n```python\n((?:(?!```).*\n)*)```")  # code, with the paragraph above it
Line = tuple[int, str]  # its number, from 1, and its text


@cache
def flags_of(script: Path) -> frozenset[str]:
    """The flags of a script, without their dashes: the parameters of its main and the constants of its module."""
    module = ModuleType(script.stem)
    module.__file__ = str(script)
    body = ast.parse(script.read_text(encoding="utf-8")).body
    main = next(node for node in body if isinstance(node, ast.FunctionDef) and node.name == "main")
    return frozenset({"debug", "check_files", *(argument.arg for argument in main.args.args), *find_constants(module)})


@cache
def scripts() -> dict[str, Path]:
    """Scripts by the paths that users type."""
    paths = [*ROOT.glob("*.py"), *ROOT.glob("scripts/**/*.py")]
    return {str(path.relative_to(ROOT)): path for path in paths if "\ndef main(" in path.read_text(encoding="utf-8")}


def fenced(lines: list[str]) -> Iterator[Line]:
    """The lines within ``` fences."""
    inside = False
    for number, line in enumerate(lines, 1):
        if line.lstrip().startswith("```"):
            inside = not inside
        elif inside:
            yield number, line


def recipes(lines: list[str]) -> Iterator[Line]:
    """The lines of a Makefile's recipes, with what its variables hold; a command that is echoed counts as well."""
    variables = dict(re.findall(r"^(\w+) = (.*)$", "\n".join(lines), re.MULTILINE))
    for number, line in enumerate(lines, 1):
        if line.startswith("\t"):
            line = re.sub(r"\$\((\w+)\)", lambda match: variables.get(match[1], match[0]), line.strip())
            yield number, re.sub(r"^@?echo '(.*)'$", r"\1", line)


def commands(lines: Iterator[Line]) -> Iterator[tuple[int, list[str]]]:
    """The words of each command that runs one of our scripts; continued lines are one command."""
    text, first = "", 0
    for number, line in lines:
        text, first = text + line, first if text else number
        if text.endswith("\\"):
            text = text[:-1]
            continue
        for part in re.split(r"&&|;|\|", text):
            words = part.split() if part.count("'") % 2 or part.count('"') % 2 else shlex.split(part, comments=True)
            if words and words[0] in ("python", "torchrun") and any(word.endswith(".py") for word in words):
                yield first, words
        text = ""


def wrong_in_command(words: list[str]) -> Iterator[str]:
    start = next(i for i, word in enumerate(words) if word.endswith(".py"))
    if words[start] not in scripts():
        yield f"{words[start]} is not a script"
        return
    for word in words[start + 1 :]:
        flag = word.partition("=")[0].removeprefix("--")
        if word.startswith("--") and flag not in flags_of(scripts()[words[start]]):
            yield f"{words[start]} has no flag --{flag}"


def wrong_in_line(page: Path, line: str, header: str, known: frozenset[str]) -> Iterator[str]:
    """What a line, fenced or not, names that does not exist.

    `header` is that of the table that it is in; `known` are the settings of the scripts that its page names.
    """
    for path in OURS.findall(line):
        pattern = path.rstrip("/.").replace("NAME", "*")
        if not any(list(ROOT.glob(folder + pattern)) for folder in FOLDERS):
            yield f"{path} does not exist"
    for target in re.findall(r"\]\(([^)\s]+)\)", line):
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if "://" not in target and not file.exists():
            yield f"the link to {target} leads nowhere"
        elif "://" not in target and anchor and anchor not in anchors(file):
            yield f"{path or page.name} has no heading #{anchor}"
    for span in re.findall(r"`([^`]+)`", line):
        assigned = re.match(r"(\w+) = ", span)
        in_table = header.startswith("| setting") and f"`{span}`" in line.split("|")[1] and span.isidentifier()
        setting = assigned[1] if assigned else span if in_table else ""
        if setting.islower() and setting not in known:
            yield f"no script that is named here has a setting {setting}"
        flag = re.match(r"--(\w+)", span)
        if flag and flag[1] != "help" and not any(flag[1] in flags_of(script) for script in scripts().values()):
            yield f"no script has a flag --{flag[1]}"


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def wrong_in(page: Path) -> list[str]:
    """All that is wrong in a document, each with its file and line."""
    text = page.read_text(encoding="utf-8")
    lines = text.splitlines()
    is_makefile = page.name == "Makefile"
    named = [path for name, path in scripts().items() if name in text]
    known = frozenset().union(*map(flags_of, named))
    found = []
    for number, words in commands(recipes(lines) if is_makefile else fenced(lines)):
        found += [(number, problem) for problem in wrong_in_command(words)]
    header = ""
    for number, line in enumerate(lines, 1):
        header = (header or line) if line.startswith("|") else ""
        found += [(number, problem) for problem in wrong_in_line(page, line, header, known)]
    return [f"{page.name}:{number}: {problem}" for number, problem in sorted(dict.fromkeys(found))]


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_document_names_exists(page: Path) -> None:
    assert wrong_in(page) == []


def test_commands_are_found_in_the_documents() -> None:
    """The tests above would pass if they found nothing to check."""
    for page in DOCUMENTS:
        lines = page.read_text(encoding="utf-8").splitlines()
        count = len(list(commands(recipes(lines) if page.name == "Makefile" else fenced(lines))))
        assert count > 0 or "CONTRIBUTING" in page.name or page.parent.name in ("ml_questions", "exercises"), page


WRONG = """# A page

```sh
python finetune_lora.py --lora_r 4 \\
  --lora_rank 4
python no_such_script.py && python scripts/evaluate.py --text a --no_such_flag=1  # python x.py
torchrun --nnodes 2 finetune_full.py --devices 4 --n_nodes 2
```

| setting | |
|---|---|
| `lora_r` | |
| `lora_beta` | |

| style | |
|---|---|
| `plain` | |

There is no `x.py`.
See `lit_llama/nothing.py`, `--magic`, `learning_rate = 1e-4`, `learning_speed = 1`, [this](#a-page), [that](#no-page),
[a file](nothing.md) and ![a picture](nothing.png).
"""


def test_mistakes_in_a_document_are_told_with_their_lines(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(WRONG)
    assert wrong_in(tmp_path / "page.md") == [
        "page.md:4: finetune_lora.py has no flag --lora_rank",
        "page.md:6: no_such_script.py does not exist",
        "page.md:6: no_such_script.py is not a script",
        "page.md:6: scripts/evaluate.py has no flag --no_such_flag",
        "page.md:6: x.py does not exist",
        "page.md:7: finetune_full.py has no flag --n_nodes",
        "page.md:13: no script that is named here has a setting lora_beta",
        "page.md:20: lit_llama/nothing.py does not exist",
        "page.md:20: no script has a flag --magic",
        "page.md:20: no script that is named here has a setting learning_speed",
        "page.md:20: page.md has no heading #no-page",
        "page.md:21: the link to nothing.md leads nowhere",
        "page.md:21: the link to nothing.png leads nowhere",
    ]


def test_mistakes_in_a_makefile_are_told_with_their_lines(tmp_path: Path) -> None:
    recipe = (
        "RUN = out\nall:\n\tpython finetune_lora.py --out_dir $(RUN) \\\n\t  --lora_rank 4\n\t@echo 'python x.py'\n"
    )
    (tmp_path / "Makefile").write_text(recipe)
    assert "Makefile:3: finetune_lora.py has no flag --lora_rank" in wrong_in(tmp_path / "Makefile")
    assert "Makefile:5: x.py is not a script" in wrong_in(tmp_path / "Makefile")


def quotes(page: Path) -> Iterator[tuple[str, str]]:
    """The Python of a page that is below a link to a file of ours: the file's path, and the lines that are quoted."""
    for paragraph, code in PYTHON.findall(page.read_text(encoding="utf-8")):
        for path in re.findall(r"\]\((\S+\.py)\)", paragraph):
            yield path, code


def is_quoted(code: str, source: str) -> bool:
    """Whether lines of code stand in a source, one after the other, all of them as much further in."""
    return any("\n" + textwrap.indent(code, " " * depth) in "\n" + source for depth in range(0, 24, 4))


@pytest.mark.parametrize(("path", "code"), [*quotes(ROOT / "README.md")], ids=lambda text: text.partition("\n")[0])
def test_code_in_the_readme_is_the_source(path: str, code: str) -> None:
    assert is_quoted(code, (ROOT / path).read_text(encoding="utf-8"))


def test_a_quote_is_found_further_in_and_a_changed_one_is_not() -> None:
    source = "class A:\n    def f():\n        g()\n\n        h()\n"
    assert is_quoted("g()\n\nh()\n", source)
    assert is_quoted("def f():\n    g()\n", source)
    assert not is_quoted("g()\nh()\n", source)
    assert not is_quoted("def f():\n        g()\n", source)
    assert not is_quoted("f():\n", source)


def test_the_readme_quotes_lora_and_the_training_loop() -> None:
    assert [path for path, _ in quotes(ROOT / "README.md")] == ["lit_llama/lora.py", "finetune_lora.py"]


def test_the_program_of_the_readme_runs(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    [program] = (code for text, code in PYTHON.findall((ROOT / "README.md").read_text()) if ".py)" not in text)
    [place] = re.findall(r'"(checkpoints/.+?)"', program)
    (tmp_path / place).parent.mkdir(parents=True)
    (tmp_path / place).symlink_to(model_folder)
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_every_module_is_listed_for_contributors() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    modules = {path.name for path in ROOT.glob("lit_llama/**/*.py")} - {"__init__.py"}
    assert {name for name in modules if f"`{name}`" not in text} == set()
