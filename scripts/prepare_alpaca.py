"""Prepare the cleaned Alpaca data set (52,000 instructions) for finetuning."""

from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

from lit_llama.cli import run
from lit_llama.data.preparation import N_CORES, Encoder, prepare
from lit_llama.data.records import Fields
from lit_llama.errors import UserError
from lit_llama.model_folder import find_model, own_template
from lit_llama.prompt import find_template
from lit_llama.storage.files import write_file
from lit_llama.tokenizer import find_tokenizer

from jsonargparse.typing import NonNegativeInt, PositiveInt

URL = "https://raw.githubusercontent.com/tloen/alpaca-lora/main/alpaca_data_cleaned_archive.json"


def main(
    data_dir: Path = Path("data/alpaca"),
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
        data_file: Records in the Alpaca format on the disk, instead of the download.
        ignored_fields: Fields to leave out, such as tools or images; otherwise, a record that has one is refused.
        val_split_size: Records to hold out for validation. By default 2000, or a tenth if that is less.
        seed: Random seed of the split.
        num_workers: Processes that tokenise: at most one for each CPU core, which is the default.
        skip_bad: Leave out records that cannot be used, and count them by reason, instead of refusing the file.
    """
    pretrained_path = find_model(pretrained_path)
    template = find_template(prompt_style, own_template(pretrained_path), "alpaca")
    tokenizer = find_tokenizer(pretrained_path, tokenizer_path)
    encoder = Encoder(tokenizer, template, Fields(ignored=ignored_fields), skip_bad)
    source = data_file or data_dir / "alpaca_data_cleaned_archive.json"
    if data_file is None:
        download(URL, source)
    prepare(data_dir, {"train": source}, encoder, seed, val_split_size, num_workers)


def download(url: str, path: Path) -> None:
    """Fetch `url` into `path` unless it is there already."""
    if path.is_file():
        return
    try:
        with urlopen(url, timeout=60) as response:
            content = response.read()  # all of it, or an HTTPException
    except (OSError, HTTPException) as error:
        raise UserError(f"could not download {url} ({error}); fetch it by other means and pass --data_file") from None
    write_file(path, content)


if __name__ == "__main__":
    run(main)
