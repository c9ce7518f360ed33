"""Sampling, and that a step of decoding is compiled once, waits once, and can be a CUDA graph."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lit_llama.adapter import AdapterConfig, adapter_state_dict, add_adapter, cache_prefix
from lit_llama.errors import UserError
from lit_llama.formats.huggingface import hf_config, to_hf
from lit_llama.generation import (
    Question,
    Sampling,
    compile_steps,
    generate,
    generate_batch,
    read_prompts,
    respond,
    sample,
)
from lit_llama.model import LLaMA, LLaMAConfig
from lit_llama.prompt import Message
from lit_llama.quantization import quantize_int8
from lit_llama.tokenizer import Tokenizer

import pytest
import torch
from builders import TINY, random_model, randomize, run_script
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import aot_module_simplified
from torch._guards import TracingContext
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM


def test_greedy_continuations_equal_those_of_transformers_alone_and_in_a_batch() -> None:
    model = random_model(TINY)
    hf = LlamaForCausalLM(LlamaConfig(**hf_config(TINY, torch.float32)))
    hf.load_state_dict(to_hf(model.state_dict(), TINY))
    prompts = [torch.randint(1, TINY.vocab_size, (n,)).tolist() for n in (12, 3, 7)]
    ids = torch.tensor([[0] * (12 - len(prompt)) + prompt for prompt in prompts])
    settings = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = hf.generate(ids, attention_mask=ids.sign(), **settings)[:, 12:].tolist()
    assert list(generate(model, prompts[0], Sampling(40, 0))) == expected[0]
    assert generate_batch(model, prompts, Sampling(40, 0)) == expected


def test_it_stops_at_eos_and_a_second_prompt_is_not_affected_by_the_first() -> None:
    model = random_model(TINY)
    tokens = list(generate(model, [5, 6, 7], Sampling(20, 0)))
    assert list(generate(model, [9, 3], Sampling(20, 0))) != tokens
    stop = next(i for i, token in enumerate(tokens) if token not in tokens[:i] and i > 2)
    assert list(generate(model, [5, 6, 7], Sampling(20, 0), {tokens[stop]})) == tokens[:stop]


def test_sampling_is_a_function_of_the_seed() -> None:
    model = random_model(TINY)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(list(generate(model, [1, 2, 3], Sampling(20, 1.0))))
    assert draws[0] == draws[1] != draws[2]


def frequencies(logits: torch.Tensor, **how: float) -> torch.Tensor:
    torch.manual_seed(0)
    sampling = replace(Sampling(top_k=None), **how)
    draws = sample(logits.expand(4000, -1), sampling)
    return torch.bincount(draws, minlength=len(logits)) / 4000


def test_samples_follow_temperature_top_k_and_top_p() -> None:
    probs = torch.tensor([0.15, 0.5, 0.05, 0.3])
    logits = probs.log()
    close = {"atol": 0.03, "rtol": 0}
    torch.testing.assert_close(frequencies(logits, temperature=1.0), probs, **close)
    torch.testing.assert_close(frequencies(logits, temperature=0.5), probs**2 / (probs**2).sum(), **close)
    torch.testing.assert_close(
        frequencies(logits, temperature=1.0, top_k=2), torch.tensor([0, 0.5, 0, 0.3]) / 0.8, **close
    )
    torch.testing.assert_close(
        frequencies(logits, temperature=1.0, top_p=0.81), torch.tensor([0.15, 0.5, 0, 0.3]) / 0.95, **close
    )
    torch.testing.assert_close(frequencies(logits, temperature=1.0, top_k=0), probs, **close)
    assert frequencies(logits, temperature=1.0, top_p=0.1)[1] == 1
    assert frequencies(logits, temperature=1.0, top_p=0.0)[1] == 1
    assert sample(logits, Sampling(1, 0)) == 1


def test_an_answer_that_was_cut_says_so(model_folder: Path, capsys: pytest.CaptureFixture) -> None:
    model, tokenizer = random_model(TINY), Tokenizer(model_folder / "tokenizer.json")
    respond(model, tokenizer, [Question(Message("user", "Hi"), "plain")], Sampling(5, temperature=0))
    assert "(Cut after 5 tokens, the most that --max_new_tokens allows.)" in capsys.readouterr().err


def test_prompts_are_the_lines_of_a_file_whatever_ends_or_marks_it(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes("\ufeffone\u2028line\r\n\r\nanother\x0cone\x85\nthird".encode())
    assert read_prompts("", tmp_path / "prompts.txt") == ["one\u2028line", "another\x0cone\x85", "third"]


def test_a_prompt_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="100 new ones"):
        next(generate(random_model(TINY), [1] * 29, Sampling(100)))
    with pytest.raises(UserError):
        next(generate(random_model(TINY), [], Sampling(100)))


def test_batched_greedy_answers_equal_one_by_one() -> None:
    model = random_model(TINY)
    prompts = [torch.randint(TINY.vocab_size, (n,)).tolist() for n in (5, 1, 17, 9)]
    alone = [list(generate(model, prompt, Sampling(30, 0))) for prompt in prompts]
    assert generate_batch(model, prompts, Sampling(30, 0)) == alone
    eos = alone[2][7]  # some stop early, each at its own place
    stopped = [list(generate(model, prompt, Sampling(30, 0), {eos})) for prompt in prompts]
    assert len({len(answer) for answer in stopped}) > 1
    assert generate_batch(model, prompts, Sampling(30, 0), [{eos}] * 4) == stopped


def test_prompts_of_a_file_are_continued_alike_in_batches_of_any_size(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "prompts.txt").write_text("Count to 4\nHi\nCount to 11, aloud\n")
    flags = ("--checkpoint_path", checkpoint, "--prompt_file", tmp_path / "prompts.txt", "--temperature", 0)
    printed = []
    for size in (1, 2, 16):
        capsys.readouterr()
        assert run_script("generate", *flags, "--batch_size", size, "--max_new_tokens", 20) is None
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] == printed[2]
    assert [printed[0].count(text) for text in ("Count to 4", "Hi", "Count to 11, aloud")] == [1, 1, 1]


def test_rows_of_a_batch_are_sampled_by_their_own_probabilities() -> None:
    probs = torch.tensor([[0.15, 0.5, 0.05, 0.3], [0.7, 0.1, 0.1, 0.1]])
    torch.manual_seed(0)
    draws = torch.stack([sample(probs.log(), Sampling(1, 1.0, top_k=2)) for _ in range(4000)])
    found = torch.stack([torch.bincount(column, minlength=4) / 4000 for column in draws.T])
    assert found[1, 0] + found[1, 1:].max() == 1  # one of the equal ones is kept
    torch.testing.assert_close(found[0], torch.tensor([0, 0.5, 0, 0.3]) / 0.8, atol=0.03, rtol=0)
    torch.testing.assert_close(found[1, 0], torch.tensor(0.7 / 0.8), atol=0.03, rtol=0)


@pytest.mark.parametrize("temperature", [0, 0.8])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_row_that_is_not_finite_has_no_token_and_ends_a_text(value: float, temperature: float) -> None:
    logits = torch.randn(3, TINY.vocab_size)
    logits[1, 5] = value
    assert (sample(logits, Sampling(1, temperature)) < 0).tolist() == [False, True, False]
    model = random_model(TINY)
    model.transformer.ln_f.scale.data[0] = value
    with pytest.raises(UserError, match="computes inf or nan"):
        next(generate(model, [1, 2, 3], Sampling(5, temperature)))


class Waits(TorchDispatchMode):
    """Counts how often a number leaves the device, other than by `tolist`."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_a_step_waits_for_nothing_but_its_token(temperature: float) -> None:
    model = random_model(TINY)
    model.compiled = model.forward  # shapes as if it were compiled
    with Waits() as waits:
        assert len(list(generate(model, [5, 6, 7], Sampling(20, temperature, top_p=0.9)))) == 20
        assert waits.count == 0
        assert torch.ones(1).isfinite().all()
    assert waits.count == 1


