"""The memory estimate against what real runs take, and every operation of a step looked at."""

import importlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

from lit_llama import model
from lit_llama.adapter import AdapterConfig, add_adapter, mark_only_adapter_as_trainable
from lit_llama.data.batches import Batch, loss_sum
from lit_llama.device import storage_dtype
from lit_llama.formats.huggingface import hf_config
from lit_llama.generation import Sampling, next_tokens
from lit_llama.lora import TARGETS, LoRAConfig, add_lora, mark_only_lora_as_trainable
from lit_llama.model import Block, LLaMA, RMSNorm
from lit_llama.training.optimizer import AdamW

import memory_parts
import pytest
import torch
from builders import TINY, random_model, run_script
from builders_processes import run_ranks
from estimate_memory import store_as
from memory_parts import Ledger, estimate_step
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

METHODS = ("lora", "adapter", "full")
SYNCHRONISING = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal", "_unique2"}


def settings(checkpoint: Path, data_dir: Path, out_dir: Path) -> list[object]:
    """Two steps of two micro-batches of as many tokens, all of them targets, as in the estimate."""
    paths = ["--data_dir", data_dir, "--pretrained_path", checkpoint, "--out_dir", out_dir, "--max_steps", 2]
    return [*paths, "--mask_prompt", "false", "--batch_size", 4, "--micro_batch_size", 2, "--block_size", 16]


@contextmanager
def watched(script: ModuleType) -> Iterator[list[int]]:
    """The peaks of a finetune script run within: its estimate, if any, and that of its own tensors in all steps."""
    peaks: list[int] = []
    with ExitStack() as stack:
        plan, ledgers = script.plan, []

        def begin(schedule: Any, val_data: Any, rate: Any, llama: LLaMA, state: Any, *more: Any) -> Any:
            if state.fabric.world_size == 1:
                fullest = max(schedule.step(0).micro_batches(), key=schedule.dataset.n_tokens)
                lengths = (schedule.dataset.lengths[fullest] - 1).tolist()
                is_full = script.__name__ == "finetune_full"
                dtype = storage_dtype(state.fabric.strategy.precision.precision)
                make_optimizer = partial(AdamW, lr=0.0) if is_full else torch.optim.AdamW
                peaks.append(estimate_step(llama, lengths, dtype, make_optimizer, on_gpu=False).peak)
            ledgers.append(stack.enter_context(Ledger(llama)))
            return plan(schedule, val_data, rate, llama, state, *more)

        stack.enter_context(mock.patch.object(script, "plan", begin))
        yield peaks
    peaks.append(max(ledgers[0].peaks.values()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "checkpointing", "precision"),  # all pairs of their values
    [
        ("lora", "false", "32-true"),
        ("lora", "true", "bf16-mixed"),
        ("adapter", "false", "bf16-mixed"),
        ("adapter", "true", "32-true"),
        ("full", "false", "32-true"),
        ("full", "true", "bf16-mixed"),
    ],
)
def test_the_estimate_is_what_a_run_takes(
    method: str, checkpointing: str, precision: str, checkpoint: Path, data_dir: Path, tmp_path: Path
) -> None:
    more = ["--activation_checkpointing", checkpointing, "--precision", precision]
    more += ["--start_layer", 0] if method == "adapter" else []
    with watched(importlib.import_module(f"finetune_{method}")) as peaks:
        assert run_script(f"finetune_{method}", *settings(checkpoint, data_dir, tmp_path), *more) is None
    estimate, run = peaks
    assert estimate == pytest.approx(run, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "precision"), [("full", "32-true")])
