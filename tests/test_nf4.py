"""A frozen base in 4 bits: what is stored, computed, trained, and what is not."""

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lit_llama.adapter import AdapterConfig, adapter_state_dict, add_adapter, mark_only_adapter_as_trainable
from lit_llama.errors import UserError
from lit_llama.finetuned import read_finetuned
from lit_llama.generation import compile_steps
from lit_llama.lora import TARGETS, LoRAConfig, add_lora, lora_state_dict, mark_only_lora_as_trainable, merge_lora
from lit_llama.model import Linear, LLaMA
from lit_llama.model_folder import load_model, save_model_folder
from lit_llama.quantization import NF4Weight, quantize_blocks
from lit_llama.training.run import compile_blocks, load_base

import pytest
import torch
from builders import TINY, random_model, randomize, run_script, save_file
from lightning.fabric.strategies import ModelParallelStrategy
from merge_lora import dequantize_blocks
from torch import Tensor, nn
from torch.nn import functional as F

LORA = LoRAConfig(r=4, dropout=0.0, targets=TARGETS)


def nf4_values() -> Tensor:
    """The 16 numbers, by the definition of bitsandbytes' create_normal_map: quantiles of a normal distribution."""
    offset, quantile = 0.9677083, torch.distributions.Normal(0, 1).icdf
    positive = quantile(torch.linspace(offset, 0.5, 9)[:-1])
    negative = -quantile(torch.linspace(offset, 0.5, 8)[:-1])
    values = torch.cat([positive, negative, torch.zeros(1)]).sort().values
    return values / values.max()


def nearest(weight: Tensor) -> Tensor:
    """A matrix rounded to NF4 in blocks of 64, by the paper's formula (section 3); scales are not quantised."""
    blocks = weight.reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    values = nf4_values()
    index = (blocks / scale).unsqueeze(-1).sub(values).abs().argmin(-1)
    return (values[index] * scale).view_as(weight)


def quantized_and_plain() -> tuple[LLaMA, LLaMA]:
    """A model with a 4-bit base, and an ordinary one with the very same numbers."""
    model = random_model(TINY)
    plain = copy.deepcopy(model)
    quantize_blocks(model, "cpu", None)
    for layer, other in zip(model.transformer.h.modules(), plain.transformer.h.modules(), strict=True):
        if isinstance(layer, Linear):
            assert isinstance(layer.weight, NF4Weight)
            other.weight = nn.Parameter(layer.weight.dequantize())
    return model, plain


def gradients(model: LLaMA) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model.train()(torch.randint(TINY.vocab_size, (2, 11))).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_values_are_those_of_the_paper_up_to_the_scales_of_8_bits() -> None:
    torch.manual_seed(0)
    weight = torch.randn(128, 192)
    stored, expected = NF4Weight.quantize(weight).dequantize(), nearest(weight)
    assert (stored - expected).norm() / expected.norm() < 0.01  # the second quantisation
    assert (expected - weight).norm() / weight.norm() == pytest.approx(0.092, abs=0.004)


def test_a_weight_takes_4_bits_and_an_eighth() -> None:
    weight = NF4Weight.quantize(torch.randn(256, 512))
    bits = 8 * sum(tensor.nbytes for tensor in weight.stored()) / weight.numel()
    assert bits == pytest.approx(4 + 8 / 64 + 32 / (64 * 256))


def test_only_the_matrices_of_blocks_are_quantised() -> None:
    model, _ = quantized_and_plain()
    quantised = {name for name, p in model.named_parameters() if isinstance(p, NF4Weight)}
    kinds = ("attn.c_attn", "attn.c_proj", "mlp.c_fc1", "mlp.c_fc2", "mlp.c_proj")
    assert quantised == {f"transformer.h.{i}.{kind}.weight" for i in range(TINY.n_layer) for kind in kinds}


def test_lora_gets_the_gradients_of_the_dequantised_base() -> None:
    results = []
    for model in quantized_and_plain():
        torch.manual_seed(1)
        add_lora(model, LORA)
        randomize({name: tensor for name, tensor in lora_state_dict(model).items() if name.endswith("B")})
        mark_only_lora_as_trainable(model)
        results.append(gradients(model))
    assert results[0].keys() == results[1].keys() == lora_state_dict(model).keys()
    for name, gradient in results[0].items():
        torch.testing.assert_close(gradient, results[1][name])


def test_the_adapter_gets_the_gradients_of_the_dequantised_base() -> None:
    results = []
    for model in quantized_and_plain():
        torch.manual_seed(1)
        add_adapter(model, AdapterConfig(prompt_length=3, start_layer=0))
        randomize(adapter_state_dict(model))
        mark_only_adapter_as_trainable(model)
        results.append(gradients(model))
    assert results[0].keys() == results[1].keys() == adapter_state_dict(model).keys()
    for name, gradient in results[0].items():
        torch.testing.assert_close(gradient, results[1][name])


@pytest.mark.parametrize("compiling", [compile_blocks, compile_steps])
def test_a_quantised_model_is_not_compiled(compiling: Callable[[LLaMA], None]) -> None:
    model, _ = quantized_and_plain()
    with pytest.raises(UserError, match="leave out --compile"):
        compiling(model)


