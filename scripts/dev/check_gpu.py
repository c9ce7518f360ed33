"""Check on a GPU, in a few minutes, what a CPU cannot show: memory, kernels, waits, speed, and that the numbers agree.

Models and tokens are random; nothing is read or downloaded. Each row of the table is a check: what was measured, and
what is expected, for speeds by the card's own rates of copies and matrix products. A check whose library is missing
says so; beyond what the project needs, these are bitsandbytes (nf4), transformers and peft (the peer). On a card that
is only simulated (DRYCUDA names the folder of its library), times and numbers mean nothing.

    PYTHONPATH=.:scripts python scripts/dev/check_gpu.py [--model 7B] [--layers 32] [--only memory training]
"""

import argparse
import copy
import ctypes
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from lit_llama.device import default_device
from lit_llama.generation import Sampling, compile_steps, generate
from lit_llama.lora import LoRAConfig, add_lora, mark_only_lora_as_trainable
from lit_llama.model import CONFIGS, LLaMA
from lit_llama.quantization import quantize_blocks, quantize_int8

import torch
from torch import Tensor, nn

LONG, SHORT = [512] * 4, [128] * 16  # lengths of the records of a micro-batch, 2,048 tokens each
WARM_UP, TIMED = 3, 8  # micro-batches
GB = 1e9
Row = tuple[str, str, str, bool | None]  # what, measured, expected, whether it is so; None: it is only shown


def make_model(name: str, layers: int | None, device: Any, dtype: torch.dtype = torch.bfloat16) -> LLaMA:
    """A model of random weights; its norms are ones."""
    config = CONFIGS[name]
    with torch.device("meta"):
        llama = LLaMA(replace(config, n_layer=layers or config.n_layer))
    llama = llama.to(dtype).to_empty(device=device)
    for weight in llama.parameters():
        nn.init.normal_(weight, 0, 0.02) if weight.dim() > 1 else nn.init.ones_(weight)
    llama.tie_weights()
    return llama


def with_lora(llama: LLaMA, checkpointing: bool = False, dropout: float = 0.05) -> LLaMA:
    add_lora(llama, LoRAConfig(dropout=dropout))
    mark_only_lora_as_trainable(llama)
    for name, weight in llama.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, 0, 0.01)
    llama.recompute_blocks = checkpointing
    return llama.train()


