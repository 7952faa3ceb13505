"""Fetching from the hub, played by a server on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import reference

from llmc import hub, loading
from llmc.errors import ConfigError, DownloadError, LlmcError, MissingDependencyError
from llmc.gpt2 import GPT2, PRESETS

ROOT = Path(hub.__file__).resolve().parent.parent
COMMITS = {
    "owner/model": "a" * 40,
    "owner/sharded": "b" * 40,
    "owner/pickled": "c" * 40,
    "openai-community/gpt2": "d" * 40,
}


class Hub(ThreadingHTTPServer):
    """What downloads need of the hub's interface: HEAD and GET of /owner/model/resolve/revision/file."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.log: list[tuple[str, str, str]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def fetched(self) -> list[str]:
        return sorted({file for method, _, file in self.log if method == "GET"})


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        if len(parts) < 5 or parts[2] != "resolve":
            return self.answer(404)
        name, revision, file = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
        self.server.log.append((self.command, name, file))
        if name == "owner/gated":
            return self.answer(403, X_Error_Code="GatedRepo")
        if name not in self.server.files:
            return self.answer(404, X_Error_Code="RepoNotFound")
        if revision not in ("main", COMMITS[name]):
            return self.answer(404, X_Error_Code="RevisionNotFound")
        if file not in self.server.files[name]:
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMITS[name])
        body = self.server.files[name][file]
        etag = hashlib.sha256(name.encode() + body).hexdigest()
        self.answer(200, body, ETag=f'"{etag}"', X_Repo_Commit=COMMITS[name], Accept_Ranges="bytes")

    do_HEAD = do_GET


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """Repositories by name: the files in each."""
    folder = tmp_path_factory.mktemp("models")
    model = GPT2(PRESETS["tiny"], reference)
    model.initialise(5)
    loading.save(model, folder / "model", "bytes")
    files = {path.name: path.read_bytes() for path in (folder / "model").iterdir()}
    noise = {
        "README.md": b"#", "pytorch_model.bin": b"\x80pickle", "tf_model.h5": b"h5",
        "onnx/model.safetensors": b"x", "other.safetensors": b"x", "vocab.json": b"{}", "merges.txt": b"#",
        "tokenizer.model": b"m", "chat_template.jinja": b"j", "generation_config.json": b"[]",
    }  # fmt: skip
    sharded = {"config.json": files["config.json"], "half-1.safetensors": files["model.safetensors"]}
    length = int.from_bytes(files["model.safetensors"][:8], "little")
    names = json.loads(files["model.safetensors"][8 : 8 + length]).keys() - {"__metadata__"}
    index = {"weight_map": dict.fromkeys(names, "half-1.safetensors")}
    sharded["model.safetensors.index.json"] = json.dumps(index).encode()
    return {
        "owner/model": files | noise,
        "openai-community/gpt2": files,
        "owner/sharded": sharded,
        "owner/pickled": {"config.json": files["config.json"], "pytorch_model.bin": b"\x80pickle"},
    }


