"""Tokenizers that tests train for themselves, and texts that are hard for one."""

import io
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

CORPUS = [
    "Below is an instruction that describes a task, and it's paired with an input.",
    "Write a response that appropriately completes the request; don't you think that we'll need 2048 of them?",
    "def main(path: str) -> None:\n    for i in range(10):\n        print(i, path)\n\n",
    "Le cœur a ses raisons que la raison ne connaît point. Größe, naïve, señor. 你好, 世界。 Привет, мир.",
]
TEXTS = [
    *CORPUS,
    *("", " ", "  ", "a", " leading", "   three", "two  spaces", "trailing  ", "\n", "\n\n\tx\r\n", " \n a", "▁low"),
    *("1", "12", "1234567", "3.14159", "x=10y", "١٢٣", "it's I'M we'LL don't 'tis", "aaaaaaaaa", "ababababab"),
    *(
        "🙂",
        "a🙂b 👩‍👩‍👧 z",
        "你好世界, こんにちは",
        "안녕하세요",
        "e\u0301 ﬁ ① \uff21",
        "\u00a0x\u3000y",
        "\x00\x7f\ufeff",
    ),
    *("<s>", "</s>", "<unk>", "<0x41>", "a <tool> b<tool>c", "<|im_end|>", "say<|eot_id|>now", "<|begin_of_text|>x"),
]


def train_byte_tokenizer() -> HFTokenizer:
    """A byte-level BPE as GPT-2's, with few merges."""
    tokenizer = HFTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["below is an instruction that describes a task"] * 4, trainer)
    return tokenizer


def train_sentencepiece(path: Path, **settings: Any) -> SentencePieceProcessor:
    """A SentencePiece model as LLaMA's: BPE, bytes for what is unknown, text as it is."""
    model = io.BytesIO()
    defaults = {"model_type": "bpe", "vocab_size": 420, "byte_fallback": True, "normalization_rule_name": "identity"}
    defaults |= {"remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True, "split_digits": True}
    defaults |= {"character_coverage": 0.98, "user_defined_symbols": ["<tool>", "  "], "num_threads": 1}
    SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in CORPUS for line in text.splitlines()),
        model_writer=model,
        minloglevel=2,
        **(defaults | settings),
    )
    path.write_bytes(model.getvalue())
    return SentencePieceProcessor(model_proto=model.getvalue())
