"""Losses by which a model is judged, summed in float64."""

import math

from lit_llama.data.batches import Dataset, single_step
from lit_llama.errors import UserError
from lit_llama.model import LLaMA
from lit_llama.progress import progress
from lit_llama.tokenizer import Tokenizer

import torch
from torch import Tensor
from torch.nn import functional as F


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
