import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Literal

from lit_llama.cli import expand_home, explain, join_lists, nearest, type_words
from lit_llama.lora import LoRAConfig, add_lora, lora_state_dict
from lit_llama.progress import progress

import pytest
from builders import RESULTS, TINY, command, random_model, randomize, run_script, save_file
from builders_processes import run_python, start

SCRIPT = '''
"""A script."""
from pathlib import Path
from jsonargparse.typing import PositiveInt
from lit_llama.cli import constants, run
from lit_llama.errors import UserError

rate = 3e-4  # how fast # really
# how long
steps: PositiveInt | None = None  # how many
names = "a,b"
FIXED = 1
_private = 2


def main(path: Path = Path("x"), resume: bool = False) -> None:
    derived = steps or 7
    if names == "fail":
        raise UserError("this is wrong")
    if names == "missing":
        open(path)
    print(rate, derived, names, path, resume, constants(__import__("sys").modules["__main__"]))


if __name__ == "__main__":
    run(main)
'''


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


@pytest.mark.slow
def test_defaults_and_overrides_reach_main_and_are_recorded(script: Path) -> None:
    settings = {"rate": 0.0003, "steps": None, "names": "a,b"}
    assert run_python(script).stdout == f"0.0003 7 a,b x False {settings}\n"
    out = run_python(script, "--rate", "1", "--steps", "3", "--names", "c", "--path", "y/z", "--resume", "true").stdout
    assert out == f"1.0 3 c y/z True { {'rate': 1.0, 'steps': 3, 'names': 'c'} }\n"


@pytest.mark.slow
def test_help_lists_each_constant_with_its_comment_type_and_default(script: Path) -> None:
    text = " ".join(run_python(script, "--help").stdout.split())
    assert "settings: --rate NUMBER how fast # really (default: 0.0003)" in text
    assert "how long: --steps INT how many --names TEXT names (default: a,b)" in text
    assert "--path PATH (default: x) --resume {true,false} (default: false)" in text
    assert "FIXED" not in text
    assert "private" not in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rate", "1", "--steps", "many"), "--steps takes a positive whole number, not 'many'"),
        (("--steps=0",), "--steps takes a positive whole number, not '0'"),
        (("--unknown", "1"), "--unknown"),
        (("--rate", "x"), "--rate takes a number, not 'x'"),
        (("--rate", "1e400"), "--rate takes a number of at most 2,147,483,647, not inf"),
        (("--resume", "perhaps"), "--resume takes true or false, not 'perhaps'"),
        (("--resume",), "--resume takes true or false, and none is given"),
        (("--resume", "--steps", "3"), "--resume takes true or false, and none is given"),
        (("--step", "3"), "--step is not a flag of this script; did you mean --steps?"),
        (("--xyz=3",), "--xyz is not a flag of this script; see --help"),
    ],
)
def test_wrong_values_are_refused(script: Path, arguments: tuple[str, ...], message: str) -> None:
    result = run_python(script, *arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("word", "flag"),
    [
        ("lr", "learning_rate"),
        ("bs", "batch_size"),
        ("epochs", "num_epochs"),
        ("num_ep", "num_epochs"),
        ("r", "lora_r"),
        ("lora_rank", "lora_r"),
        ("checkpoint_path", "pretrained_path"),
        ("seed_", "seed"),
        ("rank", "lora_r"),
        ("model", "pretrained_path"),
        ("xyz", None),
    ],
)
def test_the_nearest_flag_is_found(word: str, flag: str | None) -> None:
    flags = ("lr_schedule", "learning_rate", "batch_size", "num_epochs", "resume", "lora_r", "pretrained_path", "seed")
    assert nearest(word, flags) == flag


@pytest.mark.parametrize(
    ("word", "flags", "flag"),
    [
        ("pretrained_path", ("lora_path", "checkpoint_path"), "checkpoint_path"),
        ("accelerator", ("temperature", "prompt"), None),  # what it stood for is not there
        ("mask_inputs", ("mask_prompt",), "mask_prompt"),
        ("gradient_accumulation_iters", ("micro_batch_size", "batch_size"), "batch_size"),
        ("datasets", ("data_dir", "text"), "text"),
    ],
)
def test_a_flag_of_another_name_means_its_own_flag_here_or_none(
    word: str, flags: tuple[str, ...], flag: str | None
) -> None:
    assert nearest(word, flags) == flag


