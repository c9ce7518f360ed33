import io
import json
import pickle
import shutil
from pathlib import Path

from lit_llama.errors import UserError
from lit_llama.tokenizer import Tokenizer, find_tokenizer

import pytest
import sentencepiece
from export_hf import from_sentencepiece
from tokenizer_files import report_missing
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import models, normalizers, pre_tokenizers, processors

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


def write(folder: Path, **files: dict) -> None:
    for name, fields in files.items():
        (folder / f"{name}.json").write_text(json.dumps(fields))


def with_template(tokenizer: HFTokenizer, template: str) -> str:
    """A tokenizer.json whose post-processor puts control tokens around a text."""
    copy = HFTokenizer.from_str(tokenizer.to_str())
    special = [(token, copy.token_to_id(token)) for token in template.split() if token != "$A"]
    copy.post_processor = processors.TemplateProcessing(template, special_tokens=special)
    return copy.to_str()


def test_the_bos_of_a_template_is_known_though_plain_text_has_none(tmp_path: Path, byte_tokenizer: HFTokenizer) -> None:
    (tmp_path / "tokenizer.json").write_text(byte_tokenizer.to_str())
    write(tmp_path, tokenizer_config={"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "[PAD]"})
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.bos_id is None
    assert tokenizer.names == {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}  # there is no [PAD]


def test_a_bos_is_what_comes_before_the_text(tmp_path: Path, byte_tokenizer: HFTokenizer) -> None:
    path = tmp_path / "tokenizer.json"
    for template, bos_id in (("$A <|im_end|>", None), ("<|endoftext|> $A <|im_end|>", 0)):
        path.write_text(with_template(byte_tokenizer, template))
        assert Tokenizer(path).bos_id == bos_id


def test_add_bos_token_is_read_for_sentencepiece(tmp_path: Path, sentencepiece_file: Path) -> None:
    shutil.copy(sentencepiece_file, tmp_path)
    write(tmp_path, tokenizer_config={"add_bos_token": False})
    tokenizer = Tokenizer(tmp_path / "tokenizer.model")
    assert tokenizer.bos_id is None
    assert tokenizer.names["bos_token"] == "<s>"


@pytest.mark.parametrize("kind", ["tokenizer_config", "special_tokens_map"])
@pytest.mark.parametrize(
    "value", ["<|endoftext|>", {"content": "<|endoftext|>", "special": True}], ids=["text", "dict"]
)
def test_the_eos_is_read_from_either_file(
    tmp_path: Path, byte_tokenizer: HFTokenizer, kind: str, value: str | dict
) -> None:
    (tmp_path / "tokenizer.json").write_text(byte_tokenizer.to_str())
    write(tmp_path, **{kind: {"eos_token": value}})
    assert Tokenizer(tmp_path / "tokenizer.json").eos_id == 0


def test_the_older_map_goes_before_unless_the_config_lists_the_added_tokens(
    tmp_path: Path, byte_tokenizer: HFTokenizer
) -> None:
    (tmp_path / "tokenizer.json").write_text(byte_tokenizer.to_str())
    config = {"eos_token": "<|im_end|>"}
    write(tmp_path, special_tokens_map={"eos_token": "<|endoftext|>"}, tokenizer_config=config)
    assert Tokenizer(tmp_path / "tokenizer.json").eos_id == 0
    config["added_tokens_decoder"] = {"1": {"content": "<|im_end|>", "special": True}}
    write(tmp_path, tokenizer_config=config)
    assert Tokenizer(tmp_path / "tokenizer.json").eos_id == 1


def test_every_end_that_the_model_names_ends_an_answer(tmp_path: Path, byte_tokenizer: HFTokenizer) -> None:
    (tmp_path / "tokenizer.json").write_text(byte_tokenizer.to_str())
    write(tmp_path, config={"eos_token_id": 7}, generation_config={"eos_token_id": [0, 5, 10**6]})
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    assert (tokenizer.eos_id, tokenizer.end_ids) == (1, {0, 1, 5, 7})
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, content in tokenizer.files().items():
        (copy / name).write_bytes(content)
    assert Tokenizer(copy / "tokenizer.json").end_ids == {0, 1, 5, 7}


ADDED = ("<|im_start|>", "[call]")


def added_files(n: int) -> list[dict[str, dict]]:
    """The two ways in which a folder lists tokens that were added, the first of them special."""
    decoder = {str(n + i): {"content": text, "special": not i} for i, text in enumerate(ADDED)}
    older = {"added_tokens": {text: n + i for i, text in enumerate(ADDED)}}
    return [
        {"tokenizer_config": {"added_tokens_decoder": decoder, "eos_token": ADDED[0]}},
        {**older, "special_tokens_map": {"eos_token": ADDED[0]}},
    ]


@pytest.mark.parametrize("way", [0, 1], ids=["decoder", "added_tokens.json"])
def test_added_tokens_come_with_both_kinds(tokenizer: Tokenizer, tmp_path: Path, way: int) -> None:
    n = tokenizer.vocab_size
    shutil.copy(tokenizer.path, tmp_path)
    write(tmp_path, **added_files(n)[way])
    ours = Tokenizer(tmp_path / tokenizer.path.name)
    assert (ours.vocab_size, ours.eos_id) == (n + 2, n)
    assert n in ours.controls.values()
    assert n + 1 not in ours.controls.values()
    for text in (*TEXTS, ADDED[0]):  # a control token's name in a text stays text
        assert ours.encode(text, bos=False) == tokenizer.encode(text, bos=False)
    assert ours.encode("say[call]", bos=False)[-1] == n + 1
    assert ours.decode([*tokenizer.encode("say", bos=False), n + 1, n]) == "say[call]"
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, content in ours.files().items():
        (copy / name).write_bytes(content)
    again = Tokenizer(copy / tokenizer.path.name)
    assert (again.vocab_size, again.eos_id) == (n + 2, n)
    assert pickle.loads(pickle.dumps(ours)).vocab_size == n + 2


def test_files_with_added_tokens_do_not_depend_on_what_was_encoded_before(tmp_path: Path) -> None:
    hf = HFTokenizer(models.BPE({"<unk>": 0, "</s>": 1, "a": 2}, [], unk_token="<unk>"))
    hf.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    hf.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, **added_files(3)[0])
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    before = tokenizer.files()
    tokenizer.encode("a", within=True)
    assert tokenizer.files() == before


def test_an_added_token_with_a_number_that_it_cannot_have_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    shutil.copy(tokenizer.path, tmp_path)
    for number in (tokenizer.vocab_size + 5, 3):
        write(tmp_path, tokenizer_config={"added_tokens_decoder": {str(number): {"content": "<new>"}}})
        with pytest.raises(UserError, match=rf"<new>.* is number {number}"):
            Tokenizer(tmp_path / tokenizer.path.name)
    n = str(tokenizer.vocab_size)
    decoders = (
        {"x": {"content": "a"}},
        {"5": 7},
        [1],
        {n: {"content": ""}},
        {n: {"content": "\ud800"}},
        {n: {"content": 5}},
    )
    for wrong in (*({"added_tokens_decoder": decoder} for decoder in decoders), {"additional_special_tokens": 5}):
        write(tmp_path, tokenizer_config=wrong)
        with pytest.raises(UserError, match=r"tokenizer_config\.json"):
            Tokenizer(tmp_path / tokenizer.path.name)
    (tmp_path / "tokenizer_config.json").unlink()
    for wrong in ({"a": [1]}, {"<new>": "x"}, {"<new>": None}):
        write(tmp_path, added_tokens=wrong)
        with pytest.raises(UserError, match=r"tokenizer_config\.json"):
            Tokenizer(tmp_path / tokenizer.path.name)


def test_of_two_files_the_one_with_the_added_tokens_is_taken(tmp_path: Path, sentencepiece_file: Path) -> None:
    for name, content in from_sentencepiece(Tokenizer(sentencepiece_file)).items():
        (tmp_path / name).write_text(content)
    shutil.copy(sentencepiece_file, tmp_path)
    assert find_tokenizer(tmp_path, tmp_path).path.name == "tokenizer.model"  # they are the same
    first = HFTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    first.pre_tokenizer, kept = pre_tokenizers.Metaspace(prepend_scheme="first", split=False), first.to_str()
    first.normalizer = normalizers.Sequence([])
    first.save(str(tmp_path / "tokenizer.json"))
    assert find_tokenizer(tmp_path, tmp_path).path.name == "tokenizer.json"  # as transformers, of "legacy": false
    (tmp_path / "tokenizer.json").write_text(kept)
    more = HFTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    more.add_special_tokens(["<|im_start|>"])
    more.save(str(tmp_path / "tokenizer.json"))
    assert find_tokenizer(tmp_path, tmp_path).control_id("<|im_start|>") == more.get_vocab_size() - 1
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")  # tiktoken's format, as Llama 3 has it
    assert find_tokenizer(tmp_path, tmp_path).path.name == "tokenizer.json"


def test_a_pad_token_without_a_row_is_no_harm_and_others_are(
    tmp_path: Path, byte_tokenizer: HFTokenizer, capsys: pytest.CaptureFixture
) -> None:
    more = HFTokenizer.from_str(byte_tokenizer.to_str())
    n = more.get_vocab_size()
    more.add_special_tokens(["[PAD]"])
    more.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    tokenizer.check_fits(n)
    report_missing(tmp_path, n)
    assert "[PAD]" in capsys.readouterr().err
    with pytest.raises(UserError, match="its own tokenizer"):
        tokenizer.check_fits(n - 1)
    write(tmp_path, tokenizer_config={"eos_token": "[PAD]"})
    with pytest.raises(UserError, match="its own tokenizer"):
        Tokenizer(tmp_path / "tokenizer.json").check_fits(n)


def test_sentencepiece_shows_spaces_and_whole_characters(sentencepiece_file: Path) -> None:
    tokenizer = Tokenizer(sentencepiece_file)
    text = "this is 🍎 a text"
    ids = tokenizer.encode(text, eos=True)
    assert tokenizer.show(ids) == f"<s>{text}</s>"
    assert tokenizer.show(ids[:3]) + tokenizer.show(ids[3:]) == f"<s>{text}</s>"


def test_a_replacement_character_that_was_meant_is_printed(tokenizer: Tokenizer) -> None:
    for text in ("so \ufffd", "\ufffd", "x\ufffd\ufffd"):
        assert "".join(tokenizer.stream(tokenizer.encode(text))) == text
