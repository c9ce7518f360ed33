import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

from lit_llama.data.batches import BatchSchedule, Dataset, loss_sum, matching_tokenizer
from lit_llama.errors import UserError
from lit_llama.finetuned import describe, save_finetuned
from lit_llama.training.optimizer import AdamW, StepCheck
from lit_llama.training.run import StopSignal, validation_loss
from lit_llama.training.state import STATE_FILE, TrainingState

import pytest
import torch
from builders import SIGNALS, TINY, random_model
from lightning import Fabric
from tokenizers import Tokenizer as HFTokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def test_validation_is_repeatable_token_weighted_and_disturbs_no_random_state(data_dir: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    model, dataset = random_model(TINY).train(), Dataset(data_dir, "train", 128)
    before = torch.get_rng_state()
    first = validation_loss(fabric, model, dataset, max_tokens=60)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert first == validation_loss(fabric, model, dataset, max_tokens=60)
    assert first == pytest.approx(validation_loss(fabric, model, dataset, max_tokens=999), rel=1e-5)
    whole = loss_sum(model, dataset.batch(range(len(dataset)))) / dataset.n_targets(range(len(dataset)))
    assert first == pytest.approx(float(whole), rel=1e-5)


def test_only_the_first_records_are_validated_if_a_limit_is_set(data_dir: Path) -> None:
    dataset = Dataset(data_dir, "train", 128, limit=3)
    assert len(dataset) == 3
    assert list(dataset.index) == [0, 1, 2]


def test_data_of_another_tokenizer_is_refused(
    data_dir: Path, checkpoint: Path, tmp_path: Path, byte_tokenizer: HFTokenizer
) -> None:
    dataset = Dataset(data_dir, "train", 128)
    model = random_model(TINY)
    matching_tokenizer(dataset, model, checkpoint, None)
    shutil.copy(checkpoint, tmp_path)
    other = HFTokenizer.from_str(byte_tokenizer.to_str())
    other.add_tokens(["more"])
    other.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="prepare the data again with that tokenizer"):
        matching_tokenizer(dataset, model, tmp_path / "lit-llama.pth", None)


SETTINGS = {"seed": 1, "lora_alpha": 16, "max_steps": 3}


def training_state(folder: Path, settings: dict[str, Any], resume: bool) -> TrainingState:
    return TrainingState(Fabric(accelerator="cpu", devices=1), folder, ["result.pth"], settings, resume)


def test_a_run_and_its_result_are_not_written_over(tmp_path: Path) -> None:
    assert training_state(tmp_path, SETTINGS, resume=False).saved == {}
    with pytest.raises(UserError, match="does not exist"):
        training_state(tmp_path, SETTINGS, resume=True)
    (tmp_path / "result.pth").touch()
    with pytest.raises(UserError, match=r"holds result\.pth already: give another --out_dir"):
        training_state(tmp_path, SETTINGS, resume=False)
    save_finetuned(tmp_path / STATE_FILE, {**describe(None, TINY, "plain", SETTINGS), "step": 3, "optimizer": {}}, {})
    assert training_state(tmp_path, {**SETTINGS, "max_steps": 5}, resume=True).saved["step"] == 3
    with pytest.raises(UserError, match="--resume true"):
        training_state(tmp_path, SETTINGS, resume=False)


def test_a_run_is_not_resumed_with_settings_that_change_it(tmp_path: Path) -> None:
    save_finetuned(tmp_path / STATE_FILE, {**describe(None, TINY, "plain", SETTINGS), "step": 3, "optimizer": {}}, {})
    with pytest.raises(UserError, match="lora_alpha 16, not 32"):
        training_state(tmp_path, {**SETTINGS, "lora_alpha": 32}, resume=True)


def test_restoring_all_weights_keeps_the_moments_in_bfloat16(tmp_path: Path) -> None:
    """Torch's own load_state_dict makes them float32 first: a model that fits could not be resumed."""
    model = random_model(TINY)
    optimizer = AdamW(model.parameters(), lr=0.1)
    model(torch.zeros(1, 3, dtype=torch.int64)).sum().backward()
    optimizer.step()
    about = describe(None, TINY, "plain", SETTINGS)
    training_state(tmp_path, SETTINGS, resume=False).save(3, about, model.state_dict(), optimizer)
    fresh = random_model(TINY, seed=1)
    resumed = AdamW(fresh.parameters(), lr=0.1)
    with Casts() as largest:
        assert training_state(tmp_path, SETTINGS, resume=True).restore(fresh.state_dict(), resumed) == 3
    assert {tensor.dtype for entry in resumed.state.values() for tensor in entry.values()} == {torch.bfloat16}
    assert not largest.made_float32
    assert resumed.param_groups[0]["step"] == 1
    for one, other in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(one, other)
        assert torch.equal(optimizer.state[one]["exp_avg_sq"], resumed.state[other]["exp_avg_sq"])


