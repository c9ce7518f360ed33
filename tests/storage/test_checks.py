from dataclasses import asdict
from pathlib import Path
from typing import Any

from lit_llama.errors import UserError, error_context, fits, short
from lit_llama.lora import LoRAConfig
from lit_llama.model import CONFIGS, LLaMAConfig
from lit_llama.storage.checks import check_types, from_fields

import pytest
import torch
from builders import TINY


@pytest.mark.parametrize("config", [TINY, *CONFIGS.values()])
def test_a_config_is_the_same_after_a_file(config: LLaMAConfig) -> None:
    assert from_fields(LLaMAConfig, asdict(config)) == config


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("n_layer", 10**9, "n_layer is 1000000000, expected 1 to 1024"),
        ("n_layer", 2.0, "n_layer is 2.0, expected a whole number"),
        ("n_layer", True, "expected a whole number"),
        ("n_head", 0, "n_head is 0, expected 1 to 4096"),
        ("n_head", 3, "multiple of self.n_head=3"),
        ("n_embd", 36, "an even multiple of self.n_head=4"),
        ("norm_eps", float("nan"), "norm_eps is nan, expected a number"),
        ("rope_base", 0, "rope_base is 0"),
        ("rope_base", float("inf"), "rope_base is inf"),
        ("tie_embeddings", 1, "tie_embeddings is 1, expected true or false"),
        ("rope_scaling", 8, "rope_scaling is 8, expected RopeScaling or null"),
        ("rope_scaling", {"low_freq_factor": 1.0}, "does not have factor"),
        ("rope_scaling", {**asdict(CONFIGS["Llama-3.1-8B"].rope_scaling), "high_freq_factor": 1.0}, "high_freq_factor"),
        ("sliding_window", 4096, "'sliding_window' is not known; it may be from a newer version"),
    ],
)
def test_a_value_out_of_place_is_named(field: str, value: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_fields(LLaMAConfig, {**asdict(TINY), field: value})


def test_lists_stand_for_tuples_as_json_has_no_others() -> None:
    assert from_fields(LoRAConfig, {"r": 4, "targets": ["mlp"]}) == LoRAConfig(4, targets=("mlp",))
    for wrong in ([["mlp"]], "mlp", ["mlp", None]):
        with pytest.raises(UserError, match="targets is"):
            from_fields(LoRAConfig, {"targets": wrong})


def test_fields_of_a_mapping_are_there_and_of_their_types() -> None:
    required, optional = {"step": int}, {"base": str | None}
    check_types({"step": 3, "base": None}, required, optional)
    wrong = [({}, "does not have step"), ({"step": "3"}, "step is '3'"), ({"step": 3, "x": 1}, "'x' is not known")]
    for values, message in wrong:
        with pytest.raises(UserError, match=message):
            check_types(values, required, optional)
    assert not fits(None, float)


def test_messages_are_one_short_line_and_name_the_file() -> None:
    assert short(torch.zeros(2, 3)) == "a tensor (2, 3) of float32"
    for value in ("a\nb" * 100, 10**100, "\ud800", {"x": 1}):
        assert len(short(value)) <= 60
        assert short(value).isascii()
        assert short(value).isprintable()
    message = r"^config\.json is not valid: this; do that$"
    with pytest.raises(UserError, match=message), error_context(Path("config.json"), "do that"):
        raise UserError("this")
