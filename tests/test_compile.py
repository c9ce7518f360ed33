"""Blocks under torch.compile compute what they compute without, and are compiled once for batches of all sizes."""

import copy
import shutil
from dataclasses import replace
from functools import partial

from lit_llama.adapter import AdapterConfig, adapter_state_dict, add_adapter, mark_only_adapter_as_trainable
from lit_llama.lora import LoRAConfig, add_lora, lora_state_dict, mark_only_lora_as_trainable
from lit_llama.model import LLaMA
from lit_llama.training.run import compile_blocks

import pytest
import torch
from builders import TINY, random_model, randomize
from torch import Tensor

pytestmark = pytest.mark.slow
BATCHES = ([5, 9], [30, 11], [6, 6], [17, 40])  # lengths of packed records


def losses_and_gradients(model: LLaMA) -> list[tuple[Tensor, dict[str, Tensor]]]:
    results = []
    for lengths in BATCHES:
        idx = torch.arange(sum(lengths)).unsqueeze(0) % TINY.vocab_size
        select = torch.arange(0, sum(lengths), 2)
        loss = model(idx, lengths=lengths, select=select, targets=select % 7)
        loss.backward()
        results.append((loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
        model.zero_grad()
    return results


def check_compiled(model: LLaMA, n_graphs: int) -> None:
    expected = losses_and_gradients(copy.deepcopy(model))
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compile_blocks(model)
    for (loss, gradients), (eager_loss, eager_gradients) in zip(losses_and_gradients(model), expected, strict=True):
        torch.testing.assert_close(loss, eager_loss)
        assert gradients.keys() == eager_gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, eager_gradients[name], rtol=1e-4, atol=1e-4 * gradient.abs().max())
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] <= n_graphs


def with_lora(model: LLaMA) -> LLaMA:
    add_lora(model, LoRAConfig(dropout=0.0))
    randomize(lora_state_dict(model))
    return model


def with_adapter(model: LLaMA, start_layer: int) -> LLaMA:
    add_adapter(model, AdapterConfig(prompt_length=3, start_layer=start_layer))
    randomize(adapter_state_dict(model))
    return model


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_block_computes_the_same() -> None:
    """With both methods and all weights trained, it has every gradient that a block can have."""
    check_compiled(with_adapter(with_lora(random_model(replace(TINY, n_layer=1)).train()), 0), 1)


@pytest.mark.parametrize("method", ["lora", "adapter"])
def test_blocks_are_compiled_once_for_each_kind(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch's tracing alone, without code in C++, which the test above has made."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model = random_model(TINY).train()
    if method == "lora":
        mark_only_lora_as_trainable(with_lora(model))
    else:
        mark_only_adapter_as_trainable(with_adapter(model, 1))
    check_compiled(model, {"lora": 2, "adapter": 3}[method])