class Casts(TorchDispatchMode):
    """Notes whether any operation makes a float32 tensor of bfloat16 ones."""

    made_float32 = False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        from_bfloat16 = any(leaf.dtype == torch.bfloat16 for leaf in inputs)
        self.made_float32 |= from_bfloat16 and getattr(out, "dtype", None) == torch.float32
        return out


def test_a_block_size_beyond_the_model_is_refused(data_dir: Path, checkpoint: Path) -> None:
    with pytest.raises(UserError, match="129"):
        matching_tokenizer(Dataset(data_dir, "train", 129), random_model(TINY), checkpoint, None)


def test_an_empty_validation_set_has_no_loss(data_dir: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    assert validation_loss(fabric, random_model(TINY), Dataset(data_dir, "train", 2), 2) is None


@pytest.mark.slow
def test_updates_are_not_lost_on_a_bfloat16_base(data_dir: Path) -> None:
    """The base is bfloat16, LoRA float32: small steps must add up as they do in a float32 run."""
    from lit_llama.lora import LoRAConfig, add_lora, lora_state_dict, mark_only_lora_as_trainable

    dataset = Dataset(data_dir, "train", 128)
    moved = []
    for dtype in (torch.float32, torch.bfloat16):
        model = random_model(TINY).to(dtype)
        torch.manual_seed(0)
        add_lora(model, LoRAConfig(dropout=0.0))
        mark_only_lora_as_trainable(model)
        for tensor in lora_state_dict(model).values():
            tensor.fill_(1.0)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=6e-4, weight_decay=0.0)
        schedule = BatchSchedule(dataset, 11, 10**6, seed=0)
        for step in range(20):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss_sum(model, schedule.step(step).share(0, 1)[0]).backward()
            optimizer.step()
            optimizer.zero_grad()
        moved.append(torch.cat([(t - 1).flatten() for t in lora_state_dict(model).values()]))
    assert moved[1].dtype == torch.float32
    assert moved[1].abs().mean() > 0.5 * moved[0].abs().mean() > 1e-3
    assert torch.corrcoef(torch.stack(moved))[0, 1] > 0.8


class Said(list):
    """A log that remembers what it is told."""

    say = list.append


def test_a_step_that_is_not_finite_is_not_taken_and_names_its_records(data_dir: Path) -> None:
    model, dataset = random_model(TINY), Dataset(data_dir, "train", 128)
    step, log = BatchSchedule(dataset, 4, 10**6, seed=0).step(0), Said()
    check = StepCheck(log, model)
    names = ", ".join(map(str, sorted(step.records)))
    check(step, 0, 2.0, 1.0)
    check(step, 1, 19.0, 1.0)
    assert log == []
    check(step, 2, 200.0, 1.0)
    assert log == [f"warning: the loss of step 3 is 200, after 3.7 on average: {step_records(names)}"]
    with pytest.raises(UserError, match=rf"the loss of step 4 is nan.*was not taken.*{names}"):
        check(step, 3, math.nan, 1.0)
    with pytest.raises(UserError, match=rf"its gradient's norm inf.*{names}"):
        check(step, 4, 2.0, math.inf)
    model.lm_head.weight.data[0, 0] = math.nan
    with pytest.raises(UserError, match=r"lm_head\.weight is not finite either"):
        check(step, 5, 2.0, math.nan)


def step_records(names: str) -> str:
    return f"records {names} (counted from 0, as prepared)"


def test_a_hang_up_is_a_request_to_stop_unless_it_is_ignored() -> None:
    old = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup has it
        stop = StopSignal()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        os.kill(os.getpid(), signal.SIGTERM)
        assert (stop.requested, stop.status) == (True, 143)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    model = random_model(TINY)
    optimizer = AdamW(model.parameters(), lr=0.1)
    model(torch.zeros(1, 3, dtype=torch.int64)).sum().backward()
    optimizer.step()
    about = describe(None, TINY, "plain", SETTINGS)
    training_state(tmp_path, SETTINGS, resume=False).save(1, about, model.state_dict(), optimizer)
    for change, message in (
        ({"optimizer": {"state": {0: {}}, "param_groups": [{}]}}, "lacks 'exp_avg"),
        ({"optimizer": {"state": {99: {}}, "param_groups": [{}]}}, "does not hold this optimizer's state"),
        ({"optimizer": {"state": {}, "param_groups": []}}, "does not hold this optimizer's state"),
        ({"optimizer": {"state": {}, "param_groups": [{"step": "x"}]}}, "step is 'x', expected a whole number"),
        ({"step": 0}, "of step 0, expected 1 or more"),
    ):
        progress = {"step": 1, "optimizer": {"state": {}, "param_groups": []}, **change}
        save_finetuned(tmp_path / STATE_FILE, {**about, **progress}, model.state_dict())
        with pytest.raises(UserError, match=message):
            training_state(tmp_path, SETTINGS, resume=True).restore(model.state_dict(), optimizer)
