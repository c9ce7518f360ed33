"""Weights in 8 bits against the numbers that they stand for."""

from dataclasses import replace
from pathlib import Path

from lit_llama.adapter import AdapterConfig, adapter_state_dict, add_adapter, cache_prefix
from lit_llama.errors import UserError
from lit_llama.generation import Sampling, generate, generate_batch
from lit_llama.lora import LoRAConfig, add_lora, lora_state_dict, merge_lora
from lit_llama.model import Linear, LLaMA
from lit_llama.model_folder import save_model_folder
from lit_llama.quantization import FEW, Int8Linear, quantize_int8

import pytest
import torch
from builders import TINY, peak_of, random_model, randomize, run_script, save_file
from torch import Tensor
from torch.nn import functional as F

CPU = torch.device("cpu")


def layer_of(weight: Tensor) -> Int8Linear:
    return Int8Linear(weight, CPU)


def as_plain_model(model: LLaMA) -> LLaMA:
    """A quantised model with ordinary layers, whose weights are the numbers that its 8-bit ones stand for."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Int8Linear):
            layer = Linear(module.weight.size(1), module.weight.size(0))
            layer.weight.data = module.weight.float() * module.scale.float()[:, None]
            model.set_submodule(name, layer)
    return model


def test_every_weight_is_within_half_a_step_of_its_channel() -> None:
    weight = torch.randn(48, 64) * torch.logspace(-6, 2, 48)[:, None]
    weight[7] = 0
    layer = layer_of(weight)
    step = weight.abs().amax(1) / 127
    error = (layer.unpacked(torch.float32) - weight).abs().amax(1)
    assert (error <= step * (0.5 + 2**-8)).all()  # the scale is rounded to 8 bits
    assert (layer.weight.abs().amax(1) >= 126)[step > 0].all()
    assert not layer.unpacked(torch.float32)[7].any()


@pytest.mark.parametrize("n", [1, FEW, FEW + 1])
def test_products_are_those_of_the_numbers_stored(n: int) -> None:
    """Few tokens are rounded to bfloat16 on their way in and out, many are not."""
    layer, x = layer_of(torch.randn(48, 64)), torch.randn(2, n, 64)[:1]
    expected = F.linear(x, layer.weight.float() * layer.scale.float()[:, None])
    error = (layer(x) - expected).abs().max() / expected.abs().max()
    assert error < (2**-7 if n <= FEW else 1e-6)
    assert layer(x).shape == expected.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [1, FEW + 1])
def test_layers_compute_in_the_dtype_of_their_input(dtype: torch.dtype, n: int) -> None:
    layer, x = layer_of(torch.randn(48, 64) / 1000), 100 * torch.randn(n, 64)
    found = layer(x.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), layer(x), atol=0.03 * float(layer(x).abs().max()), rtol=0)


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_logits_are_those_of_the_numbers_stored(tied: bool) -> None:
    model = random_model(replace(TINY, tie_embeddings=tied))
    idx, before = torch.randint(TINY.vocab_size, (1, 50)), model.transformer.wte.weight.clone()
    original = model(idx)
    quantize_int8(model, torch.float32, CPU)
    assert torch.equal(model.transformer.wte.weight, before)
    logits = model(idx)
    torch.testing.assert_close(logits, as_plain_model(model)(idx), atol=1e-4, rtol=0)
    assert 0 < (logits - original).std() < 0.05 * original.std()


@pytest.mark.parametrize("adapter", [False, True])
def test_generation_is_that_of_the_numbers_stored(adapter: bool) -> None:
    """The rounding of single tokens' activations changes the first logits little, and no choice among so few words."""
    model = random_model(TINY)
    if adapter:
        add_adapter(model, AdapterConfig(4, 0))
        randomize(adapter_state_dict(model), std=0.7)
    quantize_int8(model, torch.float32, CPU)
    cache_prefix(model)
    prompts = [[5, 6, 7], [9], [3, 1, 4, 1, 5, 9]]
    found = generate_batch(model, prompts, Sampling(4, 0))
    assert [list(generate(model, prompt, Sampling(4, 0))) for prompt in prompts] == found
    assert generate_batch(as_plain_model(model), prompts, Sampling(4, 0)) == found


@torch.no_grad()
def test_a_merged_lora_is_quantized_and_an_unmerged_one_refused() -> None:
    model = random_model(TINY)
    add_lora(model, LoRAConfig(r=4, targets=("query", "value", "mlp", "head")))
    randomize(lora_state_dict(model))
    with pytest.raises(UserError, match="merged"):
        quantize_int8(model.eval(), torch.float32, CPU)
    merge_lora(model)
    idx = torch.randint(TINY.vocab_size, (1, 50))
    expected = model(idx)
    quantize_int8(model, torch.float32, CPU)
    assert 0 < (model(idx) - expected).std() < 0.05 * expected.std()


@pytest.mark.slow
def test_a_quantized_model_takes_less_memory_than_the_file_that_it_is_made_of(tmp_path: Path) -> None:
    config = replace(TINY, n_embd=512, n_hidden=2048, n_layer=12)
    for name, small in (("tiny", TINY), ("large", config)):
        save_model_folder(tmp_path / name, random_model(small).state_dict(), small, {})
    action = (
        "model = load_model(Path({!r}) / 'lit-llama.pth')\nquantize_int8(model, torch.float32, torch.device('cpu'))"
    )
    imports = (
        "import torch\nfrom lit_llama.model_folder import load_model\n"
        "from lit_llama.quantization import quantize_int8\n"
    )
    size = (tmp_path / "large" / "lit-llama.pth").stat().st_size
    actions = imports + action.format(str(tmp_path / "tiny")), action.format(str(tmp_path / "large"))
    assert any(peak_of(*actions) < 0.6 * size for _ in range(3))  # a kernel that is busy with pages leaves them there


@pytest.mark.slow
def test_scripts_take_the_flag(checkpoint: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    lora, adapter = LoRAConfig(r=4), AdapterConfig(4, 0)
    for method, add, state in ((lora, add_lora, lora_state_dict), (adapter, add_adapter, adapter_state_dict)):
        model = random_model(TINY)
        add(model, method)
        randomize(state(model))
        save_file(tmp_path / f"{type(method).__name__}.pth", method, model, state(model), "plain")
    flags = ("--quantize", "int8", "--pretrained_path", checkpoint, "--temperature", 0, "--prompt", "Count")
    lora_flags = (*flags, "--lora_path", tmp_path / "LoRAConfig.pth")
    assert run_script("generate_lora", *lora_flags) is None
    assert run_script("generate_adapter", *flags, "--adapter_path", tmp_path / "AdapterConfig.pth") is None
    assert run_script("generate", "--quantize", "int8", "--checkpoint_path", checkpoint, "--prompt", "Count") is None
    assert "merged" in str(run_script("generate_lora", *lora_flags, "--merge", "false"))
    capsys.readouterr()
    losses = []
    for quantize in ((), ("--quantize", "int8")):
        assert run_script("evaluate", "--checkpoint_path", checkpoint, "--data_dir", data_dir, *quantize) is None
        losses.append(float(capsys.readouterr().out.split()[2]))
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.02)
