import json
import shutil
from dataclasses import replace
from pathlib import Path

from lit_llama.errors import UserError
from lit_llama.formats.huggingface import hf_config, to_hf
from lit_llama.model import CONFIGS, LLaMAConfig, RopeScaling
from lit_llama.model_folder import load_model

import convert_hf_checkpoint
import pytest
import torch
from builders import TINY, peak_of_conversion, random_model, run_script
from builders_tokenizers import train_sentencepiece
from convert_hf_checkpoint import config_from_hf, from_hf
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

VARIANTS = {
    "mha": replace(TINY, n_kv_head=4),
    "gqa": TINY,
    "tied": replace(TINY, tie_embeddings=True),
    "llama3": replace(TINY, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 32)),
    "linear": replace(TINY, rope_scaling=RopeScaling(4.0)),
}


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_there_and_back_is_bit_exact(config: LLaMAConfig) -> None:
    state = random_model(config).state_dict()
    back = from_hf(reversed(to_hf(state, config).items()), config, torch.float32)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize("config", [*CONFIGS.values(), *VARIANTS.values()])
def test_configs_survive_the_way_through_transformers(config: LLaMAConfig, tmp_path: Path) -> None:
    LlamaConfig(**hf_config(config, torch.float32)).save_pretrained(tmp_path)
    assert config_from_hf(json.loads((tmp_path / "config.json").read_text())) == config


def test_configs_of_transformers_4_are_read() -> None:
    fields = {**hf_config(TINY, torch.float32), "rope_theta": 5e5}
    del fields["rope_parameters"]
    assert config_from_hf(fields) == replace(TINY, rope_base=5e5)
    fields["rope_scaling"] = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    assert config_from_hf(fields).rope_scaling == RopeScaling(8.0, 1.0, 4.0, 32)


@pytest.fixture
def hf_folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**hf_config(TINY, torch.float32)))
    model.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    return tmp_path / "hf"


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@torch.no_grad()
def test_a_sharded_folder_gives_the_logits_of_transformers(hf_folder: Path, tmp_path: Path, kind: str) -> None:
    model = LlamaForCausalLM.from_pretrained(hf_folder).eval()
    if kind == "bin":
        for path in hf_folder.glob("*.safetensors*"):
            path.unlink()
        items = list(model.state_dict().items())
        torch.save(dict(items[:5]), hf_folder / "pytorch_model-00001-of-00002.bin")
        torch.save(dict(items[5:]), hf_folder / "pytorch_model-00002-of-00002.bin")
    convert_hf_checkpoint.main(hf_folder, tmp_path / "out")
    ours = load_model(tmp_path / "out" / "lit-llama.pth").eval()
    idx = torch.randint(TINY.vocab_size, (2, 80))
    torch.testing.assert_close(ours(idx), model(idx).logits, atol=1e-4, rtol=0)


def test_the_tokenizer_comes_along(hf_folder: Path, tmp_path: Path, model_folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_folder / name, hf_folder)
    convert_hf_checkpoint.main(hf_folder, tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (model_folder / name).read_bytes()


def test_wrong_folders_are_refused_and_leave_nothing(hf_folder: Path, tmp_path: Path) -> None:
    shards = sorted(hf_folder.glob("*.safetensors"))
    config = (hf_folder / "config.json").read_text()
    out = tmp_path / "out"
    (hf_folder / "config.json").write_text(config.replace('"llama"', '"gpt2"'))
    with pytest.raises(UserError, match="'gpt2'"):
        convert_hf_checkpoint.main(hf_folder, out)
    (hf_folder / "config.json").write_text(config)
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[:-100])
    with pytest.raises(UserError, match=shards[1].name):
        convert_hf_checkpoint.main(hf_folder, out)
    shards[1].unlink()
    with pytest.raises(UserError, match=shards[1].name):
        convert_hf_checkpoint.main(hf_folder, out)
    assert not out.exists()


