"""The text that an instruction is wrapped in. A model answers best in the style that it was finetuned with."""

from typing import Literal, get_args

from lit_llama.errors import UserError

PromptStyle = Literal["alpaca", "alpaca-stanford", "chatml", "plain"]


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
    """One turn of a conversation with SmolLM2-Instruct, with the system message that it was trained with."""
    return (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        f"<|im_start|>user\n{plain(instruction, context)}<|im_end|>\n<|im_start|>assistant\n"
    )


def plain(instruction: str, context: str) -> str:
    """No template: the text itself, for a model to continue."""
    return f"{instruction}\n{context}" if context else instruction


def format_prompt(style: PromptStyle, instruction: str, context: str = "") -> str:
    """The prompt for an instruction and the input, or "", that it works on."""
    if style not in get_args(PromptStyle):  # as read from a file
        raise UserError(f"there is no prompt style {style!r}; the styles are {', '.join(get_args(PromptStyle))}")
    return {"alpaca": alpaca, "alpaca-stanford": alpaca_stanford, "chatml": chatml, "plain": plain}[style](
        instruction, context
    )
