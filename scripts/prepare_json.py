"""Prepare your own records, a JSON list or JSON lines with "instruction", "input" (optional) and "output"."""

from pathlib import Path

from lit_llama.cli import run
from lit_llama.prompt import PromptStyle
from lit_llama.records import prepare, read_records, split_records
from lit_llama.tokenizer import find_tokenizer


def main(
    train_file: Path,
    data_dir: Path,
    validation_file: Path | None = None,
    pretrained_path: Path = Path("checkpoints/lit-llama/7B/lit-llama.pth"),
    tokenizer_path: Path | None = None,
    prompt_style: PromptStyle = "alpaca",
    val_split_size: int | None = None,
    seed: int = 42,
) -> None:
    """Split and tokenise.

    Args:
        train_file: The records to train on.
        data_dir: The folder to write.
        validation_file: The records to validate on. By default, some of train_file are held out.
        pretrained_path: The checkpoint that will be finetuned; its tokenizer is used.
        tokenizer_path: The tokenizer, if it is not next to the checkpoint.
        prompt_style: The template of the prompts (see lit_llama/prompt.py).
        val_split_size: Records to hold out if there is no validation_file. By default 2000, or a tenth if less.
        seed: Of the split.
    """
    tokenizer = find_tokenizer(pretrained_path, tokenizer_path)
    records = read_records(train_file)
    if validation_file is None:
        prepare(data_dir, split_records(records, val_split_size, seed), tokenizer, [train_file], prompt_style, seed)
    else:
        splits = {"train": records, "validation": read_records(validation_file)}
        prepare(data_dir, splits, tokenizer, [train_file, validation_file], prompt_style)


if __name__ == "__main__":
    run(main)
