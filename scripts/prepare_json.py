"""Prepare your own records: questions and answers, conversations or documents.

They are read from .json, .jsonl, .csv, .tsv, .parquet or .txt files (all but parquet also as .gz), or from a data set
on the Hugging Face hub. A record has the fields "instruction", "output" and perhaps "input"; or "messages", each with a
role and content; or "text", all of which is trained on.
"""

from pathlib import Path

from lit_llama.cli import run
from lit_llama.data.preparation import N_CORES, Encoder, prepare
from lit_llama.data.records import Fields
from lit_llama.model_folder import find_model, own_template
from lit_llama.prompt import find_template
from lit_llama.tokenizer import find_tokenizer

from jsonargparse.typing import NonNegativeInt, PositiveInt


def main(
    train_file: Path,
    data_dir: Path,
    validation_file: Path | None = None,
    pretrained_path: Path | None = None,
    tokenizer_path: Path | None = None,
    prompt_style: str | None = None,
    instruction_key: str = "instruction",
    input_key: str = "input",
    output_key: str = "output",
    messages_key: str = "messages",
    text_key: str = "text",
    ignored_fields: tuple[str, ...] = (),
    val_split_size: NonNegativeInt | None = None,
    seed: NonNegativeInt = 42,
    num_workers: PositiveInt = N_CORES,
    skip_bad: bool = False,
) -> None:
    """Split and tokenise.

    Args:
        train_file: The records to train on: a file, or a data set's folder or name on the hub.
        data_dir: The folder to write.
        validation_file: The records to validate on. By default, some of train_file are held out.
        pretrained_path: The checkpoint that will be finetuned; its tokenizer is used. Default:
            checkpoints/lit-llama/7B, or else the model written last.
        tokenizer_path: The tokenizer, if it is not next to the checkpoint.
        prompt_style: The chat template: own (the model's), alpaca, chatml or another style of lit_llama/prompt.py, or a
            file that holds one. By default own, or alpaca for a model that has none.
        instruction_key: The field that holds the instruction of a record.
        input_key: The field that holds what the instruction works on.
        output_key: The field that holds the answer.
        messages_key: The field that holds the list of messages of a conversation.
        text_key: The field that holds the text of a document.
        ignored_fields: Fields to leave out, such as tools or context; otherwise, a record that has one is refused.
        val_split_size: Records to hold out if there is no validation_file. By default 2000, or a tenth if less.
        seed: Random seed of the split.
        num_workers: Processes that tokenise: at most one for each CPU core, which is the default.
        skip_bad: Leave out records that cannot be used, and count them by reason, instead of refusing the file.
    """
    pretrained_path = find_model(pretrained_path)
    fields = Fields(instruction_key, input_key, output_key, messages_key, text_key, ignored_fields)
    template = find_template(prompt_style, own_template(pretrained_path), "alpaca")
    encoder = Encoder(find_tokenizer(pretrained_path, tokenizer_path), template, fields, skip_bad)
    if validation_file is None:
        prepare(data_dir, {"train": train_file}, encoder, seed, val_split_size, num_workers)
    else:
        files = {"train": train_file, "validation": validation_file}
        prepare(data_dir, files, encoder, num_workers=num_workers)


if __name__ == "__main__":
    run(main)
