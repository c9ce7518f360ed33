"""A batch whose rows have different LoRA files, against each file merged alone, and against PEFT's mixed batches."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from lit_llama.finetuned import FinetunedFile, skeleton
from lit_llama.formats.huggingface import hf_config, to_hf
from lit_llama.generation import Sampling, compile_steps, generate, generate_batch
from lit_llama.lora import TARGETS, LoRAConfig, merge_lora
from lit_llama.many_lora import ManyLoRA
from lit_llama.model import LLaMA, LLaMAConfig
from lit_llama.model_folder import load_model, save_model_folder
from lit_llama.quantization import quantize_blocks, quantize_int8

import peft
import pytest
import torch
from builders import TINY, random_model, randomize, run_script, save_file
from merge_lora import dequantize_blocks
from test_quantize import as_plain_model
from tokenizers import Tokenizer as HFTokenizer
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

TIED = replace(TINY, tie_embeddings=True)
WIDE = replace(TINY, n_embd=64, n_hidden=128)  # blocks of 64 weights
LORAS = (
    LoRAConfig(4, 32, 0.1, ("query", "value")),
    LoRAConfig(2, 3, 0.0, ("key",)),
    LoRAConfig(8, 8, 0.0, TARGETS),
    LoRAConfig(1, 5, 0.0, ("projection", "mlp")),
)
FILES = [2, -1, 0, 3, 1, 2]  # of the rows of a batch


def lora_file(base: LLaMAConfig, config: LoRAConfig, seed: int) -> FinetunedFile:
    torch.manual_seed(seed)
    tensors = {name: torch.empty_like(tensor, device="cpu") for name, tensor in skeleton(base, config)[1].items()}
    randomize(tensors)
    return FinetunedFile(Path(f"{seed}.pth"), config, tensors, base=base)


def lora_files(base: LLaMAConfig) -> list[FinetunedFile]:
    return [lora_file(base, config, seed) for seed, config in enumerate(LORAS, 1)]


@torch.no_grad()
def alone(model: LLaMA, file: FinetunedFile | None) -> LLaMA:
    """A model with the update of one file in its weights."""
    if file:
        file.add_to(model)
        merge_lora(model)
    return model.eval()


@pytest.mark.parametrize("config", [TINY, TIED, replace(TINY, n_kv_head=4)], ids=["gqa", "tied", "mha"])
@torch.no_grad()
def test_each_row_has_the_logits_of_its_merged_model(config: LLaMAConfig) -> None:
    model, files = random_model(config), lora_files(config)
    many = ManyLoRA(model, files, len(FILES))
    idx = torch.randint(config.vocab_size, (len(FILES), 40))
    expected = [
        alone(random_model(config), files[i] if i >= 0 else None)(row[None]) for i, row in zip(FILES, idx, strict=True)
    ]
    many.choose(FILES)
    torch.testing.assert_close(model(idx), torch.cat(expected), atol=1e-4, rtol=0)
    many.choose([-1] * len(idx))
    assert torch.equal(model(idx), random_model(config)(idx))


def to_int8(model: LLaMA) -> None:
    quantize_int8(model, torch.float32, torch.device("cpu"))


def to_nf4(model: LLaMA) -> None:
    pytest.importorskip("bitsandbytes")
    quantize_blocks(model, "cpu", None)


def as_numbers(model: LLaMA) -> LLaMA:
    """The same model with the numbers that its quantised weights stand for."""
    dequantize_blocks(model)
    return as_plain_model(model)


@pytest.mark.parametrize("quantize", [to_int8, to_nf4])
@torch.no_grad()
def test_on_a_quantised_base_they_are_those_of_the_rounded_base(quantize: Callable[[LLaMA], None]) -> None:
    idx, files = torch.randint(WIDE.vocab_size, (len(FILES), 40)), lora_files(WIDE)
    expected = []
    for i, row in zip(FILES, idx, strict=True):
        model = random_model(WIDE)
        quantize(model)
        expected.append(alone(as_numbers(model), files[i] if i >= 0 else None)(row[None]))
    model = random_model(WIDE)
    quantize(model)
    ManyLoRA(model, files, len(FILES)).choose(FILES)
    torch.testing.assert_close(model(idx), torch.cat(expected), atol=1e-3, rtol=0)


def test_greedy_answers_of_a_mixed_batch_are_those_of_the_merged_models() -> None:
    model, files = random_model(TINY), lora_files(TINY)
    ManyLoRA(model, files, len(FILES)).choose(FILES)
    prompts = [torch.randint(TINY.vocab_size, (n,)).tolist() for n in (5, 1, 17, 9, 3, 5)]
    expected = [
        list(generate(alone(random_model(TINY), files[i] if i >= 0 else None), prompt, Sampling(20, 0)))
        for i, prompt in zip(FILES, prompts, strict=True)
    ]
    assert generate_batch(model, prompts, Sampling(20, 0)) == expected
    assert len({tuple(answer) for answer in expected}) == len(FILES)


@pytest.mark.slow
def test_a_step_is_compiled_once_for_all_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch's tracing alone; test_generation.py has code in C++ made of a step."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model = random_model(TINY)
    many = ManyLoRA(model, lora_files(TINY), len(FILES))
    prompts = [torch.randint(TINY.vocab_size, (n,)).tolist() for n in (5, 1, 17, 9, 3, 5)]

    def answers() -> list[list[list[int]]]:
        found = []
        for files in (FILES, FILES[::-1]):
            many.choose(files)
            found.append(generate_batch(model, prompts, Sampling(20, 0)))
        return found

    expected = answers()
    compile_steps(model)
    counters.clear()
    assert answers() == expected
    assert counters["stats"]["unique_graphs"] == 1


@torch.no_grad()
def test_one_file_takes_the_place_of_another() -> None:
    model, files = random_model(TINY), lora_files(TINY)
    many = ManyLoRA(model, [files[2], files[3]], 1)
    many.choose([0])
    many.files[0] = files[0]
    many.choose([0])
    idx = torch.randint(TINY.vocab_size, (1, 40))
    torch.testing.assert_close(model(idx), alone(random_model(TINY), files[0])(idx), atol=1e-4, rtol=0)


@torch.no_grad()
def test_mixed_batches_of_peft_have_the_same_logits(tmp_path: Path, byte_tokenizer: HFTokenizer) -> None:
    base = random_model(TINY)
    save_model_folder(tmp_path / "base", base.state_dict(), TINY, {"tokenizer.json": byte_tokenizer.to_str()})
    hf = LlamaForCausalLM(LlamaConfig(**hf_config(TINY, torch.float32)))
    hf.load_state_dict(to_hf(base.state_dict(), TINY))
    files = {name: lora_file(TINY, LORAS[i], i) for i, name in enumerate("abd")}
    files["d"] = lora_file(TINY, LoRAConfig(8, 4, 0.0, ("key", "mlp")), 3)
    for name, file in files.items():
        save_file(tmp_path / f"{name}.pth", file.config, base, dict(file.tensors), "plain")
        flags = ("--lora_path", tmp_path / f"{name}.pth", "--out_dir", tmp_path / name, "--base_model", "x")
        assert run_script("export_peft", *flags, "--pretrained_path", tmp_path / "base") is None
    theirs = peft.PeftModel.from_pretrained(hf, tmp_path / "a", adapter_name="a").eval()
    for name in "bd":
        theirs.load_adapter(tmp_path / name, adapter_name=name)
    rows = ["d", "__base__", "a", "b", "a"]
    idx = torch.randint(TINY.vocab_size, (len(rows), 40))
    many = ManyLoRA(base, list(files.values()), len(rows))
    many.choose([list(files).index(name) if name in files else -1 for name in rows])
    torch.testing.assert_close(base(idx), theirs(idx, adapter_names=rows).logits, atol=1e-4, rtol=0)


@pytest.fixture
def paths(checkpoint: Path, tmp_path: Path) -> list[Path]:
    """LoRA files of a model on the disk, each with a template of its own."""
    config = load_model(checkpoint).config
    for i, style in enumerate(("plain", "alpaca")):
        file = lora_file(config, LORAS[i], i)
        save_file(tmp_path / f"{i}.pth", file.config, LLaMA(config), dict(file.tensors), style)
    return [tmp_path / "0.pth", tmp_path / "1.pth"]


def answers(checkpoint: Path, capsys: pytest.CaptureFixture, *flags: object) -> str:
    capsys.readouterr()
    common = ("--pretrained_path", checkpoint, "--temperature", 0, "--max_new_tokens", 12)
    assert run_script("generate_lora", *common, *flags) is None
    return capsys.readouterr().out


@pytest.mark.slow
def test_questions_are_answered_by_their_files(
    checkpoint: Path, paths: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    texts = ["Count to 4", "Hi", "Count to 11, aloud"]
    (tmp_path / "questions.txt").write_text("\n".join(texts))
    (tmp_path / "lines.txt").write_text(f"2\n-\n{paths[0]}\n")
    one = [[answers(checkpoint, capsys, "--lora_path", path, "--prompt", text) for text in texts] for path in paths]
    assert run_script("generate", "--checkpoint_path", checkpoint, "--prompt", "Hi", "--temperature", 0,
                      "--max_new_tokens", 12) is None  # fmt: skip
    base = capsys.readouterr().out
    several = ("--lora_path", *paths, "--prompt_file", tmp_path / "questions.txt")
    assert len({*one[0], *one[1], base}) == 7
    assert answers(checkpoint, capsys, *several) == one[0][0] + one[1][1] + one[0][2]
    for size in (1, 2, 16):
        given = ("--batch_size", size)
        assert answers(checkpoint, capsys, *several, "--lora_of", "each", *given) == "".join(one[0] + one[1])
        lines = ("--lora_of", tmp_path / "lines.txt")
        assert answers(checkpoint, capsys, *several, *lines, *given) == one[1][0] + base + one[0][2]
    assert answers(checkpoint, capsys, "--lora_path", *paths, "--prompt", "Hi") == one[0][1] + one[1][1]


def test_a_question_without_its_file_is_refused_in_one_line(
    checkpoint: Path, paths: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "questions.txt").write_text("a\nb\n")
    (tmp_path / "lines.txt").write_text("1\n3\n")
    common = ("--pretrained_path", checkpoint, "--lora_path", *paths, "--prompt_file", tmp_path / "questions.txt")
    lines = ("--lora_of", tmp_path / "lines.txt")
    assert "3 is not a path of --lora_path, 1 to 2, or -" in str(run_script("generate_lora", *common, *lines))
    (tmp_path / "lines.txt").write_text("1\n")
    assert "has 1 lines, expected one for each of the 2" in str(run_script("generate_lora", *common, *lines))
    assert "leave out --merge" in str(run_script("generate_lora", *common, "--merge", "true"))