@pytest.mark.slow
def test_memory_holds_the_output_and_one_shard(hf_folder: Path, tmp_path: Path) -> None:
    config = replace(TINY, n_embd=512, n_hidden=2048, n_layer=12, vocab_size=8000)
    LlamaForCausalLM(LlamaConfig(**hf_config(config, torch.float32))).save_pretrained(
        tmp_path / "large", max_shard_size="40MB"
    )
    peak = peak_of_conversion("convert_hf_checkpoint", hf_folder, tmp_path / "large", tmp_path / "out")
    size = (tmp_path / "out" / "lit-llama.pth").stat().st_size
    largest = max(shard.stat().st_size for shard in (tmp_path / "large").glob("*.safetensors"))
    assert size > 150e6
    assert size / largest > 3
    assert 0.9 * size < peak < size + largest + 20e6


def change(folder: Path, **fields: object) -> None:
    """Set fields of a folder's config.json; those that are None are taken out."""
    file = folder / "config.json"
    changed = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({name: value for name, value in changed.items() if value is not None}))


@pytest.fixture
def one_file(tmp_path: Path) -> Path:
    """A folder with a single model.safetensors."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**hf_config(TINY, torch.float32))).save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def message_for(folder: Path, out: Path) -> str:
    text = str(run_script("convert_hf_checkpoint", "--checkpoint_dir", folder, "--out_dir", out))
    assert text.startswith("error: ")
    assert "\n" not in text
    assert str(folder) in text
    assert not out.exists()
    return text


def test_a_config_that_describes_no_llama_ends_in_one_line(hf_folder: Path, tmp_path: Path) -> None:
    file = hf_folder / "config.json"
    fields = json.loads(file.read_text())
    for change, word in (
        ({"hidden_size": None}, "hidden_size is None"),
        ({"num_key_value_heads": 3}, "n_kv_head=3"),
        ({"num_key_value_heads": 4}, "layer 0"),
        ({"vocab_size": 7}, "lm_head.weight"),
        ({"model_type": "gpt2"}, "'gpt2'"),
    ):
        file.write_text(json.dumps(fields | change))
        assert word in message_for(hf_folder, tmp_path / "out")
    del fields["hidden_size"]
    for content in (json.dumps(fields), "[]", "{"):
        file.write_text(content)
        assert "config.json" in message_for(hf_folder, tmp_path / "out")


def test_files_that_the_index_does_not_name_are_left_alone(hf_folder: Path, tmp_path: Path) -> None:
    """Such as those of another revision, downloaded into the same folder."""
    expected = LlamaForCausalLM.from_pretrained(hf_folder).state_dict()
    other = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    save_file(other, hf_folder / "model-99999-of-99999.safetensors")
    convert_hf_checkpoint.main(hf_folder, tmp_path / "out")
    ours = load_model(tmp_path / "out" / "lit-llama.pth")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in to_hf(ours.state_dict(), ours.config).items())


@pytest.mark.parametrize("scaling", [None, RopeScaling(8.0, 1.0, 4.0, 8192)])
def test_rotary_embedding_is_written_for_readers_of_transformers_4_and_5(scaling: RopeScaling | None) -> None:
    """Whoever does not know a key takes a base of 10,000 without scaling, in silence."""
    config = replace(TINY, rope_base=5e5, rope_scaling=scaling)
    fields = hf_config(config, torch.bfloat16)
    old = {name: value for name, value in fields.items() if name not in ("rope_parameters", "dtype")}
    new = {name: value for name, value in fields.items() if name not in ("rope_theta", "rope_scaling", "torch_dtype")}
    assert (old["rope_theta"], old["torch_dtype"], new["dtype"]) == (5e5, "bfloat16", "bfloat16")
    assert old["rope_scaling"] == (
        scaling
        and {  # as in Llama 3.1's config.json
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    )
    assert config_from_hf(old) == config_from_hf(new) == config
    assert LlamaConfig(**old).rope_parameters == LlamaConfig(**new).rope_parameters == fields["rope_parameters"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_act", "relu"),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("head_dim", 16),
        ("rope_scaling", {"type": "yarn", "factor": 4.0}),
        ("rope_scaling", {"type": "dynamic", "factor": 2.0}),
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
        ("rope_scaling", {"type": "linear", "factor": 2.0, "attention_factor": 0.5}),
        ("partial_rotary_factor", 0.5),
        ("sliding_window", 32),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}),
        ("architectures", ["LlamaForSequenceClassification"]),
        ("architectures", ["LlamaModel"]),
        ("rms_norm_eps", "1e-6"),
        ("residual_multiplier", 0.5),
        ("use_something_new", True),
    ],
)
def test_a_field_that_changes_what_is_computed_is_refused_by_its_name(
    one_file: Path, tmp_path: Path, name: str, value: object
) -> None:
    change(one_file, **{name: value})
    assert f"config.json: {name}" in message_for(one_file, tmp_path / "out")


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 2e4},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e4}},
        {"max_position_embeddings": None, "rms_norm_eps": None, "hidden_act": None},
        {"hidden_act": "swish", "pretraining_tp": 2, "architectures": ["LLaMAForCausalLM"], "use_cache": False},
        {"unsloth_version": "1", "temperature": 0.7, "num_labels": 2, "_name_or_path": "x", "something_new": False},
    ],
    ids=lambda fields: next(iter(fields)),
)
@torch.no_grad()
def test_fields_that_are_used_or_harmless_give_the_logits_of_transformers(
    one_file: Path, tmp_path: Path, fields: dict
) -> None:
    change(one_file, **fields)
    convert_hf_checkpoint.main(one_file, tmp_path / "out")
    idx = torch.randint(TINY.vocab_size, (2, 80))
    expected = LlamaForCausalLM.from_pretrained(one_file).eval()(idx).logits
    torch.testing.assert_close(load_model(tmp_path / "out").eval()(idx), expected, atol=1e-5, rtol=0)


def test_the_length_of_the_first_llama_folders_is_read(one_file: Path) -> None:
    fields = json.loads((one_file / "config.json").read_text()) | {"max_sequence_length": 64}
    del fields["max_position_embeddings"]
    assert config_from_hf(fields).block_size == 64


@torch.no_grad()
def test_a_head_that_differs_from_the_embedding_is_kept(
    one_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    change(one_file, tie_word_embeddings=True)
    convert_hf_checkpoint.main(one_file, tmp_path / "out")
    assert "tie_word_embeddings" in capsys.readouterr().err
    ours, idx = load_model(tmp_path / "out").eval(), torch.randint(TINY.vocab_size, (1, 40))
    assert not ours.config.tie_embeddings
    theirs = LlamaForCausalLM.from_pretrained(one_file).eval()
    torch.testing.assert_close(ours(idx), theirs(idx).logits, atol=1e-5, rtol=0)


def weights_of(folder: Path, out: Path) -> float:
    """By what the weights in a folder were filled, as the converted model has it."""
    convert_hf_checkpoint.main(folder, out)
    return load_model(out).lm_head.weight[0, 0].item()


def test_of_several_sets_of_weights_the_one_of_transformers_is_taken(hf_folder: Path, tmp_path: Path) -> None:
    names = LlamaForCausalLM(LlamaConfig(**hf_config(TINY, torch.float32))).state_dict()
    filled = [{name: torch.full_like(tensor, i) for name, tensor in names.items()} for i in range(4)]
    torch.save(filled[3], hf_folder / "pytorch_model.bin")
    save_file({"x.lora_A.weight": torch.ones(1)}, hf_folder / "adapter_model.safetensors")
    save_file(filled[2], hf_folder / "consolidated.safetensors")
    assert 0 < abs(weights_of(hf_folder, tmp_path / "shards")) < 1  # those of the index
    save_file(filled[1], hf_folder / "model.safetensors")  # newer than the index beside it
    assert weights_of(hf_folder, tmp_path / "single") == 1
    for path in hf_folder.glob("model*"):
        path.unlink()
    assert weights_of(hf_folder, tmp_path / "bin") == 3


def test_a_tensor_that_comes_twice_is_an_error_with_both_files(hf_folder: Path, tmp_path: Path) -> None:
    (hf_folder / "model.safetensors.index.json").unlink()
    shard = min(hf_folder.glob("*.safetensors"))
    shutil.copy(shard, hf_folder / "model.variant.safetensors")
    message = message_for(hf_folder, tmp_path / "out")
    assert shard.name in message
    assert "model.variant.safetensors" in message


def test_weights_are_stored_as_they_are_whatever_the_config_says(one_file: Path, tmp_path: Path) -> None:
    whole = load_file(one_file / "model.safetensors")
    for stored, said in ((torch.bfloat16, "float32"), (torch.float32, "float16"), (torch.float16, None)):
        save_file({name: tensor.to(stored) for name, tensor in whole.items()}, one_file / "model.safetensors")
        change(one_file, dtype=said, torch_dtype=said)
        convert_hf_checkpoint.main(one_file, tmp_path / "out")
        assert load_model(tmp_path / "out").lm_head.weight.dtype == stored
    mixed = {name: tensor.float() if "norm" in name else tensor.half() for name, tensor in whole.items()}
    save_file(mixed, one_file / "model.safetensors")
    convert_hf_checkpoint.main(one_file, tmp_path / "out")
    assert load_model(tmp_path / "out").lm_head.weight.dtype == torch.float32
    convert_hf_checkpoint.main(one_file, tmp_path / "out", "bfloat16")
    assert load_model(tmp_path / "out").lm_head.weight.dtype == torch.bfloat16


def test_weights_in_8_bits_are_refused_even_if_the_config_is_silent(one_file: Path, tmp_path: Path) -> None:
    whole = load_file(one_file / "model.safetensors")
    save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in whole.items()}, one_file / "model.safetensors")
    assert "float8_e4m3fn" in message_for(one_file, tmp_path / "out")


def test_a_file_from_before_pytorch_1_6_is_read(one_file: Path, tmp_path: Path) -> None:
    whole = load_file(one_file / "model.safetensors")
    (one_file / "model.safetensors").unlink()
    torch.save(whole, one_file / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    convert_hf_checkpoint.main(one_file, tmp_path / "out")
    assert torch.equal(load_model(tmp_path / "out").lm_head.weight, whole["lm_head.weight"])


def test_verify_compares_with_transformers(
    one_file: Path, tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_folder / name, one_file)
    convert_hf_checkpoint.main(one_file, tmp_path / "out", verify=True)
    text = capsys.readouterr().err
    assert float(text.split("by at most ")[1].split()[0]) < 1e-5
    assert "differ for 0 of 5 texts" in text


@pytest.mark.parametrize("name", ["legacy", "add_prefix_space"])
def test_a_setting_that_only_a_tokenizer_json_can_follow_is_told(
    name: str, one_file: Path, capsys: pytest.CaptureFixture
) -> None:
    train_sentencepiece(one_file / "tokenizer.model")
    config = one_file / "tokenizer_config.json"
    for value, is_told in ((True, False), (False, True)):
        config.write_text(json.dumps({name: value}))
        convert_hf_checkpoint.read_tokenizer(one_file)
        assert (f"{name}: false" in capsys.readouterr().err) == is_told


def test_other_folders_are_told_which_script_takes_them(tmp_path: Path) -> None:
    for name, script in (
        ("adapter_config.json", "import_peft.py"),
        ("consolidated.00.pth", "convert_meta_checkpoint.py"),
        ("model-Q4_0.gguf", "convert_gguf_checkpoint.py"),
    ):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / name).touch()
        assert script in message_for(folder, tmp_path / "out")
