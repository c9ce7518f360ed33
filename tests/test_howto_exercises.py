"""The exercises on LoRA: none is solved as it stands, right answers pass in any form, and wrong ones do not."""

import importlib
import re
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from builders import ROOT

FOLDER = ROOT / "howto" / "exercises"
FUNCTIONS = {
    "layer": "Layer",
    "predict": "predict",
    "gradients": "gradients",
    "scaling": "stabilize_rank",
    "merge": "merge",
    "keys": "add_keys",
    "phi": "phi",
    "bug": "update",
    "loop": "train",
}
# Answers that are put in the place of a line of solutions.py; each exercise's right ones first, then its wrong ones.
LAYER = "self.linear(x) + self.scaling * (x @ self.A.T) @ self.B.T"
START = "nn.Parameter(torch.zeros(linear.out_features, r))"
PREDICT = 'n, 16 * n, "B"'
DA, DB = "scaling * torch.outer(B.T @ dh, x)", "scaling * torch.outer(dh, A @ x)"
SCALE = "config.alpha / config.r**0.5"
MERGE = "(W.float() + scaling * B.float() @ A.float()).to(W.dtype)"
KEYS = "torch.cat((A_query, new_A, A_value)), torch.cat((B_query, B_key, B_value))"
PHI = "float((first[:i] @ second[:j].T).square().sum() / min(i, j))"
SPLIT, ZEROS = "B.split((n_query, n_value))", "query.new_zeros(*x.shape[:-1], n_key)"
QUERY = "scaling * x @ A_query.T @ B_query.T"
ADAMW = "torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)"
AUTOGRAD = """[g.requires_grad_() and g for g in ()] or torch.autograd.grad(
        (scaling * B.requires_grad_() @ (A.requires_grad_() @ x) * dh).sum(), A)[0]"""
RIGHT = [
    ("layer", LAYER, "self.linear(x) + nn.functional.linear(nn.functional.linear(x, self.A), self.B) * self.scaling"),
    ("layer", LAYER, "x @ (self.linear.weight + self.scaling * self.B @ self.A).T"),
    ("layer", START, "nn.Parameter(linear.weight.new_zeros(linear.out_features, r))"),
    ("predict", PREDICT, 'n, 4 * 4 * sum(r * a + r * b for a, b in shapes), "B"'),
    ("gradients", DA, "torch.outer(scaling * (dh @ B), x)"),
    ("gradients", DA, "scaling * B.T @ dh[:, None] @ x[None]"),
    ("gradients", DB, "dh[:, None] * (scaling * A @ x)"),
    ("gradients", DB, "torch.einsum('o,r->or', dh, A @ x) * scaling"),
    ("scaling", SCALE, "config.alpha / torch.tensor(config.r).sqrt().item()"),
    ("scaling", SCALE, "layer.scaling * config.r**0.5"),
    ("scaling", SCALE, "config.alpha * config.r**-0.5"),
    ("scaling", SCALE, "config.alpha / layer.lora_B.size(1)**0.5"),
    ("merge", MERGE, "(W.float() + scaling * (B.float() @ A.float())).to(W.dtype)"),
    ("merge", MERGE, "(W.float() + (B.float() @ A.float()) * scaling).to(W.dtype)"),
    ("merge", MERGE, "(W.float() + B.float() @ (scaling * A.float())).to(W.dtype)"),
    ("merge", MERGE, "(W.double() + scaling * B.double() @ A.double()).to(W.dtype)"),
    ("merge", MERGE, "torch.addmm(W.float(), B.float(), A.float(), alpha=scaling).to(W.dtype)"),
    ("keys", KEYS, "torch.cat((A_query, new_A, A_value), 0), torch.vstack((B_query, 0 * B_key, B_value))"),
    ("phi", PHI, "float(torch.linalg.norm(first[:i] @ second[:j].T) ** 2 / min(i, j))"),
    ("phi", PHI, "(second[:j] @ first[:i].T).pow(2).sum().div(min(i, j)).item()"),
    ("bug", ZEROS, "torch.zeros(*x.shape[:-1], n_key, dtype=x.dtype, device=x.device)"),
    ("bug", SPLIT, "B[:n_query], B[n_query:]"),
    ("bug", QUERY, "(x @ A_query.T @ B_query.T) * scaling"),
    ("loop", ADAMW, "torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0)"),
]
WRONG = [
    ("layer", LAYER, "self.linear(x) + (x @ self.A.T) @ self.B.T"),  # alpha / r is missing
    ("layer", START, "nn.Parameter(torch.randn(linear.out_features, r))"),
    ("layer", "linear.requires_grad_(False)", "linear"),  # not frozen
    ("layer", "torch.randn(r, linear.in_features)", "torch.zeros(r, linear.in_features)"),
    ("predict", PREDICT, 'n, 8 * n, "B"'),  # no moments
    ("predict", PREDICT, 'n, 16 * n, "A"'),
    ("predict", "r * (n_out + n_in)", "n_out * n_in"),
    ("gradients", DA, DA.replace("scaling *", "0.5 *")),
    ("gradients", DA, DA.replace("scaling * ", "")),
    ("gradients", DA, AUTOGRAD),
    ("gradients", DB, "torch.outer(dh, A @ x)"),
    ("scaling", SCALE, "8 / config.r**0.5"),
    ("scaling", SCALE, "config.alpha / layer.lora_A.shape[0]**0.5"),  # of several targets
    ("scaling", SCALE, "config.alpha / config.r"),
    ("merge", MERGE, "W + (scaling * B.float() @ A.float()).to(W.dtype)"),  # rounded twice
    ("merge", MERGE, "W + scaling * B @ A"),
    ("merge", MERGE, "W.float() + scaling * B.float() @ A.float()"),  # not of W's dtype
    ("merge", MERGE, "(W.float() + B.float() @ A.float()).to(W.dtype)"),
    ("merge", MERGE, "W.add_((scaling * B.float() @ A.float()).to(W.dtype))"),  # W is changed
    ("keys", KEYS, KEYS.replace("new_A", "A_query")),
    ("keys", KEYS, KEYS.replace("new_A", "torch.ones_like(A_query)")),
    ("keys", KEYS, KEYS.replace("B_key", "B_key + 0.1")),
    ("phi", PHI, "float((first[:i] @ second[:j].T).square().sum() / max(i, j))"),
    ("phi", PHI, "float((first[:i] @ second[:j].T).square().sum())"),
    ("bug", SPLIT, "B.chunk(2)"),
    ("bug", ZEROS, "torch.zeros(*x.shape[:-1], n_key)"),
    ("loop", ADAMW, ADAMW.replace("rate", "10 * rate")),
    ("loop", "        optimizer.zero_grad()\n", ""),
    ("loop", '"lora_" in name', "True"),
]