def loss_of(llama: LLaMA, lengths: list[int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """The mean loss of a micro-batch of random tokens, all of them targets."""
    device, n = llama.transformer.wte.weight.device, sum(lengths)
    ids = torch.randint(llama.config.vocab_size, (n + 1,), generator=torch.Generator().manual_seed(seed))
    idx, select, targets = (t.to(device, non_blocking=True) for t in (ids[None, :-1], torch.arange(n), ids[1:]))
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        return llama(idx, lengths=lengths, select=select, targets=targets) / n


def backward(llama: LLaMA, lengths: list[int]) -> None:
    loss_of(llama, lengths, torch.bfloat16).backward()


def optimizer_of(llama: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([weight for weight in llama.parameters() if weight.requires_grad], lr=1e-4)


def seconds(act: Callable[[int], object], n: int = TIMED, warm_up: int = WARM_UP) -> float:
    """Of one of n calls, after some to warm up."""
    for i in range(warm_up):
        act(i)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for i in range(warm_up, warm_up + n):
        act(i)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / n


def count_kernels(act: Callable[[], object]) -> int:
    if folder := os.environ.get("DRYCUDA"):
        shim = ctypes.CDLL(f"{folder}/shim.so")
        shim.dry_count.restype = ctypes.c_long
        shim.dry_reset()
        act()
        return shim.dry_count(b"kernel")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        act()
        torch.cuda.synchronize()
    on_card = (event for event in profile.events() or () if event.device_type == torch.autograd.DeviceType.CUDA)
    return sum(not event.name.startswith(("Mem", "gpu_")) for event in on_card)


def count_waits(act: Callable[[], object]) -> int:
    """How often the host waits for the card."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            act()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


@contextmanager
def freed() -> Iterator[None]:
    """Memory is counted from here on, and given back after."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    yield
    torch.compiler.reset()
    torch.cuda.empty_cache()


class Checks:
    """Each method but `trainer` is a check that yields rows; they run in this order."""

    def __init__(self, model: str, layers: int | None) -> None:
        self.model, self.layers, self.device = model, layers, default_device()
        self.rate = self.speed = self.bandwidth = 0.0
        self.bytes = self.parameters = 0

    def rates(self) -> Iterator[Row]:
        a, b = (torch.randn(8192, 8192, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        self.rate = 2 * 8192**3 / seconds(lambda _: a @ b)
        self.bandwidth = 2 * a.nbytes / seconds(lambda _: b.copy_(a), 50)
        yield (
            "matrix products in bfloat16, copies",
            f"{self.rate / 1e12:.0f} TFLOP/s, {self.bandwidth / GB:.0f} GB/s",
            "",
            None,
        )

    def memory(self) -> Iterator[Row]:
        from memory_parts import estimate_step

        for what, name, nf4, checkpointing in (
            (self.model, self.model, False, False), (f"{self.model}, checkpointing", self.model, False, True),
            (f"{self.model}, nf4", self.model, True, False), ("Llama-3.1-8B", "Llama-3.1-8B", False, False),
        ):  # fmt: skip
            models = []
            for device in ("meta", self.device):
                models.append(make_model(name, self.layers, device))
                if nf4:
                    quantize_blocks(models[-1], device, torch.bfloat16)
                with_lora(models[-1], checkpointing)
            expected = estimate_step(models[0], LONG, torch.bfloat16, torch.optim.AdamW).peak / GB
            with freed():
                step = self.trainer(models.pop())
                step(0)
                torch.cuda.reset_peak_memory_stats()
                step(1)
                found, reserved = torch.cuda.max_memory_allocated() / GB, torch.cuda.max_memory_reserved() / GB
                del step
            yield (
                f"memory, LoRA, {what}",
                f"{found:.2f} GB, {reserved:.2f} reserved",
                f"{expected:.2f} +- 3%",
                abs(found / expected - 1) < 0.03,
            )

    def trainer(
        self, llama: LLaMA, lengths: list[int] = LONG, dtype: torch.dtype = torch.bfloat16
    ) -> Callable[[int], None]:
        """A function that takes an optimizer step on one micro-batch."""
        optimizer = optimizer_of(llama)

        def step(seed: int) -> None:
            loss_of(llama, lengths, dtype, seed).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def training(self) -> Iterator[Row]:
        llama = with_lora(make_model(self.model, self.layers, self.device))
        matrices = (
            sum(p.numel() for n, p in llama.named_parameters() if "lora" not in n)
            - llama.transformer.wte.weight.numel()
        )
        for what, lengths in (("4 records of 512", LONG), ("16 of 128", SHORT)):
            micro_batch = partial(backward, llama, lengths)
            micro_batch()
            most = 110 + 60 * llama.config.n_layer
            n, waits = count_kernels(micro_batch), count_waits(micro_batch)
            yield (
                f"kernels and waits of a micro-batch, {what}",
                f"{n:,}, {waits}",
                f"at most {most:,}, 0",
                n <= most and not waits,
            )
            took = seconds(self.trainer(llama, lengths))
            share = 4 * matrices * sum(lengths) / took / self.rate
            self.speed = self.speed or sum(lengths) / took
            yield (
                f"step, {what}",
                f"{sum(lengths) / took:,.0f} tokens/s, {share:.0%} of the matrix rate",
                "at least 50%",
                share > 0.5,
            )

    def compiled(self) -> Iterator[Row]:
        torch._dynamo.utils.counters.clear()
        llama = with_lora(make_model(self.model, self.layers, self.device))
        for block in llama.transformer.h:  # as compile_blocks does
            block.compile(dynamic=True)
        lengths = [torch.randint(20, 512, (2 + i % 4,)).tolist() for i in range(12)]
        for part in lengths:
            loss_of(llama, part, torch.bfloat16).backward()
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        yield "graphs for 12 random micro-batches", str(graphs), "at most 3", graphs <= 3
        took = seconds(self.trainer(llama))
        yield (
            "step, compiled",
            f"{sum(LONG) / took:,.0f} tokens/s",
            f"over {self.speed:,.0f}",
            sum(LONG) / took > self.speed,
        )

    def four_bits(self) -> Iterator[Row]:
        llama = make_model(self.model, self.layers, self.device)
        quantize_blocks(llama, self.device, torch.bfloat16)
        speed = sum(LONG) / seconds(self.trainer(with_lora(llama)))
        yield "step, nf4", f"{speed:,.0f} tokens/s", f"at least {self.speed / 1.35:,.0f}", speed > self.speed / 1.35

    def float16(self) -> Iterator[Row]:
        llama, scaler = with_lora(make_model(self.model, 2, self.device, torch.float16)), torch.amp.GradScaler("cuda")
        optimizer, losses = optimizer_of(llama), []
        for i in range(20):
            loss = loss_of(llama, SHORT, torch.float16, seed=i % 2)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            losses.append(loss.item())
        fine = bool(torch.tensor(losses).isfinite().all()) and scaler.get_scale() >= 2**13
        yield (
            "16-mixed, 20 steps of 2 layers",
            f"loss {losses[-1]:.3f}, scale {scaler.get_scale():.0f}",
            "finite, few skipped",
            fine,
        )

    def decoding(self) -> Iterator[Row]:
        speeds, read = {}, 0
        for what in ("eager", "compiled", "int8, compiled"):
            with freed(), torch.inference_mode():
                llama = make_model(self.model, self.layers, self.device).eval()
                if "int8" in what:
                    quantize_int8(llama, torch.bfloat16, self.device)
                else:
                    read = sum(p.nbytes for p in llama.parameters()) - llama.transformer.wte.weight.nbytes
                if "compiled" in what:
                    compile_steps(llama)
                answer = partial(generate, llama, list(range(1000, 1040)), Sampling(100, temperature=0))
                speeds[what] = 100 / seconds(lambda _, answer=answer: list(answer()), 2, 1)
                del llama, answer
            bound = self.bandwidth / (read / 2 if "int8" in what else read) / 2
            least = 0.3 * bound if what == "eager" else 0.6 * bound
            yield (
                f"decoding, {what}",
                f"{speeds[what]:.0f} tokens/s",
                f"at least {least:.0f}, of {bound:.0f} by bandwidth",
                speeds[what] > least,
            )

    def resume(self) -> Iterator[Row]:
        def steps(llama: LLaMA, optimizer: torch.optim.Optimizer, numbers: range) -> list[float]:
            losses = []
            for i in numbers:
                loss = loss_of(llama, SHORT, torch.bfloat16, i)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
            return losses

        llama = with_lora(make_model(self.model, 2, self.device), dropout=0.0)
        optimizer = optimizer_of(llama)
        steps(llama, optimizer, range(3))
        again, state = copy.deepcopy(llama), copy.deepcopy(optimizer.state_dict())
        resumed = optimizer_of(again)
        resumed.load_state_dict(state)
        one, other = steps(llama, optimizer, range(3, 6)), steps(again, resumed, range(3, 6))
        apart = max(abs(a - b) / a for a, b in zip(one, other, strict=True)) if all(one) else 0.0
        yield "6 steps against 3 and 3 more", f"losses differ by {apart:.1e}", "at most 1e-3", apart <= 1e-3

    def parity(self) -> Iterator[Row]:
        """Two layers against the same on the CPU, in float32: losses and LoRA's gradients."""
        torch.manual_seed(0)
        llama = with_lora(make_model(self.model, 2, "cpu", torch.float32), dropout=0.0)
        loss = loss_of(llama, [100, 30, 7], torch.float32)
        expected = torch.autograd.grad(loss, [p for p in llama.parameters() if p.requires_grad])
        for dtype, most in ((torch.float32, 1e-3), (torch.bfloat16, 3e-2)):
            there = copy.deepcopy(llama).to(self.device)
            found = loss_of(there, [100, 30, 7], dtype)
            gradients = torch.autograd.grad(found, [p for p in there.parameters() if p.requires_grad])
            pairs = [(g.cpu() - e).norm() / e.norm() for g, e in zip(gradients, expected, strict=True)]
            apart, worst = abs(float(found) / float(loss) - 1), float(torch.stack(pairs).max())
            name = str(dtype).removeprefix("torch.")
            yield (
                f"2 layers against the CPU, {name}",
                f"loss {apart:.1e}, gradients {worst:.1e}",
                f"{most:.0e}",
                max(apart, worst) < most,
            )

    def peer(self) -> Iterator[Row]:
        """transformers + PEFT on the same micro-batch, packed where FlashAttention allows it, else padded."""
        from lit_llama.formats.huggingface import hf_config

        import peft
        import transformers

        config = replace(CONFIGS[self.model], n_layer=self.layers or CONFIGS[self.model].n_layer)
        for what, lengths in (("4 records of 512", LONG), ("16 of 128", SHORT)):
            with freed():
                theirs = transformers.LlamaConfig(**hf_config(config, torch.bfloat16))
                with torch.device(self.device):
                    model: Any = transformers.LlamaForCausalLM(theirs)
                model = model.to(torch.bfloat16)
                lora = peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules=["q_proj", "v_proj"])
                model = peft.get_peft_model(model, lora).train()
                optimizer = optimizer_of(model)
                ids = torch.randint(config.vocab_size, (len(lengths), lengths[0]), device=self.device)

                def step(_: int, model=model, optimizer=optimizer, ids=ids) -> None:
                    with torch.autocast("cuda", torch.bfloat16):
                        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()

                speed = sum(lengths) / seconds(step)
                del model, optimizer, step
            yield (
                f"transformers + PEFT, {what}",
                f"{speed:,.0f} tokens/s",
                f"at most ours, {self.speed:,.0f}",
                speed <= self.speed,
            )

    def out_of_memory(self) -> Iterator[Row]:
        llama = with_lora(make_model(self.model, 2, self.device))
        try:
            loss_of(llama, [2048] * 4096, torch.bfloat16).backward()
            yield "a micro-batch of 8 million tokens", "fits", "does not fit", False
        except torch.OutOfMemoryError:
            llama.zero_grad()
        loss = float(loss_of(llama, SHORT, torch.bfloat16))
        yield "a micro-batch after one that did not fit", f"loss {loss:.3f}", "finite", loss < 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="7B", choices=CONFIGS, help="a configuration (default: 7B)")
    parser.add_argument("--layers", type=int, help="layers of the model (default: all)")
    parser.add_argument("--only", nargs="*", default=[], help="names of checks, such as memory and decoding")
    arguments = parser.parse_args()
    checks = Checks(arguments.model, arguments.layers)
    if checks.device.type != "cuda":
        sys.exit("error: there is no GPU to check")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", end="\n\n")
    print("| check | measured | expected | |", "|---|---|---|---|", sep="\n")
    names = [name for name, value in vars(Checks).items() if callable(value) and name not in ("__init__", "trainer")]
    for name in names:
        if name != "rates" and arguments.only and name not in arguments.only:
            continue
        try:
            with freed():
                for what, measured, expected, fine in getattr(checks, name)():
                    verdict = {None: "", True: "yes", False: "**no**"}[fine]
                    print(f"| {what} | {measured} | {expected} | {verdict} |", flush=True)
        except Exception as error:
            kind = type(error).__name__
            print(f"| {name} | {kind}: {' '.join(str(error).split())[:150]} | | **no** |", flush=True)


if __name__ == "__main__":
    main()