def test_the_estimate_is_what_each_of_two_processes_takes(
    method: str, precision: str, checkpoint: Path, data_dir: Path, tmp_path: Path
) -> None:
    """Seen by the second one: on a CPU, the first one's copies for what it writes are in the same memory."""
    program = f"""
import os
import finetune_{method} as script
from test_memory import watched
from lit_llama.cli import run

with watched(script) as peaks:
    run(script.main)
if os.environ.get("LOCAL_RANK") == "1":
    print(peaks[-1])
"""
    (tmp_path / "driver.py").write_text(program)
    rest = [*settings(checkpoint, data_dir, tmp_path / "out"), "--precision", precision, "--micro_batch_size", 1]
    script, dtype = importlib.import_module("estimate_memory"), storage_dtype(precision)
    llama = script.make_model(TINY, method, LoRAConfig(), dtype)
    llama.recompute_blocks = method == "full"  # the scripts' defaults
    make_optimizer = partial(AdamW, lr=0.0) if method == "full" else torch.optim.AdamW
    estimate = estimate_step(llama, [15], dtype, make_optimizer, n_devices=2, on_gpu=False)
    found = []
    while len(found) < 3 and estimate.peak not in found:  # a gather that is late on a busy machine takes more
        result = run_ranks(tmp_path / "driver.py", *rest, "--strategy", "fsdp")
        assert result.returncode == 0, result.stderr
        found.append(pytest.approx(int(result.stdout), rel=0.01))
        shutil.rmtree(tmp_path / "out")
    assert estimate.peak in found


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", [*METHODS, "head"])
def test_a_deep_model_is_extrapolated_from_few_blocks(method: str, checkpointing: bool) -> None:
    with torch.device("meta"):
        llama = LLaMA(replace(TINY, n_layer=6, vocab_size=3200))  # the embedding's gradient is large
        if method in ("lora", "head"):
            add_lora(llama, LoRAConfig(targets=("head",) if method == "head" else TARGETS))
            mark_only_lora_as_trainable(llama)
        elif method == "adapter":
            add_adapter(llama, AdapterConfig(start_layer=3))
            mark_only_adapter_as_trainable(llama)
    store_as(llama, torch.bfloat16)
    llama.recompute_blocks = checkpointing
    make_optimizer = partial(AdamW, lr=0.0) if method == "full" else torch.optim.AdamW
    step = partial(estimate_step, llama, [9, 30], torch.bfloat16, make_optimizer)
    with mock.patch.object(memory_parts, "for_all_blocks", lambda llama, trace, **_: trace(llama.transformer.h)):
        whole = step()
    assert step().peak == pytest.approx(whole.peak, rel=0.001)


@pytest.mark.slow
def test_what_memory_is_for_adds_up_to_the_peak() -> None:
    llama = importlib.import_module("estimate_memory").make_model(replace(TINY, n_layer=5), "lora", LoRAConfig())
    found = estimate_step(llama, [9, 30], torch.bfloat16, torch.optim.AdamW)
    assert sum(found.parts.values()) == found.peak


def printed(capsys: pytest.CaptureFixture, *flags: object) -> dict[str, float]:
    """What estimate_memory.py says, in GB: the peak as "at most:", the purposes, the resume as "when a run"."""
    assert run_script("estimate_memory", *flags) is None
    lines = capsys.readouterr().out.splitlines()
    rows = [re.match(r"\s*([\d.,]+)(?: GB)?(?: \(.*\))?\s+(.*)", line) for line in lines]
    return {row[2]: float(row[1].replace(",", "")) for row in rows if row}


@pytest.mark.slow
def test_a_7b_model_trains_on_24_gb(capsys: pytest.CaptureFixture) -> None:
    """These are what the same step took on tensors of a GPU, without data, that a CUDA build of torch traced."""
    step = printed(capsys)
    assert step["at most:"] == pytest.approx(20.6, abs=0.1)
    assert step["weights"] == pytest.approx(13.48 + 0.02, abs=0.01)
    assert printed(capsys, "--activation_checkpointing", "true")["at most:"] == pytest.approx(14.4, abs=0.1)