@pytest.fixture(scope="module")
def exercise_tests() -> ModuleType:
    """test_exercises.py, with the exercises as they stand."""
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module("test_exercises")
    finally:
        sys.path.remove(str(FOLDER))


def outcomes(tests: ModuleType, source: str, exercise: str) -> list[bool]:
    """Whether each test of an exercise passes with the answers of this source."""
    answers: dict[str, object] = {"__name__": "answers"}
    exec(compile(source, "answers.py", "exec"), answers)
    tests.answers = SimpleNamespace(**answers)
    passed = []
    for name in [name for name in vars(tests) if name.startswith(f"test_{exercise}_")]:
        torch.manual_seed(0)
        try:
            getattr(tests, name)()
            passed.append(True)
        except (AssertionError, RuntimeError, NotImplementedError):
            passed.append(False)
    return passed


def read(name: str) -> str:
    return (FOLDER / f"{name}.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("exercise", FUNCTIONS)
def test_an_exercise_fails_as_it_stands_and_its_solution_passes(exercise: str, exercise_tests: ModuleType) -> None:
    assert not any(outcomes(exercise_tests, read("exercises"), exercise))
    solved = outcomes(exercise_tests, read("solutions"), exercise)
    assert solved
    assert all(solved)


@pytest.mark.parametrize(("exercise", "line", "answer"), RIGHT)
def test_a_right_answer_passes_however_it_is_written(
    exercise: str, line: str, answer: str, exercise_tests: ModuleType
) -> None:
    assert all(outcomes(exercise_tests, put(exercise, line, answer), exercise))


@pytest.mark.parametrize(("exercise", "line", "answer"), WRONG)
def test_a_wrong_answer_does_not_pass(exercise: str, line: str, answer: str, exercise_tests: ModuleType) -> None:
    assert not all(outcomes(exercise_tests, put(exercise, line, answer), exercise))


def put(exercise: str, line: str, answer: str) -> str:
    """The solutions with another line in one of them."""
    source = read("solutions")
    start = re.search(rf"^(def|class) {FUNCTIONS[exercise]}\b", source, re.MULTILINE).start()
    assert line in source[start:]
    return source[:start] + source[start:].replace(line, answer, 1)


def test_there_are_49_answers_and_more() -> None:
    assert len(RIGHT) + len(WRONG) >= 49


def test_every_exercise_has_a_name_and_needs_torch_and_pytest_alone() -> None:
    for file in ("exercises", "solutions"):
        assert re.findall(r"^(?:def|class) (\w+)", read(file), re.MULTILINE) == [*FUNCTIONS.values()]
    assert re.findall(r'"""(\w+): ', read("exercises")) == [*FUNCTIONS]
    imported = re.findall(
        r"^(?:from|import) (\w+)", "\n".join(map(read, ("exercises", "test_exercises"))), re.MULTILINE
    )
    assert {*imported} <= {"lit_llama", "torch", "pytest", "copy", "importlib", "os"}
