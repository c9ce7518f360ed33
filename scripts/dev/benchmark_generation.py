"""Time generation against transformers on the same machine and weights: one token at a time, greedily.

Ours in float32 (on a GPU in 16 bits) and int8, and with --compile true also compiled, over the peer's `generate` with a
growing or a compiled static cache. All run in one process, in turns.
"""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lit_llama.cli import run
from lit_llama.generation import Sampling, compile_steps, generate
from lit_llama.model_folder import QUICKSTART_MODEL, find_model, load_model
from lit_llama.quantization import quantize_int8

import torch
from benchmark import hf_model, machine
from jsonargparse.typing import PositiveInt

Generator = Callable[[int], Sequence[int]]  # of so many tokens, greedily
PROMPT = list(range(1000, 1040))


def main(
    pretrained_path: Path | None = None,
    new_tokens: PositiveInt = 100,
    rounds: PositiveInt = 3,
    compile: bool = False,
) -> None:
    """Print a table of speeds, and of the medians over the rounds of their ratios to the peer's fastest.

    Args:
        pretrained_path: The checkpoint. Default: checkpoints/lit-llama/SmolLM2-135M-Instruct, or else the model
            written last.
        new_tokens: Tokens to generate.
        rounds: How often each side is measured.
        compile: Measure compiled steps, too, which takes minutes.
    """
    pretrained_path = find_model(pretrained_path, QUICKSTART_MODEL)
    sides = {**our_generators(pretrained_path, compile), **peer_generators(pretrained_path, compile)}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(rounds + 1):
        for side, generator in sides.items():
            start = time.perf_counter()
            assert len(generator(new_tokens)) == new_tokens
            if number:  # the first round warms up
                seconds[side].append(time.perf_counter() - start)
                print(f"round {number}, {side}: {new_tokens / seconds[side][-1]:.1f} tokens/s", file=sys.stderr)
    best = min((side for side in sides if side.startswith("transformers")), key=lambda side: min(seconds[side]))
    lines = ["| generation | tokens/s, fastest round | over transformers at its best |", "|---|---:|---:|"]
    for side, times in seconds.items():
        ratio = statistics.median(theirs / ours for theirs, ours in zip(seconds[best], times, strict=True))
        lines.append(f"| {side} | {new_tokens / min(times):.1f} | {ratio:.2f} x |")
    print(*lines, sep="\n")


def our_generators(checkpoint: Path, compiled: bool) -> dict[str, Generator]:
    sides: dict[str, Generator] = {}
    device, dtype = machine()
    for quantized in (False, True):
        for is_compiled in (False, True)[: 1 + compiled]:
            model = load_model(checkpoint, dtype, device).eval()
            if quantized:
                quantize_int8(model, dtype, device)
            if is_compiled:
                compile_steps(model)
            stored = "int8" if quantized else str(dtype).removeprefix("torch.")
            name = f"ours, {stored}{', compiled' if is_compiled else ''}"
            sides[name] = lambda n, model=model: list(generate(model, PROMPT, Sampling(n, temperature=0)))
    return sides


def peer_generators(checkpoint: Path, compiled: bool) -> dict[str, Generator]:
    """transformers' `generate` with its two caches; the static one is there to be compiled."""
    prompt, sides = torch.tensor([PROMPT], device=machine()[0]), {}
    for cache in ("dynamic", "static")[: 1 + compiled]:
        model = hf_model(checkpoint).eval()
        if cache == "static":
            model.forward = torch.compile(model.forward, fullgraph=True)

        def generator(n: int, model: Any = model, cache: str = cache) -> Sequence[int]:
            mask, lengths = torch.ones_like(prompt), {"max_new_tokens": n, "min_new_tokens": n}
            kind = {} if cache == "dynamic" else {"cache_implementation": "static"}
            return model.generate(prompt, attention_mask=mask, do_sample=False, **lengths, **kind)[
                0, len(PROMPT) :
            ].tolist()

        sides[f"transformers, {cache} cache{', compiled' if cache == 'static' else ''}"] = generator
    return sides


if __name__ == "__main__":
    run(main)
