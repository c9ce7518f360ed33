"""The hub's own client against a server on this machine that speaks as the hub does."""

import json
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from lit_llama.formats.huggingface import hf_config
from lit_llama.model_folder import load_model

import pytest
import torch
from builders import TINY, run_script
from transformers import LlamaConfig, LlamaForCausalLM

SHA = "0" * 40


@dataclass
class Hub:
    """One repository, tiny/llama."""

    folder: Path
    gated: bool = False
    broken: bool = False  # no more than half of a file of weights comes through
    ranges: list[str] = field(default_factory=list)  # what was asked to be resumed
    sent: list[str] = field(default_factory=list)

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = urlsplit(request.path).path
        if not path.startswith(("/api/models/tiny/llama/", "/tiny/llama/")):
            return self.reply(request, 404, b"", {"X-Error-Code": "RepoNotFound"})
        files = sorted(p.name for p in self.folder.iterdir())
        if "/revision/" in path:
            return self.reply(request, 200, json.dumps({"id": "tiny/llama", "sha": SHA}).encode())
        if "/tree/" in path:
            rows = [{"type": "file", "path": n, "size": (self.folder / n).stat().st_size, "oid": n} for n in files]
            return self.reply(request, 200, json.dumps(rows).encode())
        if self.gated:
            return self.reply(request, 403, b"", {"X-Error-Code": "GatedRepo"})
        return self.send_file(request, path.rsplit("/", 1)[1])

    def send_file(self, request: BaseHTTPRequestHandler, name: str) -> None:
        content, headers = (self.folder / name).read_bytes(), {"ETag": f'"{name}"', "X-Repo-Commit": SHA}
        if start := request.headers.get("Range"):
            self.ranges.append(start)
            begin = int(start.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
            rest = content[begin:]
            return self.reply(request, 206, b"" if self.broken else rest, headers, length=len(rest))
        if request.command == "GET":
            self.sent.append(name)
        if name.endswith(".safetensors") and request.command == "GET" and self.broken:
            return self.reply(request, 200, content[: len(content) // 2], headers, length=len(content))
        return self.reply(request, 200, content, headers)

    @staticmethod
    def reply(
        request: BaseHTTPRequestHandler,
        status: int,
        content: bytes,
        headers: dict[str, str] | None = None,
        length: int | None = None,
    ) -> None:
        request.send_response(status)
        for name, value in (headers or {}).items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(content) if length is None else length))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(content)


@pytest.fixture
def hub(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Weights in .safetensors and .bin, a tokenizer, and a file that nobody needs."""
    folder = tmp_path / "hub"
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**hf_config(TINY, torch.float32)))
    model.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((model_folder / name).read_bytes())
    (folder / "special_tokens_map.json").write_text("{}")
    (folder / "README.md").write_text("hello")
    hub = Hub(folder)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hub.answer(self)

        def do_HEAD(self) -> None:
            hub.answer(self)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.chdir(tmp_path)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    yield hub
    server.shutdown()
    server.server_close()


def call(hub: Hub, repo_id: str = "tiny/llama", *more: str) -> str | None:
    return run_script("download", "--repo_id", repo_id, "--endpoint", hub.address, *more)


def test_it_fetches_what_it_needs_and_converts_it(hub: Hub, tmp_path: Path) -> None:
    assert call(hub) is None
    assert sorted(hub.sent) == [
        *("config.json", "generation_config.json", "model.safetensors"),
        *("special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"),
    ]
    folder = tmp_path / "checkpoints" / "lit-llama" / "llama"
    assert load_model(folder / "lit-llama.pth").config == TINY
    assert (folder / "tokenizer.json").is_file()


def test_an_old_repository_without_safetensors(hub: Hub, tmp_path: Path) -> None:
    (hub.folder / "model.safetensors").unlink()
    assert call(hub, "tiny/llama", "--out_dir", str(tmp_path / "out")) is None
    assert "pytorch_model.bin" in hub.sent
    assert load_model(tmp_path / "out" / "lit-llama.pth").config == TINY


def test_a_broken_download_goes_on_where_it_stopped(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1024)  # what is written at once
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.broken = True
    message = str(call(hub))
    assert "run this again" in message
    assert "\n" not in message
    assert not (tmp_path / "checkpoints" / "lit-llama").exists()
    half = (hub.folder / "model.safetensors").stat().st_size // 2
    assert (
        hub.ranges[0] == f"bytes={half // 1024 * 1024}-"
    )  # the client tries for the rest of the file before it gives up
    hub.broken = False
    hub.sent.clear()
    assert call(hub) is None
    assert hub.sent == ["model.safetensors"]  # the files that were whole are kept
    assert load_model(tmp_path / "checkpoints" / "lit-llama" / "llama" / "lit-llama.pth").config == TINY


def test_gated_and_unknown_models_are_told_apart(hub: Hub, tmp_path: Path) -> None:
    assert "tiny/other is not on the hub" in str(call(hub, "tiny/other"))
    hub.gated = True
    message = str(call(hub))
    assert "accept its licence" in message
    assert "hf auth login" in message
    assert "\n" not in message
    assert not (tmp_path / "checkpoints" / "lit-llama").exists()


def test_without_the_client_it_says_how_to_get_it(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert ".[hub]" in str(call(hub))
