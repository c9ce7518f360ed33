"""Prepare databricks-dolly-15k (15,000 instructions written by people) for finetuning."""

from pathlib import Path

from jsonargparse.typing import NonNegativeInt

from lit_llama.cli import run
from lit_llama.prepared import prepare
from lit_llama.prompt import PromptStyle
from lit_llama.records import Fields, download, read_records, split_records
from lit_llama.tokenizer import find_tokenizer

URL = "https://huggingface.co/datasets/databricks/databricks-dolly-15k/resolve/main/databricks-dolly-15k.jsonl"


def main(
    data_dir: Path = Path("data/dolly"),
    pretrained_path: Path = Path("checkpoints/lit-llama/7B/lit-llama.pth"),
    tokenizer_path: Path | None = None,
    prompt_style: PromptStyle = "alpaca",
    data_file: Path | None = None,
    val_split_size: NonNegativeInt | None = None,
    seed: NonNegativeInt = 42,
) -> None:
    """Download, split and tokenise.

    Args:
        data_dir: The folder to write.
        pretrained_path: The checkpoint that will be finetuned; its tokenizer is used.
        tokenizer_path: The tokenizer, if it is not next to the checkpoint.
        prompt_style: The template of the conversations (see lit_llama/prompt.py).
        data_file: databricks-dolly-15k.jsonl on the disk, instead of the download.
        val_split_size: Records to hold out for validation. By default 2000, or a tenth if that is less.
        seed: Of the split.
    """
    tokenizer = find_tokenizer(pretrained_path, tokenizer_path)
    source = data_file or data_dir / "databricks-dolly-15k.jsonl"
    if data_file is None:
        download(URL, source)
    records = read_records(source, Fields(input="context", output="response"))
    prepare(data_dir, split_records(records, val_split_size, seed), tokenizer, [source], prompt_style, seed)


if __name__ == "__main__":
    run(main)
