"""The text that an instruction is wrapped in. A model answers best in the style that it was finetuned with."""

from typing import Literal

from lit_llama.errors import UserError

PromptStyle = Literal["alpaca", "alpaca-stanford", "chatml", "smollm2", "plain"]


def alpaca(instruction: str, context: str) -> str:
    """The template of Stanford Alpaca and a line break, as alpaca-lora and LitGPT use it."""
    return alpaca_stanford(instruction, context) + "\n"


def alpaca_stanford(instruction: str, context: str) -> str:
    """The template as Stanford Alpaca published it, and as the archived Lit-LLaMA and LLaMA-Adapter use it."""
    if context:
        return (
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n"
            f"### Instruction:\n{instruction}\n\n### Input:\n{context}\n\n### Response:"
        )
    return (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n### Response:"
    )


def chatml(instruction: str, context: str) -> str:
    """A user's turn in ChatML, and the start of the answer; for models that have its two tokens, such as SmolLM2."""
    return f"<|im_start|>user\n{plain(instruction, context)}<|im_end|>\n<|im_start|>assistant\n"


def smollm2(instruction: str, context: str) -> str:
    """The same after the system message that SmolLM2-Instruct was trained with, which is its own template."""
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    return f"<|im_start|>system\n{system}<|im_end|>\n{chatml(instruction, context)}"


def plain(instruction: str, context: str) -> str:
    """No template: the text itself, for a model to continue."""
    return f"{instruction}\n{context}" if context else instruction


STYLES = {"alpaca": alpaca, "alpaca-stanford": alpaca_stanford, "chatml": chatml, "smollm2": smollm2, "plain": plain}


def format_prompt(style: PromptStyle, instruction: str, context: str = "") -> str:
    """The prompt for an instruction and the input, or "", that it works on."""
    if style not in STYLES:  # as read from a file
        raise UserError(f"there is no prompt style {style!r}; the styles are {', '.join(STYLES)}")
    return STYLES[style](instruction, context)
