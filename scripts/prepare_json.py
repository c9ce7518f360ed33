"""Prepare your own records, a JSON list or JSON lines with "instruction", "input" (optional) and "output"."""

from pathlib import Path

from lit_llama.cli import run
from lit_llama.data import prepare, read_records, split_records
from lit_llama.tokenizer import find_tokenizer


def main(
    train_file: Path,
    data_dir: Path,
    validation_file: Path | None = None,
    pretrained_path: Path = Path("checkpoints/lit-llama/7B/lit-llama.pth"),
    tokenizer_path: Path | None = None,
    val_split_size: int | None = None,
    seed: int = 42,
) -> None:
    """Split and tokenise.

    Args:
        train_file: The records to train on.
        data_dir: The folder to write.
        validation_file: The records to validate on. By default, some of train_file are set apart.
        pretrained_path: The checkpoint that will be finetuned; its tokenizer is used.
        tokenizer_path: The tokenizer, if it does not lie beside the checkpoint.
        val_split_size: Records to set apart if there is no validation_file. By default 2000, or a tenth if less.
        seed: Of the split.
    """
    tokenizer = find_tokenizer(pretrained_path, tokenizer_path)
    records = read_records(train_file)
    if validation_file is None:
        prepare(data_dir, split_records(records, val_split_size, seed), tokenizer, [train_file], "alpaca", seed)
    else:
        splits = {"train": records, "validation": read_records(validation_file)}
        prepare(data_dir, splits, tokenizer, [train_file, validation_file], "alpaca")


if __name__ == "__main__":
    run(main)
