"""Figures of scripts/evaluate.py against transformers, against the libraries' own, and against the training's."""

import json
import math
from pathlib import Path

from lit_llama.adapter import AdapterConfig, adapter_state_dict, add_adapter
from lit_llama.data.batches import Dataset
from lit_llama.formats.huggingface import hf_config, to_hf
from lit_llama.generation import Sampling, generate
from lit_llama.lora import LoRAConfig, add_lora, lora_state_dict
from lit_llama.tokenizer import Tokenizer
from lit_llama.training.run import validation_loss

import evaluate
import pytest
import sacrebleu
import torch
from builders import TINY, random_model, randomize, run_script, save_file
from lightning import Fabric
from rouge_score import rouge_scorer
from transformers import LlamaConfig, LlamaForCausalLM

TEXT = "Below is an instruction that describes a task.\n\nCount: 1, 2, 3, 4. Größe, 日本.\n" * 4


def evaluated(capsys: pytest.CaptureFixture, *arguments: object) -> dict:
    capsys.readouterr()
    assert run_script("evaluate", *arguments, "--json", "true") is None
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.mark.parametrize("max_blocks", [None, 3])
@torch.no_grad()
def test_perplexity_is_that_of_transformers(
    max_blocks: int | None, text: Path, checkpoint: Path, capsys: pytest.CaptureFixture
) -> None:
    hf = LlamaForCausalLM(LlamaConfig(**hf_config(TINY, torch.float32)))
    hf.load_state_dict(to_hf(random_model(TINY).state_dict(), TINY))
    ids = torch.tensor([Tokenizer(checkpoint.with_name("tokenizer.json")).encode(TEXT)])
    losses, count = 0.0, 0
    for start in range(0, ids.size(1), 50)[:max_blocks]:
        block = ids[:, start : start + 50]
        losses += hf(block, labels=block).loss.item() * (block.size(1) - 1)
        count += block.size(1) - 1
    limit = () if max_blocks is None else ("--max_blocks", max_blocks)
    found = evaluated(capsys, "--checkpoint_path", checkpoint, "--text", text, "--block_size", 50, *limit)
    assert found[f"text {text}"]["tokens"] == count
    assert found[f"text {text}"]["perplexity"] == pytest.approx(math.exp(losses / count), rel=1e-5)


def test_loss_of_responses_is_that_of_the_training(
    data_dir: Path, checkpoint: Path, capsys: pytest.CaptureFixture
) -> None:
    dataset = Dataset(data_dir, "validation", 128)
    expected = validation_loss(Fabric(accelerator="cpu", devices=1), random_model(TINY), dataset, 2)
    found = evaluated(capsys, "--checkpoint_path", checkpoint, "--data_dir", data_dir, "--batch_size", 2)["responses"]
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)
    assert found["records"] == len(dataset) == 3
    assert found["tokens"] == dataset.n_targets(range(3))


ANSWERS = ["The cat sat on the mat.", "A llama runs quickly over hills", "nothing alike"]
REFERENCES = ["The cat is sitting on the mat.", "Llamas run over the hills, quickly", "Paris"]


@pytest.mark.parametrize(
    ("answer", "reference", "rouge", "bleu"),
    [
        ("Ваш счёт готов к оплате сегодня", "Ваш счёт готов к оплате завтра", 100 * 5 / 6, (60, 80)),
        ("您的账单已经准备好了", "您的账单已经准备好了", 100, (100, 100)),
        ("您的账单", "我的账单", 75, (0, 75)),
        ("Fön über Öl", "Fün äber Ül", 0, (0, 0)),
        ("Über dem Fluss liegt Nebel", "Über dem Fluss liegt Nebel", 100, (100, 100)),
    ],
)
def test_words_of_every_script_count(answer: str, reference: str, rouge: float, bleu: tuple[float, float]) -> None:
    found = evaluate.rouge_and_bleu([answer], [reference])
    assert found["rouge1"] == pytest.approx(rouge)
    assert bleu[0] - 1e-6 <= found["bleu"] <= bleu[1] + 1e-6


def test_rouge_and_bleu_are_those_of_the_libraries() -> None:
    found = evaluate.rouge_and_bleu(ANSWERS, REFERENCES)
    assert found["bleu"] == sacrebleu.BLEU().corpus_score(ANSWERS, [REFERENCES]).score
    for name in ("rouge1", "rouge2", "rougeL"):
        scorer = rouge_scorer.RougeScorer([name], use_stemmer=True)
        scores = [
            scorer.score(target, prediction)[name] for target, prediction in zip(REFERENCES, ANSWERS, strict=True)
        ]
        assert found[name] == pytest.approx(100 * sum(score.fmeasure for score in scores) / 3)
    assert found["rouge1"] > found["rougeL"] > found["rouge2"] > 0 < found["bleu"]
    same = evaluate.rouge_and_bleu(REFERENCES[:2], REFERENCES[:2])
    assert [same[name] for name in ("rouge1", "rouge2", "rougeL", "bleu")] == pytest.approx([100.0] * 4)