def test_a_flag_of_another_script_names_that_script() -> None:
    assert run_script("generate", "--lora_path", "x").endswith("it is one of generate_lora.py")
    assert run_script("generate_lora", "--adapter_path", "x").endswith("it is one of generate_adapter.py")


def test_a_list_needs_a_value() -> None:
    assert "--lora_path takes a path, or several, and none is given" in str(run_script("generate_lora", "--lora_path"))


def test_no_abbreviation_is_taken_for_a_flag() -> None:
    for script, flag in (("finetune_lora", "--num_ep"), ("generate", "--temp"), ("generate_lora", "--max_new")):
        assert f"{flag} is not a flag of this script" in str(run_script(script, flag, 3))


def test_the_home_folder_is_meant_by_its_short_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/of/somebody")
    paths = (Path("~/x"), Path("a/~"), Path("~nobody-of-this-name/x"))
    assert expand_home(paths) == (Path("/home/of/somebody/x"), Path("a/~"), Path("~nobody-of-this-name/x"))
    assert expand_home("~/x") == "~/x"


def test_a_kind_of_value_is_said_in_plain_words() -> None:
    assert type_words(Path | None) == ("PATH", "a path")
    assert type_words(tuple[Path, ...]) == ("PATH ...", "a path, or several")
    assert type_words(Literal["a", "b"] | None) == ("{a,b}", "one of a, b")


@pytest.mark.slow
def test_mistakes_end_in_one_line(script: Path) -> None:
    result = run_python(script, "--names", "fail")
    assert (result.returncode, result.stderr) == (1, "error: this is wrong\n")
    result = run_python(script, "--names", "missing", "--path", "/not/there")
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "/not/there" in result.stderr


@pytest.mark.slow
def test_a_reader_that_has_seen_enough_is_no_error(script: Path, tmp_path: Path) -> None:
    endless = script.read_text().replace("derived =", "[print(i, flush=True) for i in range(10**6)]\n    derived =")
    script.write_text(endless)
    pipe, err = tmp_path / "pipe", tmp_path / "err"
    os.mkfifo(pipe)
    process = start(script, (), pipe, err)
    with open(pipe) as reader:
        assert reader.readline() == "0\n"
    process.join(60)
    assert (process.exitcode, err.read_text()) == (0, "")


def test_a_flag_for_several_values_is_given_once_or_often() -> None:
    flags = {"--x"}
    expected = ["--y", "1", "z", '--x=["a b", "c"]']
    assert join_lists(["--x", "a b", "c", "--y", "1", "z"], flags) == expected
    assert join_lists(["--x", "a b", "--y", "1", "z", "--x=c"], flags) == expected
    assert join_lists(["--y", "1"], flags) == ["--y", "1"]


def test_a_missing_compiler_is_told() -> None:
    error = RuntimeError("InvalidCxxCompiler: No working C++ compiler found in torch._inductor.config.cpp.cxx")
    assert explain(error) == ("error: --compile needs a compiler for C++, such as g++; install one, or leave it out", 1)


@pytest.mark.slow
def test_exit_statuses_tell_a_mistake_from_a_wrong_flag_and_a_stop(script: Path) -> None:
    assert run_python(script, "--steps", "many").returncode == 2
    assert run_python(script, "--names", "fail").returncode == 1
    script.write_text(script.read_text().replace("UserError(", "Stopped(").replace('wrong")', 'over", 143)'))
    script.write_text(script.read_text().replace("import UserError", "import Stopped"))
    stopped = run_python(script, "--names", "fail")
    assert (stopped.returncode, stopped.stderr) == (143, "this is over\n")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (KeyboardInterrupt(), "interrupted"),
        (KeyError("x"), "error: KeyError in "),
        (MemoryError("no more"), "error: out of memory; "),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9"), "error: out of memory; "),
    ],
)
def test_whatever_happens_ends_in_one_line(error: BaseException, line: str) -> None:
    try:
        raise error
    except BaseException as raised:
        text, status = explain(raised)
    assert text.startswith(line)
    assert "\n" not in text
    assert status == (130 if isinstance(error, KeyboardInterrupt) else 1)
    assert not isinstance(error, KeyError) or ("test_cli.py, line" in text and "--debug true" in text)


@pytest.mark.slow
def test_debug_shows_the_traceback(script: Path) -> None:
    script.write_text(script.read_text().replace("derived =", "{}[names]\n    derived ="))
    short, long = run_python(script), run_python(script, "--debug", "true")
    assert short.stderr.count("\n") == 1
    assert "Traceback" in long.stderr
    assert long.stderr.endswith(short.stderr)
    assert (short.returncode, long.returncode) == (1, 1)


