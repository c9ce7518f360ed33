from dataclasses import replace

import pytest
import torch
from builders import TINY, random_model
from transformers import LlamaConfig, LlamaForCausalLM

from lit_llama.errors import UserError
from lit_llama.generation import Sampling, generate, generate_batch, sample
from lit_llama.huggingface import hf_config, to_hf


def test_greedy_continuation_equals_transformers() -> None:
    model = random_model(TINY)
    hf = LlamaForCausalLM(LlamaConfig(**hf_config(TINY, torch.float32)))
    hf.load_state_dict(to_hf(model.state_dict(), TINY))
    prompt = torch.randint(TINY.vocab_size, (1, 12))
    expected = hf.generate(prompt, max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 12:]
    assert list(generate(model, prompt[0].tolist(), Sampling(40, 0))) == expected.tolist()


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
    draws = torch.stack([sample(logits, sampling) for _ in range(4000)])
    return torch.bincount(draws, minlength=len(logits)) / 4000


@pytest.mark.slow
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
    assert generate_batch(model, prompts, Sampling(30, 0), {eos}) == stopped


def test_rows_of_a_batch_are_sampled_by_their_own_probabilities() -> None:
    probs = torch.tensor([[0.15, 0.5, 0.05, 0.3], [0.7, 0.1, 0.1, 0.1]])
    torch.manual_seed(0)
    draws = torch.stack([sample(probs.log(), Sampling(1, 1.0, top_k=2)) for _ in range(4000)])
    found = torch.stack([torch.bincount(column, minlength=4) / 4000 for column in draws.T])
    assert found[1, 0] + found[1, 1:].max() == 1  # one of the equal ones is kept
    torch.testing.assert_close(found[0], torch.tensor([0, 0.5, 0, 0.3]) / 0.8, atol=0.03, rtol=0)
    torch.testing.assert_close(found[1, 0], torch.tensor(0.7 / 0.8), atol=0.03, rtol=0)
