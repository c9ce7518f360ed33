import json
import shutil
from dataclasses import replace
from pathlib import Path

from lit_llama.errors import UserError
from lit_llama.formats.huggingface import config_from_hf, from_hf, hf_config, to_hf
from lit_llama.model import CONFIGS, LLaMAConfig, RopeScaling
from lit_llama.model_folder import load_model

import convert_hf_checkpoint
import pytest
import torch
from builders import TINY, peak_of_conversion, random_model, run_script
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

VARIANTS = {
    "mha": replace(TINY, n_kv_head=4),
    "gqa": TINY,
    "tied": replace(TINY, tie_embeddings=True),
    "llama3": replace(TINY, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 32)),
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
