"""Evaluate a base, LoRA, adapter or fully finetuned model: perplexity of texts, loss of responses, ROUGE and BLEU."""

import json
import math
import re
import time
from pathlib import Path
from typing import Any, Literal

from lit_llama.cli import run
from lit_llama.data.batches import Dataset, matching_tokenizer, single_step
from lit_llama.device import Precision, default_precision, storage_dtype
from lit_llama.errors import UserError
from lit_llama.finetuned import load_for_use, read_finetuned
from lit_llama.generation import Sampling, compile_steps, generate_batch
from lit_llama.model import LLaMA
from lit_llama.model_folder import find_model
from lit_llama.progress import progress, say
from lit_llama.prompt import name_of, stop_ids
from lit_llama.quantization import Quantization
from lit_llama.storage.files import read_text as read_text_file
from lit_llama.tokenizer import Tokenizer, find_tokenizer

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch import Tensor
from torch.nn import functional as F

# The arguments of load_dataset, the column, and what joins its rows: as usual since GPTQ (arXiv 2210.17323).
CORPORA: dict[str, tuple[dict[str, Any], str, str]] = {
    "wikitext": ({"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "test"}, "text", "\n\n"),
    "ptb": (
        {"path": "ptb-text-only/ptb_text_only", "revision": "refs/convert/parquet", "split": "test"},
        "sentence",
        "\n\n",
    ),
    "c4": (
        {
            "path": "allenai/c4",
            "data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"},
            "split": "validation[:1100]",
        },
        "text",
        " ",
    ),
}

UNSPACED = "[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]"  # Thai, kana, Han


def main(
    checkpoint_path: Path | None = None,
    lora_path: Path | None = None,
    adapter_path: Path | None = None,
    tokenizer_path: Path | None = None,
    text: tuple[str, ...] = (),
    data_dir: Path | None = None,
    split: Literal["validation", "train"] = "validation",
    n_answers: NonNegativeInt = 0,
    block_size: PositiveInt | None = None,
    max_blocks: PositiveInt | None = None,
    batch_size: PositiveInt = 8,
    max_new_tokens: PositiveInt = 100,
    lora_alpha: float | None = None,
    precision: Precision | None = None,
    quantize: Quantization | None = None,
    compile: bool = False,
    json: bool = False,
    force: bool = False,
) -> None:
    """Print a table to stdout, or JSON.

    Args:
        checkpoint_path: The base model, or what finetune_full.py or merge_lora.py wrote. Default:
            checkpoints/lit-llama/7B, or else the model written last.
        lora_path: The file that finetune_lora.py wrote, or the run's folder.
        adapter_path: The file that finetune_adapter.py wrote, or the run's folder.
        tokenizer_path: The tokenizer, if it is not next to the checkpoint.
        text: For perplexity: text files, or wikitext, ptb, c4, which are downloaded.
        data_dir: For the loss of responses, and for answers: a folder written by one of scripts/prepare_*.py.
        split: The records of data_dir, validation or train.
        n_answers: For ROUGE and BLEU: how many of these records are answered, greedily; the first ones.
        block_size: Tokens of a block of text, and after which a record is cut. By default at most 2048.
        max_blocks: How many blocks of each text are evaluated, at most; the first ones.
        batch_size: Records computed at once.
        max_new_tokens: The longest answer.
        lora_alpha: Only for a LoRA file of the archived Lit-LLaMA, which did not store it.
        precision: By default the weights are bfloat16 on a GPU that has it, else float32.
        quantize: int8 or nf4: weights in 8 bits, or those of the blocks in 4, as in the generate scripts.
        compile: Compile the computation of a token of an answer first.
        json: Print JSON instead of the table.
        force: Use the file even if it was trained on a different base model of the same shape.
    """
    checkpoint_path = find_model(checkpoint_path)
    if not text and data_dir is None:
        raise UserError("there is nothing to evaluate on; give --text, --data_dir or both")
    if n_answers:
        rouge_and_bleu([""], [""])  # now rather than after the work, if a library is missing
    texts = {name: read_text(name) for name in text}
    dtype = storage_dtype(precision or default_precision())
    lora = read_finetuned(lora_path, "lora", lora_alpha, checkpoint_path, force) if lora_path else None
    adapter = read_finetuned(adapter_path, "adapter", None, checkpoint_path, force) if adapter_path else None
    model = load_for_use(checkpoint_path, dtype, [lora, adapter], quantize)
    block_size = block_size or min(2048, model.config.block_size)
    dataset = Dataset(data_dir, split, block_size) if data_dir else None
    if dataset is None:
        tokenizer = find_tokenizer(checkpoint_path, tokenizer_path)
        tokenizer.check_fits(model.config.vocab_size)
    else:
        tokenizer = matching_tokenizer(dataset, model, checkpoint_path, tokenizer_path)
        for file in (lora, adapter):
            if file and file.prompt_style != dataset.prompt_style:
                theirs, ours = name_of(file.prompt_style), name_of(dataset.prompt_style)
                say(f"note: {file.path} was trained in the prompt style {theirs}, and the data is in {ours}")
    results = {f"text {name}": text_loss(model, tokenizer, texts[name], block_size, max_blocks) for name in texts}
    if dataset is not None:
        results["responses"] = response_loss(model, dataset, batch_size)
        if n_answers:
            if compile:
                compile_steps(model)
            results["answers"] = answer_scores(model, tokenizer, dataset, n_answers, batch_size, max_new_tokens)
    print(to_json(results) if json else table(results))


def read_text(name: str) -> str:
    """The content of a text file, or of a known corpus."""
    if name not in CORPORA:
        path = Path(name).expanduser()
        if not path.exists():
            raise UserError(f"{name} does not exist, nor is it one of {', '.join(CORPORA)}")
        return read_text_file(path)
    arguments, column, separator = CORPORA[name]
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(f"to fetch {name}, run: pip install -e '.[eval]'; or give a text file") from None
    try:
        return separator.join(load_dataset(**arguments)[column])
    except Exception as error:  # of the library, or of one of the many beneath it
        reason = (str(error) or repr(error)).splitlines()[0]
        raise UserError(f"could not fetch {name} ({reason}); give a text file instead") from None


@torch.inference_mode()
def text_loss(
    model: LLaMA, tokenizer: Tokenizer, text: str, block_size: int, max_blocks: int | None
) -> dict[str, float]:
    """Cross-entropy a token, in nats, over blocks that do not overlap; nothing precedes a block's first token."""
    ids = tokenizer.encode(text)
    if min(len(ids), block_size) < 2:
        raise UserError("perplexity needs a text, and blocks, of two tokens at least")
    blocks = torch.tensor(ids).split(block_size)[:max_blocks]
    device, total, count = model.lm_head.weight.device, 0.0, 0
    for block in progress(blocks, "Perplexity", "block"):
        logits = model(block[None].to(device))[0, :-1]  # (T - 1, V)
        total += cross_entropy(logits, block[1:].to(device))
        count += len(block) - 1
    return {**loss_and_perplexity(total / count), "blocks": len(blocks), "tokens": count}


def cross_entropy(logits: Tensor, targets: Tensor) -> float:
    """The sum over all targets (N,) of logits (N, V), in float64: float32 is off by 1e-5 a token at 49,152 words."""
    if logits.is_mps:  # which has no float64
        logits, targets = logits.cpu(), targets.cpu()
    chunks = zip(logits.split(256), targets.split(256), strict=True)
    return sum(float(F.cross_entropy(part.double(), ids, reduction="sum")) for part, ids in chunks)


@torch.inference_mode()
def response_loss(model: LLaMA, dataset: Dataset, batch_size: int) -> dict[str, float]:
    """Cross-entropy a response token, in nats, over all records."""
    if not len(dataset):
        raise UserError(f"{dataset.data_dir} has no such records, or none with room for a response in --block_size")
    total, device = 0.0, model.lm_head.weight.device
    step = single_step(dataset, batch_size * dataset.block_size)
    for records in progress(step.micro_batches(), "Loss of responses", "batch"):
        ids, lengths, select, targets = dataset.batch(records)
        total += cross_entropy(model(ids.to(device), lengths=lengths, select=select.to(device)), targets.to(device))
    count = dataset.n_targets(range(len(dataset)))
    return {**loss_and_perplexity(total / count), "records": len(dataset), "tokens": count}


def loss_and_perplexity(loss: float) -> dict[str, float]:
    return {"loss": loss, "perplexity": math.exp(min(loss, 700))}


def answer_scores(
    model: LLaMA, tokenizer: Tokenizer, dataset: Dataset, n: int, batch_size: int, max_new_tokens: int
) -> dict[str, float]:
    """ROUGE and BLEU, from 0 to 100, of greedy answers to the first records."""
    n = min(n, len(dataset))
    answers, start, count = [""] * n, time.perf_counter(), 0
    sampling = Sampling(max_new_tokens, temperature=0)
    prompts, references = zip(*(last_answer(dataset, i) for i in range(n)), strict=True)
    stop = stop_ids(dataset.prompt_style, tokenizer)
    by_length = sorted(range(n), key=lambda i: len(prompts[i]))
    for first in progress(range(0, n, batch_size), "Answers", "batch"):
        records = by_length[first : first + batch_size]
        new = generate_batch(model, [prompts[i] for i in records], sampling, [stop] * len(records))
        for i, ids in zip(records, new, strict=True):
            answers[i], count = tokenizer.decode(ids), count + len(ids)
    speed = count / (time.perf_counter() - start)
    wanted = [tokenizer.decode(reference) for reference in references]
    return {**rouge_and_bleu(answers, wanted), "records": n, "tokens_per_second": speed}


def last_answer(dataset: Dataset, i: int) -> tuple[list[int], list[int]]:
    """The tokens before the last span of a record that is trained on, and those in it."""
    start, end = dataset.spans(i)[-1]
    tokens = dataset.record(i).tolist()
    return tokens[:start], tokens[start:end]


def rouge_and_bleu(answers: list[str], references: list[str]) -> dict[str, float]:
    """ROUGE-1, -2 and -L (means of the F-measure, with stemming) and the BLEU of the corpus, from 0 to 100.

    Lin 2004, "ROUGE"; Papineni et al. 2002, "BLEU"; as rouge-score and sacrebleu compute them. rouge-score knows only
    the words of ASCII; here, those of other scripts count, too. Chinese, Japanese and Thai, which put no spaces between
    words, are compared by their characters.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from rouge_score.tokenizers import DefaultTokenizer
        from sacrebleu import corpus_bleu
    except ImportError:
        raise UserError("ROUGE and BLEU need two more libraries; run: pip install -e '.[eval]'") from None
    names, ascii_words = ["rouge1", "rouge2", "rougeL"], DefaultTokenizer(use_stemmer=True)

    class Words:
        def tokenize(self, text: str) -> list[str]:
            words = re.findall(f"{UNSPACED}|(?:(?!{UNSPACED})[^\\W_])+", text.lower())
            return [part for word in words for part in (ascii_words.tokenize(word) if word.isascii() else [word])]

    unspaced = len(re.findall(UNSPACED, "".join(references))) > sum(map(len, references)) / 3
    scorer = RougeScorer(names, tokenizer=Words())
    scores = [scorer.score(reference, answer) for answer, reference in zip(answers, references, strict=True)]
    rouge = {name: 100 * sum(score[name].fmeasure for score in scores) / len(scores) for name in names}
    return {**rouge, "bleu": corpus_bleu(answers, [references], tokenize="char" if unspaced else "13a").score}


def to_json(results: dict[str, dict[str, float]]) -> str:
    return json.dumps(results, indent=2)


def table(results: dict[str, dict[str, float]]) -> str:
    width = max(map(len, results))
    lines = []
    for name, values in results.items():
        cells = [
            f"{key} {value:,}" if isinstance(value, int) else f"{key} {value:.4f}" for key, value in values.items()
        ]
        lines.append(f"{name:<{width}}  {'  '.join(cells)}")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
