"""Sampling text from a model, token by token."""

import sys
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, tee
from pathlib import Path
from typing import Any, NamedTuple

from lit_llama.device import peak_memory
from lit_llama.errors import UserError
from lit_llama.many_lora import ManyLoRA
from lit_llama.model import KVCache, LLaMA
from lit_llama.prompt import Message, encode, name_of, stop_ids, with_input
from lit_llama.quantization import check_compilable
from lit_llama.storage.files import read_text
from lit_llama.tokenizer import Tokenizer

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, and how many at most."""

    max_new_tokens: int = 100
    temperature: float = 0.8  # divides the logits; 0 always takes the most likely token
    top_k: int | None = 200  # draw from the k most likely tokens only; None or 0: from all
    top_p: float | None = None  # draw from the fewest that together have this probability (nucleus, arXiv 1904.09751)
    seed: int = 1234  # of each prompt


def sample(logits: Tensor, sampling: Sampling) -> Tensor:
    """Draw a token id from each row of logits (..., V); -1 where they are not all finite."""
    finite = logits.sum(-1, dtype=torch.float32).isfinite()  # one inf or nan makes the sum one
    if sampling.temperature == 0:
        return logits.argmax(-1).where(finite, -1)
    logits = logits.where(finite.unsqueeze(-1), 0).float() / sampling.temperature
    logits, ids = logits.topk(min(sampling.top_k or logits.size(-1), logits.size(-1)))  # (..., k), falling
    probs = logits.softmax(-1)
    if sampling.top_p is not None:
        probs[..., 1:][(probs.cumsum(-1) - probs)[..., 1:] >= sampling.top_p] = 0  # the most likely one always stays
    return ids.gather(-1, torch.multinomial(probs, 1)).squeeze(-1).where(finite, -1)


def compile_steps(model: LLaMA) -> None:
    """Compile the step of a single token, once for all lengths; prompts, each of its own length, are not compiled.

    On a GPU, it becomes a CUDA graph, and with the tuning a product unpacks 8-bit weights itself, instead of another
    kernel that writes them to memory first.
    """
    check_compilable(model)
    options: Any = {"triton.cudagraphs": True, "coordinate_descent_tuning": True}
    model.compiled = torch.compile(model.forward, fullgraph=True, dynamic=False, options=options)


@torch.inference_mode()
def next_tokens(
    model: LLaMA, prompts: list[list[int]], sampling: Sampling, cache: KVCache | None = None
) -> Iterator[list[int]]:
    """Yield, token by token, the B ids that continue B prompts.

    Args:
        cache: of what comes before a single prompt, with room for the prompt and all new tokens but the last.
    """
    longest = max(map(len, prompts), default=0)
    if not prompts or not all(prompts):
        raise UserError("a prompt is empty; expected at least one token")
    if (most := max(map(max, prompts))) >= model.config.vocab_size:  # such as a control token that was only added there
        raise UserError(f"a prompt has the token {most}, for which the model has no row; choose another --prompt_style")
    before = int(cache.length) if cache else 0
    if before + longest + sampling.max_new_tokens > model.config.block_size:
        raise UserError(
            f"a prompt of {before + longest} tokens and {sampling.max_new_tokens} new ones are more than the "
            f"{model.config.block_size} that the model takes; shorten the prompt or lower --max_new_tokens"
        )
    device = model.transformer.wte.weight.device
    padding = [longest - len(prompt) for prompt in prompts]
    n_pad = torch.tensor(padding, device=device) if any(padding) else None
    idx = torch.tensor([[0] * n + prompt for n, prompt in zip(padding, prompts, strict=True)], device=device)  # (B, T)
    room = longest + sampling.max_new_tokens
    if model.compiled:  # for each size: a power of two, so that there are few
        room = min(max(256, 1 << (room - 1).bit_length()), model.config.block_size)
    cache = cache or model.new_cache(len(prompts), room)
    last = torch.arange(1, len(prompts) + 1, device=device) * longest - 1
    logits = model(idx, cache, last, n_pad)  # (B, V)
    if model.compiled:  # steps of all lengths have the same shapes; on a GPU, a CUDA graph needs fixed addresses
        cache.length = torch.tensor(cache.length, device=device)
        for tensor in (cache.length, *chain(*cache.layers)):
            torch._dynamo.mark_static_address(tensor, guard=False)
    for left in reversed(range(sampling.max_new_tokens)):
        tokens = sample(logits, sampling)  # (B,)
        ids = tokens.tolist()  # all that a step waits for
        if min(ids) < 0:
            raise UserError("the model computes inf or nan: its weights are damaged, or need another --precision")
        yield ids
        if left:
            logits = (model.compiled or model)(tokens[:, None], cache, n_pad=n_pad)[:, -1]  # (B, V)


def generate(model: LLaMA, prompt: list[int], sampling: Sampling, stop: Collection[int] = ()) -> Iterator[int]:
    """Yield the ids that continue the token ids of `prompt`, up to one of `stop` (which is not yielded)."""
    for [token] in next_tokens(model, [prompt], sampling):
        if token in stop:
            return
        yield token


def generate_batch(
    model: LLaMA, prompts: list[list[int]], sampling: Sampling, stops: Sequence[Collection[int]] = ()
) -> list[list[int]]:
    """What `generate` yields for each of several prompts, computed at once; `stops` has the `stop` of each of them."""
    answers: list[list[int]] = [[] for _ in prompts]
    running = set(range(len(prompts)))
    for tokens in next_tokens(model, prompts, sampling):
        for row, token in enumerate(tokens):
            if stops and token in stops[row]:
                running.discard(row)
            elif row in running:
                answers[row].append(token)
        if not running:
            break
    return answers


class Question(NamedTuple):
    """What is asked, in which chat template, and of which of several LoRA files (see `ManyLoRA`)."""

    message: Message
    template: str
    file: int = -1


def respond(
    model: LLaMA,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    sampling: Sampling,
    batch_size: int = 1,
    many: ManyLoRA | None = None,
) -> None:
    """Print the model's answer to each question: text to stdout, time and memory to stderr.

    One at a time, answers are printed as they come; of a batch, when all of it is there. With the plain template, the
    prompt is printed, too.
    """
    tokenizer.check_fits(model.config.vocab_size)
    model.eval()
    for first in range(0, len(questions), batch_size):
        batch = questions[first : first + batch_size]
        torch.manual_seed(sampling.seed)
        if many:
            many.choose([question.file for question in batch])
        prompts = [encode(question.template, [question.message], tokenizer).ids for question in batch]
        stops = [stop_ids(question.template, tokenizer) for question in batch]
        start, n_tokens = time.perf_counter(), 0
        answers: Sequence[Iterable[int]] = [generate(model, prompts[0], sampling, stops[0])]
        if len(batch) > 1:
            answers = generate_batch(model, prompts, sampling, stops)
        for (message, template, file), prompt, answer in zip(batch, prompts, answers, strict=True):
            if is_plain := name_of(template) == "plain":
                print(with_input(message), end="", flush=True)
            elif len(questions) > 1:
                print(f"{file + 1 if file >= 0 else ''}> {message.content}", file=sys.stderr)
            tokens, answer = tee(answer)
            for piece in tokenizer.stream(tokens, after=prompt if is_plain else []):
                print(piece, end="", flush=True)
            print(flush=True)
            n_tokens += (n := len([*answer]))
            if n == sampling.max_new_tokens:
                print(f"(Cut after {n} tokens, the most that --max_new_tokens allows.)", file=sys.stderr)
        seconds = time.perf_counter() - start
        print(f"Time for inference: {seconds:.2f} sec total, {n_tokens / seconds:.2f} tokens/sec", file=sys.stderr)
    print(f"Memory used: {peak_memory(model.transformer.wte.weight.device):.2f} GB", file=sys.stderr)


def read_prompts(prompt: str, prompt_file: Path | None) -> list[str]:
    """The prompts of a file, one per line, or the one that is given."""
    lines = [prompt]
    if prompt_file:
        lines = read_text(prompt_file).removeprefix("\ufeff").replace("\r\n", "\n").split("\n")
    if prompts := [line for line in lines if line.strip()]:
        return prompts
    raise UserError(f"{prompt_file} has no prompts" if prompt_file else "the prompt is empty; give a text by --prompt")
