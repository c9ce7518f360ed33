"""A readable LLaMA, finetuned with LoRA, with LLaMA-Adapter or as a whole."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lit_llama.errors import guard_imports

if TYPE_CHECKING:
    from lit_llama.model import LLaMA as LLaMA
    from lit_llama.model import LLaMAConfig as LLaMAConfig
    from lit_llama.tokenizer import Tokenizer as Tokenizer

guard_imports()
__all__ = ["LLaMA", "LLaMAConfig", "Tokenizer"]


def __getattr__(name: str) -> Any:
    """Load a class when it is asked for: whoever needs the tokenizer alone does not wait for torch."""
    if name in __all__:
        return getattr(import_module("lit_llama.tokenizer" if name == "Tokenizer" else "lit_llama.model"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
