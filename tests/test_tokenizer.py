import io
import pickle
from pathlib import Path

from lit_llama.errors import UserError
from lit_llama.tokenizer import Tokenizer, find_tokenizer

import pytest
import sentencepiece
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import processors

TEXTS = ["Hello, world", "  two  spaces ", "naïve café, 東京 and 🙂🙃", "x = [1, 2]\n\ty += 10", ""]


@pytest.fixture(scope="session")
def sentencepiece_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tokenizer.model built as LLaMA's is: byte fallback, no normalisation, bos and eos."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["hello world, this is a text of some words"] * 20),
        model_writer=model,
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("sp") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(params=["sentencepiece", "huggingface"])
def tokenizer(request: pytest.FixtureRequest, sentencepiece_file: Path, model_folder: Path) -> Tokenizer:
    return Tokenizer(sentencepiece_file if request.param == "sentencepiece" else model_folder / "tokenizer.json")


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_gives_the_text_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, eos=True)) == text


@pytest.mark.parametrize("text", TEXTS)
def test_a_stream_says_the_same_in_whole_characters(tokenizer: Tokenizer, text: str) -> None:
    pieces = list(tokenizer.stream(tokenizer.encode(text)))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > 1 or len(text) < 2


def test_a_stream_that_ends_within_a_character_shows_no_garbage(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("so 🙂")
    assert "".join(tokenizer.stream(ids[:-1])) == "so "


def test_a_stream_after_other_text_keeps_its_leading_space(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("hello world")
    head = tokenizer.encode("hello")
    assert ids[: len(head)] == head
    assert "".join(tokenizer.stream(ids[len(head) :], after=head)) == " world"


def test_another_process_gets_the_same(tokenizer: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    for text in (*TEXTS, "<|im_end|>", "</s>"):
        assert copy.encode(text, eos=True) == tokenizer.encode(text, eos=True)


def test_sentencepiece_has_bos_and_eos(sentencepiece_file: Path) -> None:
    tokenizer = Tokenizer(sentencepiece_file)
    plain = tokenizer.encode("hello", bos=False)
    assert tokenizer.encode("hello", eos=True) == [1, *plain, 2]
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)


def test_huggingface_uses_bos_only_if_the_tokenizer_itself_does(tmp_path: Path, byte_tokenizer: HFTokenizer) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(byte_tokenizer.to_str())
    assert Tokenizer(path).bos_id is None
    with_bos = HFTokenizer.from_str(byte_tokenizer.to_str())
    with_bos.post_processor = processors.TemplateProcessing("<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    path.write_text(with_bos.to_str())
    tokenizer = Tokenizer(path)
    assert tokenizer.encode("a") == [0, *tokenizer.encode("a", bos=False)]


def test_eos_is_what_the_tokenizer_config_says(tmp_path: Path, byte_tokenizer: HFTokenizer) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(byte_tokenizer.to_str())
    assert Tokenizer(path).eos_id == 1  # <|im_end|>
    for eos in ('"<|endoftext|>"', '{"content": "<|endoftext|>"}'):
        (tmp_path / "tokenizer_config.json").write_text(f'{{"eos_token": {eos}}}')
        assert Tokenizer(path).eos_id == 0
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<nothing>"}')
    with pytest.raises(UserError, match="<nothing>"):
        Tokenizer(path)


def test_it_is_found_beside_the_checkpoint_or_one_folder_up(tmp_path: Path, byte_tokenizer: HFTokenizer) -> None:
    checkpoint = tmp_path / "models" / "7B" / "lit-llama.pth"
    checkpoint.parent.mkdir(parents=True)
    with pytest.raises(UserError, match=r"7B/lit-llama\.pth does not exist"):
        find_tokenizer(checkpoint)
    checkpoint.touch()
    with pytest.raises(UserError, match=r"in .*/models/7B; .* --tokenizer_path"):
        find_tokenizer(checkpoint)
    up = tmp_path / "models" / "tokenizer.json"
    up.write_text(byte_tokenizer.to_str())
    assert find_tokenizer(checkpoint).path == up
    beside = checkpoint.with_name("tokenizer.json")
    beside.write_text(byte_tokenizer.to_str())
    assert find_tokenizer(checkpoint).path == beside
    assert find_tokenizer(checkpoint, up.parent).path == up
    assert find_tokenizer(checkpoint, up).path == up


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_truncated_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"version": "1.0", "trunc')
    with pytest.raises(UserError, match=name):
        Tokenizer(tmp_path / name)