@pytest.mark.slow
def test_a_script_that_is_terminated_removes_what_it_was_writing(script: Path, tmp_path: Path) -> None:
    writing = "    with replacing(path), replacing_folder(path.with_name('folder'), 'x'):\n        time.sleep(60)\n"
    text = script.read_text().replace("    derived =", writing + "    derived =")
    imports = "import time\nfrom lit_llama.storage.files import replacing, replacing_folder\n"
    script.write_text(text.replace("from pathlib", imports + "from pathlib"))
    out, err = tmp_path / "out", tmp_path / "err"
    process = start(script, ("--path", out / "x"), tmp_path / "stdout", err)
    while not (out / ".folder.part").exists():
        assert process.is_alive()
        time.sleep(0.01)
    process.terminate()
    process.join(60)
    assert err.read_text() == "terminated\n"
    assert process.exitcode == 143
    assert [*out.iterdir()] == []


@pytest.mark.slow
def test_ctrl_c_while_libraries_are_loaded_is_one_line() -> None:
    for delay in (0.15, 0.4, 0.7):
        process = subprocess.Popen(command("finetune_lora.py"), stderr=subprocess.PIPE, text=True)
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        assert process.communicate()[1].count("\n") == 1
        assert process.returncode in (1, 130)  # 1: it was fast, and has found no data


@pytest.fixture
def project(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with two models, neither of them the default."""
    models = tmp_path / "checkpoints" / "lit-llama"
    for age, name in enumerate(("new", "old", ".broken.part")):
        shutil.copytree(model_folder, models / name)
        os.utime(models / name / "lit-llama.pth", (1e9 - age, 1e9 - age))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_without_the_default_model_the_last_one_is_taken_and_named(
    project: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run_script("generate", "--max_new_tokens", 1) is None
    error = capsys.readouterr().err
    assert "7B/lit-llama.pth does not exist; the model is checkpoints/lit-llama/new/lit-llama.pth\n" in error
    default = project / "checkpoints" / "lit-llama" / "7B" / "lit-llama.pth"
    ended = run_script("generate", "--checkpoint_path", default)
    assert f"{default} does not exist" in str(ended)
    shutil.copytree(project / "checkpoints" / "lit-llama" / "old", default.parent)
    assert run_script("generate", "--max_new_tokens", 1) is None
    assert "does not exist" not in capsys.readouterr().err


def test_a_folder_is_the_file_in_it(project: Path, tmp_path: Path) -> None:
    model, config = random_model(TINY), LoRAConfig(r=2)
    add_lora(model, config)
    randomize(lora_state_dict(model))
    save_file(tmp_path / "run" / RESULTS["lora"], config, model, lora_state_dict(model), "plain")
    base = ("--pretrained_path", project / "checkpoints" / "lit-llama" / "old")
    assert run_script("generate_lora", *base, "--lora_path", tmp_path / "run", "--max_new_tokens", 1) is None
    assert run_script("merge_lora", *base, "--lora_path", tmp_path / "run", "--out_dir", tmp_path / "merged") is None
    assert run_script("export_hf", "--checkpoint_path", tmp_path / "merged", "--out_dir", tmp_path / "hf") is None
    ended = run_script("generate_lora", *base, "--lora_path", tmp_path)
    assert ended == f"error: {tmp_path} has no {RESULTS['lora']}; give the folder that has it, or a file"


def test_an_empty_prompt_is_refused(project: Path) -> None:
    assert run_script("generate", "--prompt", " ") == "error: the prompt is empty; give a text by --prompt"
    assert project.is_dir()


def test_progress_is_plain_lines_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_llama.progress.INTERVAL", 0)
    assert list(progress([5, 6, 7], "Counting", "number")) == [5, 6, 7]
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["Counting: number 1 of 3", "Counting: number 2 of 3"]
    assert lines[2].startswith("Counting: number 3 of 3, ")


@pytest.mark.parametrize(("kind", "method"), [("lora", ["LoRA"]), ("adapter", ["adapter"]), ("full", [])])
def test_the_help_of_training_is_in_groups(kind: str, method: list[str], capsys: pytest.CaptureFixture) -> None:
    assert run_script(f"finetune_{kind}", "--help") is None
    groups = re.findall(r"^(\w.*):$", capsys.readouterr().out, re.MULTILINE)
    assert groups[2:] == ["optimisation", "data", *method, "evaluation and saving", "devices"]