@pytest.fixture
def server(
    models: dict[str, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Hub]:
    constants = pytest.importorskip("huggingface_hub.constants")
    hub_server = Hub()
    hub_server.files = {name: dict(files) for name, files in models.items()}
    monkeypatch.setenv("HF_ENDPOINT", hub_server.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    thread = threading.Thread(target=hub_server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub_server
    finally:
        hub_server.shutdown()
        hub_server.server_close()
        thread.join()


def closed_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_only_what_matters_is_fetched(server: Hub) -> None:
    folder = hub.fetch("owner/model")
    matters = [
        "chat_template.jinja", "config.json", "generation_config.json", "merges.txt", "model.safetensors",
        "tokenizer.model", "vocab.json",
    ]  # fmt: skip
    assert sorted(path.name for path in folder.iterdir()) == server.fetched() == matters
    assert (folder / "model.safetensors").read_bytes() == server.files["owner/model"]["model.safetensors"]


def test_a_configuration_without_its_weights(server: Hub) -> None:
    """And a later `fetch` brings them."""
    assert loading.read_config("owner/model") == PRESETS["tiny"]
    assert {path.name for path in hub.fetch("owner/model", weights=False).iterdir()} == {"config.json"}
    assert (hub.fetch("owner/model") / "model.safetensors").exists()


@pytest.mark.parametrize("source", ["owner/model", "owner/sharded", "gpt2"])
def test_load_by_name(server: Hub, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = loading.load(source, ops=reference)
    expected = GPT2(PRESETS["tiny"], reference)
    expected.initialise(5)
    for row, array in expected.params:
        np.testing.assert_array_equal(model.params[row.name], array, err_msg=row.name)
    assert model.tokenizer.name == "bytes"


@pytest.mark.parametrize("source", ["owner/model", "owner/sharded"])
def test_the_cache_serves_without_a_network(
    server: Hub, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = hub.fetch(source)
    server.log.clear()
    hub.fetch(source)
    assert server.fetched() == []  # a second time, nothing is downloaded
    monkeypatch.setenv("HF_ENDPOINT", closed_port())
    assert hub.fetch(source) == folder
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert hub.fetch(source) == folder


def test_offline_and_not_cached(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError, match="owner/model: .*cannot be reached, and there is") as caught:
        hub.fetch("owner/model")
    assert "\n" not in str(caught.value)
    assert server.log == []


def test_half_a_copy_and_no_network(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = hub.fetch("owner/sharded")
    (folder / "half-1.safetensors").unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError, match="half-1.safetensors: .*cannot be reached"):
        hub.fetch("owner/sharded")


def test_no_network_is_told_from_not_found(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DownloadError, match="owner/missing: not found on the hub"):
        hub.fetch("owner/missing")
    with pytest.raises(DownloadError, match="owner/gated: the hub asks for permission"):
        hub.fetch("owner/gated")
    with pytest.raises(DownloadError, match="no revision 'other'"):
        hub.fetch("owner/model", revision="other")
    monkeypatch.setenv("HF_ENDPOINT", closed_port())
    before = time.monotonic()
    with pytest.raises(DownloadError, match="cannot be reached.*refused") as caught:
        hub.fetch("owner/model")
    assert time.monotonic() - before < 5, "the library's attempts over half a minute are not waited for"
    assert "not found" not in str(caught.value) and "\n" not in str(caught.value)


def test_pickles_are_not_fetched(server: Hub) -> None:
    with pytest.raises(DownloadError, match="model.safetensors: the model on the hub has no such file"):
        hub.fetch("owner/pickled")
    assert server.fetched() == ["config.json"]


@pytest.mark.parametrize("place", ["../../evil.safetensors", "/etc/passwd", "pytorch_model.bin", 3])
def test_an_index_reaches_no_other_files(server: Hub, place: object) -> None:
    index = json.dumps({"weight_map": {"wte.weight": place}}).encode()
    server.files["owner/sharded"]["model.safetensors.index.json"] = index
    with pytest.raises(DownloadError, match="is not the plain name"):
        hub.fetch("owner/sharded")
    server.files["owner/sharded"]["model.safetensors.index.json"] = b"nonsense"
    shutil.rmtree(Path(str(sys.modules["huggingface_hub.constants"].HF_HUB_CACHE)))  # type: ignore[attr-defined]
    with pytest.raises(DownloadError, match="is not an index"):
        hub.fetch("owner/sharded")


def test_a_download_that_breaks_off(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = Handler.answer

    def short(self: Handler, status: int, body: bytes = b"", **headers: str) -> None:
        if self.command == "GET" and self.path.endswith(".safetensors"):
            self.close_connection = True
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[:100])
        else:
            answer(self, status, body, **headers)

    monkeypatch.setattr(Handler, "answer", short)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    with pytest.raises(DownloadError, match="owner/model: model.safetensors: the download failed"):
        hub.fetch("owner/model")
    monkeypatch.setattr(Handler, "answer", answer)
    folder = hub.fetch("owner/model")  # the broken half is not taken for the file
    assert (folder / "model.safetensors").read_bytes() == server.files["owner/model"]["model.safetensors"]


@pytest.mark.parametrize("name", ["", "a/b/c", "../x", "/x", "a b", "owner/", "owner/mo\ndel", "-x/y"])
def test_names(name: str) -> None:
    with pytest.raises(ConfigError, match="not a model name"):
        hub.fetch(name)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingDependencyError, match="pip install huggingface_hub"):
        hub.fetch("owner/model")


def test_a_fresh_process_obeys_the_environment(server: Hub, tmp_path: Path) -> None:
    """HF_ENDPOINT and HF_HOME as a user sets them, no test's hand inside."""
    environment = os.environ | {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home")}
    program = "import sys; sys.path[:0] = sys.argv[1:]; from llmc import hub; print(hub.fetch('owner/model'))"
    command = [sys.executable, "-c", program, str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=tmp_path)
    folder = Path(done.stdout.splitlines()[-1])
    assert folder.is_relative_to(tmp_path / "home") and (folder / "model.safetensors").exists()


def test_every_error_is_ours() -> None:
    assert issubclass(hub._Absent, LlmcError) and issubclass(hub._Unreachable, LlmcError)