@pytest.mark.slow
def test_all_that_a_step_changes_stays_at_its_address_as_a_cuda_graph_needs() -> None:
    """And only the token is copied into the graph."""
    model, metadata = random_model(TINY), []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        def compiler(graph: torch.fx.GraphModule, _inputs: Any) -> Callable[..., Any]:
            metadata.append(TracingContext.get().fw_metadata)
            return graph.forward

        return aot_module_simplified(graph, inputs, fw_compiler=compiler, inference_compiler=compiler)

    expected = list(generate(model, [5, 6, 7], Sampling(5, 0)))
    model.compiled = torch.compile(model.forward, backend=backend, fullgraph=True, dynamic=False)
    assert list(generate(model, [5, 6, 7], Sampling(5, 0))) == expected
    [step] = metadata
    changed = {i for i, info in enumerate(step.input_info) if info.mutates_data}
    assert len(changed) == 2 * TINY.n_layer + 1  # keys and values, and their number
    assert changed <= set(step.static_input_indices)
    assert len(step.input_info) - len(step.static_input_indices) == 1


def adapted(config: LLaMAConfig) -> LLaMA:
    model = random_model(config)
    add_adapter(model, AdapterConfig(4, 0))
    randomize(adapter_state_dict(model), std=0.7)
    cache_prefix(model)
    return model


def quantized(config: LLaMAConfig) -> LLaMA:
    model = random_model(config)
    quantize_int8(model, torch.float32, torch.device("cpu"))
    return model


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize(("make", "n"), [(random_model, 30), (adapted, 30), (quantized, 5)])
def test_a_compiled_step_gives_the_same_tokens_and_serves_all_lengths(make: Callable[..., LLaMA], n: int) -> None:
    """In bfloat16, which 8-bit layers round activations to, the order of sums soon tells."""
    model = make(TINY)
    prompts = [torch.randint(TINY.vocab_size, (n,)).tolist() for n in (5, 1, 17, 60)]
    expected = [list(generate(model, prompt, Sampling(30, 0))) for prompt in prompts]
    torch.compiler.reset()
    counters.clear()
    compile_steps(model)
    found = [list(generate(model, prompt, Sampling(30, 0))) for prompt in prompts]
    assert [answer[:n] for answer in found] == [answer[:n] for answer in expected]
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert [answer[:n] for answer in generate_batch(model, prompts[:3], Sampling(30, 0))] == [
        a[:n] for a in expected[:3]
    ]
    assert counters["stats"]["unique_graphs"] == 2  # another number of texts


def test_a_token_without_a_row_is_named() -> None:
    with pytest.raises(UserError, match=f"token {TINY.vocab_size}, for which the model has no row"):
        next(generate(random_model(TINY), [1, TINY.vocab_size], Sampling()))
