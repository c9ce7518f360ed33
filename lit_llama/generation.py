"""Sampling text from a model, token by token."""

import sys
import time
from collections.abc import Iterator
from itertools import tee
from pathlib import Path

import torch
from torch import Tensor

from lit_llama.cli import UserError
from lit_llama.log import peak_memory
from lit_llama.model import LLaMA
from lit_llama.prompt import format_prompt
from lit_llama.tokenizer import Tokenizer


def default_device() -> torch.device:
    """The first accelerator, or the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def sample(logits: Tensor, temperature: float, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Draw a token id from each row of logits (..., V).

    Args:
        temperature: divides the logits; 0 always takes the most likely token.
        top_k: draw from the k most likely tokens only.
        top_p: draw from the fewest tokens that together have this probability (nucleus, arXiv 1904.09751).
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits, ids = (logits.float() / temperature).sort(descending=True)
    if top_k is not None:
        logits[..., max(top_k, 1) :] = -torch.inf
    probs = logits.softmax(-1)
    if top_p is not None:
        probs[..., 1:][(probs.cumsum(-1) - probs)[..., 1:] >= top_p] = 0  # the most likely one always stays
    return ids.gather(-1, torch.multinomial(probs, 1)).squeeze(-1)


@torch.inference_mode()
def next_tokens(
    model: LLaMA,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Iterator[Tensor]:
    """Yield, token by token, the ids (B,) that continue B prompts."""
    longest = max(map(len, prompts), default=0)
    length = longest + max_new_tokens
    if not all(prompts) or not 1 <= longest <= model.config.block_size - max_new_tokens:
        raise UserError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones are not within 1 and the "
            f"{model.config.block_size} that the model takes; shorten the prompt or lower --max_new_tokens"
        )
    device = model.lm_head.weight.device
    padding = [longest - len(prompt) for prompt in prompts]
    n_pad = torch.tensor(padding, device=device) if any(padding) else None
    idx = torch.tensor([[0] * n + prompt for n, prompt in zip(padding, prompts, strict=True)], device=device)  # (B, T)
    cache = model.new_cache(len(prompts), length)
    for _ in range(max_new_tokens):
        last = torch.arange(1, len(prompts) + 1, device=device) * idx.size(1) - 1
        tokens = sample(model(idx, cache, last, n_pad), temperature, top_k, top_p)  # (B,)
        yield tokens
        idx = tokens[:, None]  # (B, 1)


def generate(
    model: LLaMA, prompt: list[int], max_new_tokens: int, eos_id: int | None = None, **sampling: float | None
) -> Iterator[int]:
    """Yield the ids that continue the token ids of `prompt`, up to `eos_id` (which is not yielded).

    Args:
        sampling: the further arguments of `next_tokens`.
    """
    for (token,) in next_tokens(model, [prompt], max_new_tokens, **sampling):
        if token == eos_id:
            return
        yield int(token)


def generate_batch(
    model: LLaMA, prompts: list[list[int]], max_new_tokens: int, eos_id: int | None = None, **sampling: float | None
) -> list[list[int]]:
    """What `generate` yields for each of several prompts, computed at once."""
    answers: list[list[int]] = [[] for _ in prompts]
    running = set(range(len(prompts)))
    for tokens in next_tokens(model, prompts, max_new_tokens, **sampling):
        for row, token in enumerate(tokens.tolist()):
            if token == eos_id:
                running.discard(row)
            elif row in running:
                answers[row].append(token)
        if not running:
            break
    return answers


def respond(
    model: LLaMA,
    tokenizer: Tokenizer,
    prompts: list[str],
    prompt_style: str,
    context: str,
    seed: int,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> None:
    """Print the model's answer to each prompt as it comes: text to stdout, time and memory to stderr.

    Args:
        prompts: instructions, to be wrapped in the prompt style's template. One in the plain style is printed, too.
        context: the input that goes with the instruction, or "".
        seed: of the sampling, for each prompt; see `sample` for its other settings.
    """
    tokenizer.check_fits(model.config.vocab_size)
    model.eval()
    for prompt in prompts:
        torch.manual_seed(seed)
        text = format_prompt(prompt_style, prompt, context)
        ids = tokenizer.encode(text)
        if prompt_style == "plain":
            print(text, end="", flush=True)
        elif len(prompts) > 1:
            print(f"> {prompt}", file=sys.stderr)
        start = time.perf_counter()
        sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        tokens, kept = tee(generate(model, ids, max_new_tokens, tokenizer.eos_id, **sampling))
        for piece in tokenizer.stream(tokens, after=ids if prompt_style == "plain" else []):
            print(piece, end="", flush=True)
        print(flush=True)
        seconds, count = time.perf_counter() - start, len(list(kept))
        print(f"Time for inference: {seconds:.2f} sec total, {count / seconds:.2f} tokens/sec", file=sys.stderr)
    print(f"Memory used: {peak_memory(model.lm_head.weight.device):.2f} GB", file=sys.stderr)


def read_prompts(prompt: str, prompt_file: Path | None) -> list[str]:
    """The prompts of a file, one a line, or the one that is given."""
    if prompt_file is None:
        return [prompt]
    if not prompt_file.is_file():
        raise UserError(f"{prompt_file} does not exist")
    prompts = [line for line in prompt_file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise UserError(f"{prompt_file} has no prompts, expected one a line")
    return prompts