def test_the_backward_pass_keeps_no_dequantised_matrix() -> None:
    weight = NF4Weight.quantize(torch.randn(128, 64))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        F.linear(torch.randn(3, 64, requires_grad=True), weight)
    assert not any(tensor.is_floating_point() and tensor.numel() >= weight.numel() for tensor in kept)


def test_merging_adds_to_the_dequantised_weights() -> None:
    model, plain = quantized_and_plain()
    for one in (model, plain):
        torch.manual_seed(1)
        add_lora(one, LORA)
        randomize(lora_state_dict(one))
        merge_lora(one)
    for (name, weight), other in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        assert type(weight) is Tensor, name
        assert torch.equal(weight, other)


def test_a_single_token_goes_the_same_way() -> None:
    model, plain = quantized_and_plain()
    idx = torch.tensor([[5]])
    with torch.inference_mode():
        torch.testing.assert_close(model(idx), plain(idx))


def test_loading_quantises_and_keeps_the_rest_as_it_is(tmp_path: Path) -> None:
    model = random_model(TINY)
    save_model_folder(tmp_path / "model", model.state_dict(), model.config, {})
    loaded = load_model(tmp_path / "model" / "lit-llama.pth", nf4=True)
    quantize_blocks(model, "cpu", None)
    for (name, weight), other in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert type(weight) is type(other), name
        assert torch.equal(*(w.dequantize() if isinstance(w, NF4Weight) else w for w in (weight, other)))


def lora_of(checkpoint: Path, folder: Path) -> Path:
    """A file of random LoRA for a base that is not in 4 bits."""
    model, config = load_model(checkpoint), LoRAConfig(r=2, targets=("query", "mlp"))
    add_lora(model, config)
    randomize(lora_state_dict(model))
    save_file(folder / "lora.pth", config, model, lora_state_dict(model), "plain")
    return folder / "lora.pth"


@pytest.fixture(scope="module")
def finetuned(checkpoint: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA file that was trained on a 4-bit base."""
    out_dir = tmp_path_factory.mktemp("nf4")
    places = ("--pretrained_path", checkpoint, "--data_dir", data_dir, "--out_dir", out_dir)
    steps = ("--max_steps", 3, "--batch_size", 4, "--learning_rate", 0.01, "--block_size", 128)
    assert run_script("finetune_lora", *places, *steps, "--quantize", "nf4") is None
    return out_dir / "lit-llama-lora-finetuned.pth"


@pytest.mark.slow
def test_a_lora_file_answers_on_the_base_that_it_was_trained_on(
    finetuned: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    paths = ("--lora_path", finetuned, "--pretrained_path", checkpoint)
    assert run_script("merge_lora", *paths, "--out_dir", tmp_path / "merged") is None
    assert "quantise it to 4 bits again would change them by up to" in capsys.readouterr().err
    same = ("--prompt", "Count to 3", "--temperature", 0, "--max_new_tokens", 30)
    assert run_script("generate_lora", *paths, *same) is None
    assert run_script("generate", "--checkpoint_path", tmp_path / "merged" / "lit-llama.pth", *same) is None
    first, second = capsys.readouterr().out.split("Count to 3")[1:]
    assert first == second
    expected = load_model(checkpoint, nf4=True)
    read_finetuned(finetuned, "lora").add_to(expected)
    merge_lora(expected)
    dequantize_blocks(expected)
    for name, weight in load_model(tmp_path / "merged" / "lit-llama.pth").state_dict().items():
        assert torch.equal(weight, expected.state_dict()[name]), name


def test_4_bits_can_be_asked_for(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    base = load_model(checkpoint, nf4=True)
    dequantize_blocks(base)
    files = {name: checkpoint.with_name(name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    save_model_folder(tmp_path / "rounded", base.state_dict(), base.config, files)
    path = lora_of(checkpoint, tmp_path)
    same = ("--prompt_style", "plain", "--prompt", "Count to 3", "--temperature", 0, "--max_new_tokens", 30)
    for script, flags in (("generate", "--checkpoint_path"), ("generate_lora", "--pretrained_path")):
        lora = ("--lora_path", path, "--force", True) if script == "generate_lora" else ()
        assert run_script(script, flags, checkpoint, *same, *lora, "--quantize", "nf4") is None
        assert run_script(script, flags, tmp_path / "rounded", *same, *lora) is None
        first, second = capsys.readouterr().out.split("Count to 3")[1:]
        assert first == second


def test_an_export_to_peft_says_how_to_load_the_base(
    finetuned: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    paths = ("--lora_path", finetuned, "--pretrained_path", checkpoint, "--out_dir", tmp_path / "peft")
    assert run_script("export_peft", *paths, "--base_model", "x") is None
    assert "BitsAndBytesConfig(load_in_4bit=True" in capsys.readouterr().err


def test_a_4_bit_base_is_not_sharded(checkpoint: Path) -> None:
    sharded: Any = SimpleNamespace(strategy=ModelParallelStrategy(lambda model, _: model))
    with pytest.raises(UserError, match="choose --strategy ddp"):
        load_base(sharded, checkpoint, torch.float32, "nf4")
