"""Download a model of the llama architecture from the Hugging Face hub and convert it into a model folder."""

import sys
from pathlib import Path
from typing import Literal

from lit_llama.cli import run
from lit_llama.errors import UserError

from convert_hf_checkpoint import main as convert

OTHERS = ["config.json", "generation_config.json", "tokenizer*", "*tokens*.json", "chat_template.jinja"]
PATTERNS = ["*.safetensors", "*.safetensors.index.json", *OTHERS]
OLD_PATTERNS = ["pytorch_model*.bin", "pytorch_model.bin.index.json", *OTHERS]


def main(
    repo_id: str,
    out_dir: Path | None = None,
    download_dir: Path | None = None,
    revision: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    endpoint: str | None = None,
) -> None:
    """Download, keeping the files of an earlier try that are whole, and convert.

    Args:
        repo_id: The model's name on the hub, for example TinyLlama/TinyLlama-1.1B-Chat-v1.0.
        out_dir: The model folder to write. By default checkpoints/lit-llama/ and the name.
        download_dir: Where the hub's files go, or are already. By default checkpoints/hf/ and the name.
        revision: A branch, tag or commit.
        dtype: The type to store the weights in. By default as they are.
        endpoint: The address of a mirror of the hub.
    """
    name = repo_id.split("/")[-1]
    download_dir = download_dir or Path("checkpoints/hf") / name
    fetch(repo_id, download_dir, revision, endpoint)
    convert(download_dir, out_dir or Path("checkpoints/lit-llama") / name, dtype)
    print(f"The files of the hub are no longer needed: rm -r {download_dir}", file=sys.stderr)


def fetch(repo_id: str, folder: Path, revision: str | None, endpoint: str | None) -> None:
    """Download what a conversion needs: .safetensors, or .bin in an old repository that has no others."""
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError:
        raise UserError("the hub's client is not installed; run: pip install -e '.[hub]'") from None
    try:
        for patterns in (PATTERNS, OLD_PATTERNS):
            snapshot_download(repo_id, revision=revision, local_dir=folder, allow_patterns=patterns, endpoint=endpoint)
            if any(folder.glob(patterns[0])):
                return
    except errors.GatedRepoError:
        raise UserError(
            f"{repo_id} is gated: accept its licence on its page on the hub, then run `hf auth login` and this again"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{repo_id} is not on the hub, or is private: if so, run hf auth login") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{repo_id} has no revision {revision}") from None
    except Exception as error:  # of the client or of a network library beneath it, which differs between versions
        reason = (str(error) or repr(error)).splitlines()[0]
        raise UserError(f"could not download {repo_id} ({reason}); run this again, whole files are kept") from None


if __name__ == "__main__":
    run(main)
