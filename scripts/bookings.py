"""The quickstart's task: a sentence that books a table becomes JSON. Writes the records, and scores a model on it.

All sentences are invented: drawn with a seed from the words of data/bookings.json. The two sets that judge what was
learned have names and places that are in no training record; new_wordings.json has new wordings, too.
"""

import json
import random
from pathlib import Path
from typing import Any

from lit_llama.cli import run
from lit_llama.finetuned import load_for_use, read_finetuned
from lit_llama.generation import Sampling, generate_batch
from lit_llama.model_folder import QUICKSTART_MODEL, find_model
from lit_llama.progress import progress
from lit_llama.prompt import STYLES, Message, encode, stop_ids
from lit_llama.storage.files import read_json, read_text, write_file
from lit_llama.tokenizer import find_tokenizer

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt

Record = dict[str, str]  # instruction and output
WORDS = Path(__file__).parents[1] / "data" / "bookings.json"
REQUEST = "Answer in JSON with name, place, people, day, time: "
STYLE = STYLES["chatml"]
SETS = {"new_names": "new names and places", "new_wordings": "new wordings, too"}
N_SCORED = 100  # records of each set
N_TOKENS = 100  # of an answer at most; a right one has about 40


def main(
    records_dir: Path = Path("data/bookings"),
    checkpoint_path: Path | None = None,
    lora_path: Path | None = None,
    score: bool = False,
    shots: NonNegativeInt = 0,
    n: PositiveInt = N_SCORED,
    show: NonNegativeInt = 0,
    n_records: PositiveInt = 220,
    batch_size: PositiveInt = 25,
    seed: int = 1,
) -> None:
    """Write train.json, new_names.json and new_wordings.json; with --score true, print the score of a model instead.

    An answer is valid if it parses as a JSON object, and exact if it has the five fields, no others, and each is right.

    Args:
        records_dir: The folder of these files.
        checkpoint_path: The model to score. Default: checkpoints/lit-llama/SmolLM2-135M-Instruct, or else the model
            written last.
        lora_path: The file that finetune_lora.py wrote, or the run's folder. Without it, the base model is scored.
        score: Answer the sentences of both sets, greedily, and count the right answers.
        shots: Training records that the model is shown first, as earlier turns of the conversation.
        n: Sentences of each set to score, from its first.
        show: Answers of each set to print, from its first; the first wrong one is printed as well.
        n_records: Training records to write.
        batch_size: Sentences answered at once.
        seed: Random seed of the records that are written.
    """
    if not score:
        for name, records in make_records(n_records, seed).items():
            write_file(records_dir / f"{name}.json", json.dumps(records, indent=2))
        return
    checkpoint_path = find_model(checkpoint_path, QUICKSTART_MODEL)
    tokenizer = find_tokenizer(checkpoint_path)
    lora = read_finetuned(lora_path, "lora", base_path=checkpoint_path) if lora_path else None
    model = load_for_use(checkpoint_path, torch.float32, [lora])
    stop, sampling = stop_ids(STYLE, tokenizer), Sampling(N_TOKENS, temperature=0)
    examples = read_records(records_dir / "train.json")[:shots]
    before = [
        Message(*turn) for one in examples for turn in (("user", one["instruction"]), ("assistant", one["output"]))
    ]
    for name, title in SETS.items():
        records, answers = read_records(records_dir / f"{name}.json")[:n], []
        prompts = [encode(STYLE, [*before, Message("user", one["instruction"])], tokenizer).ids for one in records]
        for first in progress(range(0, len(prompts), batch_size), title, "batch"):
            some = generate_batch(model, prompts[first : first + batch_size], sampling, [stop] * batch_size)
            answers += [tokenizer.decode(answer).strip() for answer in some]
        print(report(title, records, answers, show), flush=True)


def read_records(path: Path) -> list[Record]:
    return json.loads(read_text(path))


def make_records(n: int, seed: int) -> dict[str, list[Record]]:
    """n records to train on, and two sets to score."""
    words, draw = read_json(WORDS), random.Random(seed)

    def known_wording() -> str:
        """An opening, then place, people, time and name in any order."""
        parts = [draw.choice(ways) for ways in words["parts"]]
        return f"{draw.choice(words['openings'])} {' '.join(draw.sample(parts, len(parts)))}."

    new = words["new wordings"]
    return {
        "train": [make_record(known_wording(), words, "", draw) for _ in range(n)],
        "new_names": [make_record(known_wording(), words, "new ", draw) for _ in range(N_SCORED)],
        "new_wordings": [make_record(new[i % len(new)], words, "new ", draw) for i in range(N_SCORED)],
    }


def make_record(wording: str, words: dict[str, Any], new: str, draw: random.Random) -> Record:
    """`new` begins the keys under which the names and places of the sets to score are listed."""

    def one(kind: str) -> str:
        return draw.choice(words[kind].split())

    fields = {
        "name": one(f"{new}names"),
        "place": f"{one(f'{new}adjectives')} {one(f'{new}nouns')}",
        "people": draw.randint(1, 12),
        "day": one("days"),
        "time": f"{draw.randint(5, 10)}{draw.choice(['', ':15', ':30', ':45'])} pm",
    }
    number = draw.choice([str(fields["people"]), words["numbers"].split()[fields["people"] - 1]])
    return {"instruction": REQUEST + wording.format(**{**fields, "people": number}), "output": json.dumps(fields)}


def report(title: str, records: list[Record], answers: list[str], show: int) -> str:
    """The first answers, the first that is wrong, and the score of all."""
    read = [read_answer(answer) for answer in answers]
    right = [fields == json.loads(record["output"]) for fields, record in zip(read, records, strict=True)]
    shown = [*range(show), *([right.index(False)] if False in right else [])]
    lines = [
        f"> {records[i]['instruction'].removeprefix(REQUEST)}\n{answers[i]} ({'right' if right[i] else 'wrong'})"
        for i in dict.fromkeys(shown)
    ]
    n_valid = sum(fields is not None for fields in read)
    return "\n".join([*lines, f"{title}: {n_valid} of {len(records)} valid JSON, {sum(right)} exact"])


def read_answer(answer: str) -> dict[str, object] | None:
    """The fields of an answer; None if it is not a JSON object."""
    try:
        fields = json.loads(answer)
    except json.JSONDecodeError:
        return None
    return fields if isinstance(fields, dict) else None


if __name__ == "__main__":
    run(main)
