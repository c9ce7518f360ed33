"""LoRA against PEFT, against separate linear layers, and merged against unmerged."""

from dataclasses import replace
from itertools import combinations
from pathlib import Path

from lit_llama.errors import UserError
from lit_llama.finetuned import read_finetuned
from lit_llama.formats.huggingface import halves_from_pairs, hf_config, to_hf
from lit_llama.lora import (
    TARGETS,
    LoRAConfig,
    LoRALinear,
    add_lora,
    lora_state_dict,
    mark_only_lora_as_trainable,
    merge_lora,
    parse_targets,
    remove_lora,
)
from lit_llama.model import CONFIGS, LLaMA, LLaMAConfig
from lit_llama.prompt import STYLES

import peft
import pytest
import torch
from builders import TINY, random_model, randomize, save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

HEADS = {"mha": replace(TINY, n_kv_head=4), "gqa": TINY, "mqa": replace(TINY, n_kv_head=1)}
ALL_SUBSETS = [subset for n in range(1, 7) for subset in combinations(TARGETS, n)]


def lora_model(config: LLaMAConfig, lora: LoRAConfig, seed: int = 0) -> LLaMA:
    """A random model with random LoRA layers, B included."""
    model = random_model(config, seed)
    add_lora(model, lora)
    mark_only_lora_as_trainable(model)
    randomize(lora_state_dict(model))
    return model.eval()


def to_peft(model: LLaMA) -> dict[str, torch.Tensor]:
    """LoRA's parameters under PEFT's names, in Hugging Face's row order."""
    c, result = model.config, {}
    hf_names = {"projection": "self_attn.o_proj", "head": "lm_head"}
    mlp_names = {"c_fc1": "mlp.gate_proj", "c_fc2": "mlp.up_proj", "c_proj": "mlp.down_proj"}
    for name, layer in model.named_modules():
        if not isinstance(layer, LoRALinear):
            continue
        place = name.split(".")
        prefix = "base_model.model." + (f"model.layers.{place[2]}." if len(place) > 1 else "")
        used = [part for part, rows in layer.target_rows.items() if rows]
        blocks = layer.lora_B.split([layer.target_rows[part] for part in used])
        for part, a, b in zip(used, layer.lora_A.chunk(len(used)), blocks, strict=True):
            if part in ("query", "key"):
                b = halves_from_pairs(b, c.n_head if part == "query" else c.n_kv_head)
            hf = {"query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj"} | hf_names
            target = mlp_names[place[-1]] if part == "mlp" else hf[part]
            result[f"{prefix}{target}.lora_A.default.weight"] = a
            result[f"{prefix}{target}.lora_B.default.weight"] = b
    return result


def peft_model(model: LLaMA, lora: LoRAConfig) -> peft.PeftModel:
    """The same base and LoRA weights in transformers + PEFT."""
    hf = LlamaForCausalLM(LlamaConfig(**hf_config(model.config, torch.float32)))
    base = {name: tensor for name, tensor in model.state_dict().items() if "lora_" not in name}
    hf.load_state_dict(to_hf(base, model.config))
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
    wrapped = peft.get_peft_model(
        hf, peft.LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=0.0, target_modules=names)
    )
    expected = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    state = to_peft(model)
    assert set(state) == expected
    wrapped.load_state_dict(state, strict=False)
    return wrapped