def test_answers_are_scored_as_given_one_by_one(
    data_dir: Path, checkpoint: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts are those of the data, references what was to be learned, and batching changes no answer."""
    seen: list[tuple[list[str], list[str]]] = []
    scores = evaluate.rouge_and_bleu
    monkeypatch.setattr(evaluate, "rouge_and_bleu", lambda *texts: (seen.append(texts), scores(*texts))[1])
    common = ("--checkpoint_path", checkpoint, "--data_dir", data_dir, "--split", "train", "--max_new_tokens", 20)
    found = evaluated(capsys, *common, "--n_answers", 7, "--batch_size", 3)["answers"]
    dataset, tokenizer = Dataset(data_dir, "train", 128), Tokenizer(checkpoint.with_name("tokenizer.json"))
    model = random_model(TINY)
    prompts = [f"Count to {n}" + ("" if n % 3 else "\naloud") for n in range(1, 8)]
    asked = [evaluate.last_answer(dataset, i)[0] for i in range(7)]
    assert list(map(tokenizer.decode, asked)) == prompts
    answers = [tokenizer.decode(list(generate(model, ids, Sampling(20, 0), {tokenizer.eos_id}))) for ids in asked]
    assert seen[1:] == [(answers, [" ".join(map(str, range(1, n + 1))) for n in range(1, 8)])]
    assert found["records"] == 7
    assert found["tokens_per_second"] > 0


def test_each_method_is_evaluated_with_its_own_weights(
    data_dir: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    lora, adapter = LoRAConfig(4, 8, 0.1), AdapterConfig(4, 0)
    losses = []
    for kind in (None, "lora", "adapter"):
        model = random_model(TINY)
        if kind == "lora":
            add_lora(model, lora)
            state = lora_state_dict(model)
        elif kind == "adapter":
            add_adapter(model, adapter)
            state = adapter_state_dict(model)
        flags: tuple[object, ...] = ()
        if kind:
            randomize(state, std=0.7)
            config = lora if kind == "lora" else adapter
            save_file(tmp_path / kind, config, model, state, "plain")
            flags = (f"--{kind}_path", tmp_path / kind)
        fabric, dataset = Fabric(accelerator="cpu", devices=1), Dataset(data_dir, "validation", 128)
        expected = validation_loss(fabric, model, dataset, 3)
        found = evaluated(capsys, "--checkpoint_path", checkpoint, "--data_dir", data_dir, *flags)["responses"]["loss"]
        assert found == pytest.approx(expected, rel=1e-4)
        losses.append(found)
    assert len({round(loss, 2) for loss in losses}) == 3


@pytest.mark.slow
def test_a_known_corpus_comes_from_the_datasets_library(
    text: Path, tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library itself, on a file of this machine in the place of wikitext."""
    arguments = {"path": "text", "data_files": {"test": str(text)}, "split": "test", "cache_dir": str(tmp_path)}
    monkeypatch.setitem(evaluate.CORPORA, "wikitext", (arguments, "text", "\n"))
    common = ("--checkpoint_path", checkpoint, "--block_size", 30, "--max_blocks", 4)
    found = evaluated(capsys, *common, "--text", "wikitext", text)
    assert found["text wikitext"] == found[f"text {text}"]


def test_the_table_has_all_figures(text: Path, data_dir: Path, checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ("--checkpoint_path", checkpoint, "--text", text, "--data_dir", data_dir, "--n_answers", 2)
    assert run_script("evaluate", *arguments, "--max_new_tokens", 5) is None
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == [f"text {text}", "responses", "answers"]
    assert all(word in lines[1] for word in ("loss ", "perplexity ", "records 3"))
    assert all(word in lines[2] for word in ("rougeL ", "bleu ", "records 2"))


def test_what_cannot_be_evaluated_ends_in_one_line(
    text: Path, checkpoint: Path, data_dir: Path, tmp_path: Path
) -> None:
    binary, empty = tmp_path / "binary", tmp_path / "empty"
    binary.write_bytes(b"\xff\xfe\x00")
    empty.write_text("")
    for flags, words in (
        ((), "--text"),
        (("--text", "no.txt"), "no.txt"),
        (("--text", binary), "UTF-8"),
        (("--text", empty), "two tokens"),
        (("--data_dir", tmp_path), "prepare_"),
        (("--text", text, "--lora_path", checkpoint), "finetune_lora.py"),
        (("--data_dir", data_dir, "--n_answers", 1, "--max_new_tokens", 500), "lower --max_new_tokens"),
    ):
        message = str(run_script("evaluate", "--checkpoint_path", checkpoint, *flags))
        assert message.startswith("error: ")
        assert words in message
        assert "\n" not in message
