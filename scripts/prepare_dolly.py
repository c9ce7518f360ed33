"""Prepare databricks-dolly-15k (15,000 instructions written by people) for finetuning."""

from pathlib import Path

from lit_llama.cli import run
from lit_llama.data.preparation import N_CORES, Encoder, prepare
from lit_llama.data.records import Fields
from lit_llama.model_folder import find_model, own_template
from lit_llama.prompt import find_template
from lit_llama.tokenizer import find_tokenizer

from jsonargparse.typing import NonNegativeInt, PositiveInt
from prepare_alpaca import download

URL = "https://huggingface.co/datasets/databricks/databricks-dolly-15k/resolve/main/databricks-dolly-15k.jsonl"


def main(
    data_dir: Path = Path("data/dolly"),
    pretrained_path: Path | None = None,
    tokenizer_path: Path | None = None,
    prompt_style: str | None = None,
    data_file: Path | None = None,
    ignored_fields: tuple[str, ...] = (),
    val_split_size: NonNegativeInt | None = None,
    seed: NonNegativeInt = 42,
    num_workers: PositiveInt = N_CORES,
    skip_bad: bool = False,
) -> None:
    """Download, split and tokenise.

    Args:
        data_dir: The folder to write.
        pretrained_path: The checkpoint that will be finetuned; its tokenizer is used. Default:
            checkpoints/lit-llama/7B, or else the model written last.
        tokenizer_path: The tokenizer, if it is not next to the checkpoint.
        prompt_style: The chat template: own (the model's), alpaca, chatml or another style of lit_llama/prompt.py, or a
            file that holds one. By default own, or alpaca for a model that has none.
        data_file: databricks-dolly-15k.jsonl on the disk, instead of the download.
        ignored_fields: Fields to leave out, such as tools or images; otherwise, a record that has one is refused.
        val_split_size: Records to hold out for validation. By default 2000, or a tenth if that is less.
        seed: Random seed of the split.
        num_workers: Processes that tokenise: at most one for each CPU core, which is the default.
        skip_bad: Leave out records that cannot be used, and count them by reason, instead of refusing the file.
    """
    pretrained_path = find_model(pretrained_path)
    tokenizer = find_tokenizer(pretrained_path, tokenizer_path)
    template = find_template(prompt_style, own_template(pretrained_path), "alpaca")
    fields = Fields(input="context", output="response", ignored=ignored_fields)
    encoder = Encoder(tokenizer, template, fields, skip_bad)
    source = data_file or data_dir / "databricks-dolly-15k.jsonl"
    if data_file is None:
        download(URL, source)
    prepare(data_dir, {"train": source}, encoder, seed, val_split_size, num_workers)


if __name__ == "__main__":
    run(main)
