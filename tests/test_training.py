import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY, random_model
from lightning import Fabric
from tokenizers import Tokenizer as HFTokenizer

from lit_llama.cli import UserError
from lit_llama.data import BatchSchedule, Dataset
from lit_llama.training import check_data, check_out_dir, loss_sum, validation_loss


def test_validation_is_repeatable_token_weighted_and_disturbs_no_random_state(data_dir: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    model, dataset = random_model(TINY).train(), Dataset(data_dir, "train", 128)
    before = torch.get_rng_state()
    first = validation_loss(fabric, model, dataset, micro_batch_size=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert first == validation_loss(fabric, model, dataset, micro_batch_size=2)
    assert first == pytest.approx(validation_loss(fabric, model, dataset, micro_batch_size=5), rel=1e-5)
    whole = loss_sum(model, *dataset.batch(range(len(dataset)))) / dataset.n_targets(range(len(dataset)))
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
    check_data(dataset, model, checkpoint, None)
    shutil.copy(checkpoint, tmp_path)
    other = HFTokenizer.from_str(byte_tokenizer.to_str())
    other.add_tokens(["more"])
    other.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="prepare it again"):
        check_data(dataset, model, tmp_path / "lit-llama.pth", None)


def test_a_run_is_not_written_over(tmp_path: Path) -> None:
    assert check_out_dir(tmp_path, False, {}) is None
    with pytest.raises(UserError, match="does not exist"):
        check_out_dir(tmp_path, True, {"seed": 1, "max_steps": 5})
    torch.save(
        {"step": 3, "optimizer": {}, "hyperparameters": {"seed": 1, "max_steps": 3}}, tmp_path / "training-state.pth"
    )
    assert check_out_dir(tmp_path, True, {"seed": 1, "max_steps": 5})["step"] == 3
    with pytest.raises(UserError, match="--resume true"):
        check_out_dir(tmp_path, False, {})


def test_a_run_is_not_resumed_with_settings_that_change_it(tmp_path: Path) -> None:
    torch.save(
        {"step": 3, "optimizer": {}, "hyperparameters": {"seed": 1, "lora_alpha": 16}}, tmp_path / "training-state.pth"
    )
    with pytest.raises(UserError, match="lora_alpha 16, not 32"):
        check_out_dir(tmp_path, True, {"seed": 1, "lora_alpha": 32})


def test_a_block_size_beyond_the_model_is_refused(data_dir: Path, checkpoint: Path) -> None:
    with pytest.raises(UserError, match="129"):
        check_data(Dataset(data_dir, "train", 129), random_model(TINY), checkpoint, None)


def test_an_empty_validation_set_has_no_loss(data_dir: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    assert validation_loss(fabric, random_model(TINY), Dataset(data_dir, "train", 2), 2) is None


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
        schedule = BatchSchedule(dataset.lengths, 11, 11, seed=0)
        for step in range(20):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss_sum(model, *dataset.batch(schedule[step][0])).backward()
            optimizer.step()
            optimizer.zero_grad()
        moved.append(torch.cat([(t - 1).flatten() for t in lora_state_dict(model).values()]))
    assert moved[1].dtype == torch.float32
    assert moved[1].abs().mean() > 0.5 * moved[0].abs().mean() > 1e-3
    assert torch.corrcoef(torch.stack(moved))[0, 1] > 0.8