@pytest.mark.parametrize("heads", HEADS)
def test_logits_and_one_optimizer_step_equal_peft(heads: str) -> None:
    lora = LoRAConfig(r=4, alpha=10, dropout=0.0, targets=TARGETS)
    model = lora_model(HEADS[heads], lora)
    theirs = peft_model(model, lora)
    idx = torch.randint(TINY.vocab_size, (2, 40))
    logits, expected = model(idx), theirs(idx).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)

    for one, out in ((model, logits), (theirs, expected)):
        optimizer = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.1)
        F.cross_entropy(out[:, :-1].flatten(0, 1), idx[:, 1:].flatten()).backward()
        optimizer.step()
    stepped = dict(theirs.named_parameters())
    for name, tensor in to_peft(model).items():
        torch.testing.assert_close(tensor, stepped[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("heads", HEADS)
@torch.no_grad()
def test_fused_attention_layer_equals_three_separate_ones(heads: str) -> None:
    config = HEADS[heads]
    x = torch.randn(2, 7, config.n_embd)
    for subset in [s for n in (1, 2, 3) for s in combinations(("query", "key", "value"), n)]:
        layer = lora_model(config, LoRAConfig(r=3, alpha=5, targets=subset)).transformer.h[1].attn.c_attn
        expected, row = [], 0
        for name, weight in zip(("query", "key", "value"), layer.weight.split(config.qkv_sizes), strict=True):
            out = x @ weight.T
            if name in subset:
                i = subset.index(name)
                a, b = layer.lora_A[3 * i : 3 * (i + 1)], layer.lora_B[row : row + len(weight)]
                out = out + 5 / 3 * (x @ a.T @ b.T)
                row += len(weight)
            expected.append(out)
        assert row == len(layer.lora_B)
        torch.testing.assert_close(layer(x), torch.cat(expected, dim=-1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("heads", "tied"), [*((heads, False) for heads in HEADS), ("gqa", True)])
@torch.no_grad()
def test_merged_equals_unmerged_for_all_subsets_of_targets(heads: str, tied: bool) -> None:
    config = replace(HEADS[heads], n_layer=1, tie_embeddings=tied)
    idx = torch.randint(config.vocab_size, (2, 9))
    base = random_model(config)(idx)
    for subset in ALL_SUBSETS:
        model = lora_model(config, LoRAConfig(r=2, alpha=8, targets=subset))
        unmerged = model(idx)
        assert not torch.allclose(unmerged, base, atol=1e-2)
        merge_lora(model)
        torch.testing.assert_close(model(idx), unmerged, atol=2e-4, rtol=1e-5)


@torch.no_grad()
def test_merging_twice_equals_merging_once_and_leaves_plain_layers() -> None:
    model = lora_model(TINY, LoRAConfig(targets=TARGETS))
    merge_lora(model)
    once = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merge_lora(model)
    assert list(once) == list(random_model(TINY).state_dict())
    assert all(torch.equal(once[name], tensor) for name, tensor in model.state_dict().items())


@torch.no_grad()
def test_merging_a_tied_head_leaves_the_embedding_alone() -> None:
    config = replace(TINY, tie_embeddings=True)
    model = lora_model(config, LoRAConfig(targets=("head",)))
    before = model.transformer.wte.weight.clone()
    merge_lora(model)
    assert torch.equal(model.transformer.wte.weight, before)
    assert not torch.equal(model.lm_head.weight, before)
    assert not model.config.tie_embeddings


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("update", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_merge_computes_in_float32_for_every_pair_of_dtypes(base: torch.dtype, update: torch.dtype) -> None:
    model = lora_model(TINY, LoRAConfig(r=8, alpha=16))
    layer = model.transformer.h[0].attn.c_attn
    layer.weight.data = layer.weight.to(base)
    layer.lora_A.data, layer.lora_B.data = layer.lora_A.to(update), layer.lora_B.to(update)
    exact = layer.weight.double() + 2.0 * layer.spread_B().double() @ layer.lora_A.double()
    merge_lora(model)
    merged = model.transformer.h[0].attn.c_attn.weight
    assert merged.dtype == base
    torch.testing.assert_close(merged.double(), exact, rtol=torch.finfo(base).eps, atol=1e-6)


def test_train_and_eval_leave_every_weight_as_it_is() -> None:
    model = lora_model(TINY, LoRAConfig(targets=TARGETS))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(3):
        model.train()
        model.eval()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@torch.no_grad()
def test_training_starts_at_the_pretrained_model() -> None:
    model = random_model(TINY)
    idx = torch.randint(TINY.vocab_size, (2, 9))
    before = model(idx)
    add_lora(model, LoRAConfig(targets=TARGETS))
    assert torch.equal(model(idx), before)
    bound = (6 / ((1 + 5) * TINY.n_embd)) ** 0.5  # Kaiming-uniform with a = sqrt(5)
    a = model.transformer.h[0].attn.c_attn.lora_A
    assert 0.9 * bound < a.abs().max() <= bound


def test_only_lora_parameters_are_trained_and_the_base_stays_bit_equal() -> None:
    model = random_model(TINY)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    add_lora(model, LoRAConfig(targets=TARGETS))
    mark_only_lora_as_trainable(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.randint(TINY.vocab_size, (2, 9))).square().sum().backward()
    optimizer.step()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(lora_state_dict(model))
    assert all(torch.equal(before[name], model.state_dict()[name]) for name in before)


def test_names_and_shapes_are_those_of_lit_llama() -> None:
    model = lora_model(HEADS["mha"], LoRAConfig(r=8))
    state = lora_state_dict(model)
    assert list(state) == [f"transformer.h.{i}.attn.c_attn.lora_{x}" for i in range(2) for x in "AB"]
    assert state["transformer.h.0.attn.c_attn.lora_A"].shape == (2 * 8, TINY.n_embd)
    assert state["transformer.h.0.attn.c_attn.lora_B"].shape == (2 * TINY.n_embd, 8)


def test_7b_trains_4_194_304_parameters_in_a_file_of_at_most_8_5_mb(tmp_path: Path) -> None:
    config = CONFIGS["7B"]
    with torch.device("meta"):
        model = LLaMA(config)
    add_lora(model, LoRAConfig(r=8))
    mark_only_lora_as_trainable(model)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 4_194_304
    state = {name: torch.rand(t.shape, dtype=torch.bfloat16) for name, t in lora_state_dict(model).items()}
    save_file(tmp_path / "lora.pth", LoRAConfig(r=8), model, state, "alpaca")
    assert (tmp_path / "lora.pth").stat().st_size <= 8.5e6


@torch.no_grad()
def test_a_saved_file_gives_the_same_logits_without_being_told_rank_or_alpha(tmp_path: Path) -> None:
    lora = LoRAConfig(r=4, alpha=32, dropout=0.1, targets=("key", "mlp"))
    model = lora_model(TINY, lora)
    path = tmp_path / "lora.pth"
    save_file(path, lora, model, lora_state_dict(model), "plain")
    loaded = random_model(TINY)
    file = read_finetuned(path, "lora")
    file.add_to(loaded)
    assert file.prompt_style == STYLES["plain"]
    idx = torch.randint(TINY.vocab_size, (1, 9))
    assert torch.equal(loaded.eval()(idx), model(idx))


def test_a_file_for_another_model_is_refused(tmp_path: Path) -> None:
    model = lora_model(TINY, LoRAConfig())
    path = tmp_path / "lora.pth"
    save_file(path, LoRAConfig(), model, lora_state_dict(model), "plain")
    with pytest.raises(UserError, match="a different base model"):
        read_finetuned(path, "lora").add_to(random_model(HEADS["mqa"]))


@pytest.mark.parametrize("wrong", [{"targets": ("query", "foo")}, {"targets": ()}, {"r": 0}, {"dropout": 1.0}])
def test_impossible_configurations_are_refused(wrong: dict) -> None:
    with pytest.raises(UserError):
        LoRAConfig(**wrong)


def test_forward_and_backward_trace_without_data() -> None:
    with FakeTensorMode(), torch.device("cpu"):
        model = LLaMA(TINY)
        add_lora(model, LoRAConfig(targets=TARGETS))
        mark_only_lora_as_trainable(model)
        model(torch.zeros(2, 16, dtype=torch.int64), select=torch.arange(20)).sum().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@torch.no_grad()
def test_a_file_of_the_archived_lit_llama_needs_its_alpha(tmp_path: Path) -> None:
    """It holds A and B of query and value alone, under the same names; the logits are those of its own formula."""
    path, base = tmp_path / "lit-llama-lora-finetuned.pth", random_model(HEADS["mha"])
    C, state = TINY.n_embd, {}
    for i in range(TINY.n_layer):
        state[f"transformer.h.{i}.attn.c_attn.lora_A"] = 0.2 * torch.randn(2 * 4, C)
        state[f"transformer.h.{i}.attn.c_attn.lora_B"] = 0.2 * torch.randn(2 * C, 4)
    torch.save(state, path)
    model = random_model(HEADS["mha"])
    with pytest.raises(UserError, match="--lora_alpha"):
        read_finetuned(path, "lora")
    with pytest.raises(UserError, match="was it trained on another model"):
        read_finetuned(path, "lora", alpha=12).add_to(random_model(replace(HEADS["mha"], n_layer=9)))
    file = read_finetuned(path, "lora", alpha=12)
    file.add_to(model)
    assert file.prompt_style == STYLES["alpaca-stanford"]
    for i, block in enumerate(base.transformer.h):
        A, B = (state[f"transformer.h.{i}.attn.c_attn.lora_{x}"] for x in "AB")
        block.attn.c_attn.weight[:C] += 12 / 4 * B[:C] @ A[:4]
        block.attn.c_attn.weight[2 * C :] += 12 / 4 * B[C:] @ A[4:]
    idx = torch.randint(TINY.vocab_size, (1, 9))
    torch.testing.assert_close(model(idx), base(idx), atol=1e-4, rtol=0)


def test_alpha_is_not_taken_for_a_file_that_has_its_own(tmp_path: Path) -> None:
    model = lora_model(TINY, LoRAConfig(alpha=8))
    save_file(tmp_path / "a", LoRAConfig(alpha=8), model, lora_state_dict(model), "plain")
    with pytest.raises(UserError, match="its own alpha, 8"):
        read_finetuned(tmp_path / "a", "lora", alpha=16)
    read_finetuned(tmp_path / "a", "lora", alpha=8)


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_several_files_take_turns_on_one_base(tied: bool, tmp_path: Path) -> None:
    config = replace(TINY, tie_embeddings=tied)
    paths, expected, idx = [], [], torch.randint(TINY.vocab_size, (1, 9))
    for seed, lora in enumerate((LoRAConfig(4, 8, 0.1, TARGETS), LoRAConfig(2, 8, 0.1, ("key",)))):
        model = lora_model(config, lora)
        for tensor in lora_state_dict(model).values():
            tensor.mul_(seed + 1)
        paths.append(tmp_path / f"{seed}.pth")
        save_file(paths[-1], lora, model, lora_state_dict(model), "plain")
        expected.append(model(idx))
    base = random_model(config)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    for i in (0, 1, 0):
        read_finetuned(paths[i], "lora").add_to(base)
        assert torch.equal(base(idx), expected[i])  # without dropout, since the base was in evaluation mode
        remove_lora(base)
        assert base.state_dict().keys() == before.keys()
        assert all(torch.equal(before[name], tensor) for name, tensor in base.state_dict().items())
        assert (base.lm_head.weight is base.transformer.wte.weight) == tied
    assert not torch.allclose(*expected, atol=0.1)


@pytest.mark.parametrize("text", ["query,mlp", "query, mlp", "query mlp", '["query", "mlp"]', "[query,mlp]"])
def test_targets_are_read_in_the_forms_that_users_write(text: str) -> None:
    assert parse_targets(text) == ("query", "mlp")


def test_all_targets_are_all_but_the_head() -> None:
    assert parse_targets("all") == ("query", "key", "value", "projection", "mlp")
    with pytest.raises(UserError, match="not none"):
        LoRAConfig(targets=parse_targets(","))
