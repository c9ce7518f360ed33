"""The text that an instruction is wrapped in. A model answers best in the style that it was finetuned with."""

from lit_llama.cli import UserError


def alpaca(instruction: str, context: str) -> str:
    """The template of Stanford Alpaca, with and without an input for the instruction to work on."""
    if context:
        return (
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n"
            f"### Instruction:\n{instruction}\n\n### Input:\n{context}\n\n### Response:\n"
        )
    return (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n### Response:\n"
    )


def plain(instruction: str, context: str) -> str:
    """No template: the text itself, for a model to continue."""
    return f"{instruction}\n{context}" if context else instruction


STYLES = {"alpaca": alpaca, "plain": plain}


def format_prompt(style: str, instruction: str, context: str = "") -> str:
    if style not in STYLES:
        raise UserError(f"there is no prompt style {style!r}; the styles are {', '.join(STYLES)}")
    return STYLES[style](instruction, context)