@pytest.mark.slow
def test_a_7b_model_in_4_bits_trains_on_8_gb(capsys: pytest.CaptureFixture) -> None:
    step = printed(capsys, "--quantize", "nf4", "--activation_checkpointing", "true")
    matrices, others = 32 * (4 * 4096**2 + 3 * 4096 * 11008), 2 * 32000 * 4096 + 65 * 4096
    assert step["weights"] == pytest.approx((4.127 / 8 * matrices + 2 * others) / 1e9 + 0.02, abs=0.01)
    assert step["at most:"] < 6.5


@pytest.mark.slow
def test_all_weights_of_7b_train_and_resume_on_four_gpus_of_24_gb(capsys: pytest.CaptureFixture) -> None:
    step = printed(capsys, "--method", "full", "--devices", 4, "--activation_checkpointing", "true")
    a_quarter = 4 * 6.738 / 4
    for purpose in ("weights", "gradients", "moments"):
        assert step[purpose] == pytest.approx(a_quarter, abs=0.01)
    assert 3 * a_quarter < step["at most:"] < 23.5
    assert 2 * a_quarter < step["when a run is resumed"] < 2 * a_quarter + 1
    whole = 2 * 6.738  # gathered in bfloat16, forward and again backward; gradients are sent in float32
    assert step["come from other devices in it"] == pytest.approx((2 * whole + 2 * whole) * 3 / 4, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("fits", [0, 1, 9])
def test_the_largest_micro_batch_that_fits_is_found(
    fits: int, model_folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = importlib.import_module("estimate_memory")
    llama = script.make_model(TINY, "lora", LoRAConfig())
    bytes_for = [script.estimate_method("lora", llama, [4] * n).peak for n in (fits, fits + 1) if n]
    monkeypatch.setattr(script, "room", lambda *_: sum(bytes_for) / 2 if fits else 1.0)
    assert run_script("estimate_memory", "--model", model_folder, "--block_size", 4, "--fit_gpu", 8) is None
    found = f"micro_batch_size {fits} fits" if fits else "not even one record fits"
    assert capsys.readouterr().out == f"{found} a GPU of 8 GiB\n"


@pytest.mark.slow
def test_a_model_is_named_or_a_folder_or_a_configuration(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    theirs = tmp_path / "config.json"
    theirs.write_text(json.dumps(hf_config(TINY, torch.float32)))
    found = [printed(capsys, "--model", model) for model in (model_folder, model_folder / "config.json", theirs)]
    assert found[0] == found[1] == found[2]
    message = run_script("estimate_memory", "--model", tmp_path / "nothing")
    assert re.fullmatch("error: --model is one of 7B, .* or a model folder or config.json, not '.*nothing'", message)


class Walk(TorchDispatchMode):
    """Notes every operation: its name, the tensors that it takes and those that it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[str, list[Tensor], list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given, made = ([leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)] for tree in (args, out))
        self.operations.append((func.__name__.partition(".")[0], given, made))
        return out


@pytest.fixture(params=[(method, flag) for method in METHODS for flag in (False, True)], ids=str)
def llama(request: pytest.FixtureRequest) -> LLaMA:
    """A model as it is trained, with every method, without and with checkpointing."""
    method, llama = request.param[0], random_model(TINY).train()
    if method == "lora":
        add_lora(llama, LoRAConfig(r=2, targets=TARGETS))
        mark_only_lora_as_trainable(llama)
    elif method == "adapter":
        add_adapter(llama, AdapterConfig(prompt_length=3, start_layer=1))
        mark_only_adapter_as_trainable(llama)
    store_as(llama, torch.bfloat16)
    llama.recompute_blocks = request.param[1]
    return llama


def gradients(llama: LLaMA) -> None:
    """The forward and backward pass of two records that fill a chunk of 256 logits and begin a second one."""
    n, device = 256 + 9, llama.lm_head.weight.device
    ids = torch.randint(TINY.vocab_size, (n,), device=device)
    loss_sum(llama, Batch(ids[None], [n - 9, 9], torch.arange(n, device=device), ids)).backward()


def generate(llama: LLaMA) -> None:
    """Prompts of two lengths, and two tokens after them."""
    device = llama.lm_head.weight.device
    cache, n_pad = llama.new_cache(2, 8), torch.tensor([0, 2], device=device)
    with torch.no_grad():
        for n_tokens in (6, 1, 1):
            llama(torch.zeros(2, n_tokens, dtype=torch.int64, device=device), cache, n_pad=n_pad)


@pytest.mark.parametrize("compute", [gradients, generate])
def test_nothing_leaves_the_device_or_waits_for_it(llama: LLaMA, compute: Callable[[LLaMA], None]) -> None:
    """A tensor without data cannot be read, and what is made elsewhere is seen."""
    llama = llama.to("meta", torch.float32)
    no_autocast = mock.patch.object(model, "without_autocast", return_value=nullcontext())  # meta has none
    with no_autocast, Walk() as walk:
        compute(llama)
    assert len(walk.operations) > 50
    for name, _, made in walk.operations:
        sent = [tensor for tensor in made if tensor.numel() and tensor.dtype != torch.int32]  # but where records end
        assert {tensor.device.type for tensor in sent} <= {"meta"}, name


def test_the_optimizer_of_full_finetuning_does_not_wait_for_the_device() -> None:
    """torch's AdamW reads its count of steps, which is on the host; ours counts in Python."""
    parameter = nn.Parameter(torch.empty(3, device="meta"))
    parameter.grad = torch.empty_like(parameter)
    AdamW([parameter], lr=1.0).step()


def test_a_token_is_waited_for_once() -> None:
    """When the ids of a step are read."""
    read, tolist = [], Tensor.tolist
    counted = mock.patch.object(Tensor, "tolist", lambda tensor: read.append(tensor) or tolist(tensor))
    with counted, Walk() as walk:
        tokens = list(next_tokens(random_model(TINY), [[1, 2, 3]], Sampling(6, top_p=0.9)))
    names = [name for name, _, _ in walk.operations]
    assert len(tokens) == len(read) == 6
    assert not any(map(names.count, SYNCHRONISING))


@pytest.fixture
def step(llama: LLaMA) -> Walk:
    """The operations of a training step in bfloat16."""
    with Walk() as walk, torch.autocast("cpu", torch.bfloat16):
        gradients(llama)
    return walk


def test_no_frozen_weight_is_cast_or_copied_in_a_step(llama: LLaMA, step: Walk) -> None:
    weights = {parameter.data_ptr(): parameter.requires_grad for parameter in llama.parameters()}
    copied = [
        weights[tensor.data_ptr()]
        for name, given, _ in step.operations
        if name in ("_to_copy", "clone", "copy_", "cat")
        for tensor in given
        if tensor.data_ptr() in weights
    ]
    assert all(copied)
    assert copied  # A and B are cast, and so are all weights in full finetuning


def test_a_step_is_computed_in_the_documented_precision(llama: LLaMA, step: Walk) -> None:
    chunks = set()
    for name, given, made in step.operations:
        assert {tensor.dtype for tensor in made}.isdisjoint((torch.float64, torch.complex128)), name
        if name in ("mm", "bmm", "addmm"):
            assert {tensor.dtype for tensor in (*given, *made)} == {torch.bfloat16}
        if name == "_log_softmax":
            chunks.update((len(tensor), tensor.dtype) for tensor in made)
    assert chunks == {(256, torch.float32), (9, torch.float32)}
    for parameter in llama.parameters():
        if parameter.requires_grad:
            assert parameter.dtype == parameter.grad.dtype == torch.float32
        else:
            assert parameter.dtype == torch.bfloat16


def test_the_residual_stream_stays_in_the_dtype_of_a_frozen_base(llama: LLaMA) -> None:
    dtypes: set[torch.dtype] = set()
    for module in llama.modules():
        if isinstance(module, Block | RMSNorm):
            module.register_forward_hook(lambda _, args, out: dtypes.update((args[0].dtype, out.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        gradients(llama)
    assert dtypes == {llama.transformer.wte.weight.dtype}
