"""C02: no network, refusals, cut downloads, wrong contents: the repository and the cause are named, nothing half used.

A server in this process plays the hub; what goes wrong is in the name of the repository. The library runs in a child
process, because huggingface_hub reads its endpoint when it is imported.
"""

import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from unsloth import FastLanguageModel
from unsloth.models import hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CHILD = """
import json, sys, time
from unsloth.core.errors import UnslothError
from unsloth.models import hub

for name, options in json.loads(sys.argv[1]):
    start = time.monotonic()
    try:
        folder = hub.fetch(hub.Request(name, **options))
        result = {"folder": str(folder), "files": sorted(path.name for path in folder.iterdir())}
    except UnslothError as error:
        result = {"error": type(error).__name__, "message": str(error)}
    print(json.dumps(result | {"seconds": time.monotonic() - start}), flush=True)
"""


class Hub(http.server.ThreadingHTTPServer):
    """Serves one model under many names; each name stands for a fault."""

    daemon_threads = True

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.large = bytes(range(256)) * (24 * 4096)  # 24 MiB: downloads are written in pieces of 10 MB
        self.cut_once: set[str] = set()
        self.ranges: list[str] = []


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        path = self.path.partition("?")[0]
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self.information(match[1], match[2] or "main", body)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.file(match[1], match[3], body)
        else:
            self.send(404, b"", body)

    def information(self, name, revision, body):
        if match := re.fullmatch(r"org/http-(\d+)", name):
            return self.send(int(match[1]), b"{}", body)
        if name == "org/gated":
            return self.send(403, b"{}", body, {"X-Error-Code": "GatedRepo"})
        if name == "org/absent":
            return self.send(404, b"{}", body, {"X-Error-Code": "RepoNotFound"})
        if revision not in ("main", COMMIT):
            return self.send(404, b"{}", body, {"X-Error-Code": "RevisionNotFound"})
        siblings = []
        for file, content in self.files_of(name).items():
            lfs = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
            entry = {"rfilename": file, "size": len(content), "blobId": hashlib.sha1(content).hexdigest()}
            siblings.append(entry | ({"lfs": lfs} if file.endswith(".safetensors") else {}))
        content = {"id": name, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
        self.send(200, json.dumps(content).encode(), body)

    def files_of(self, name):
        if name == "org/pickled":
            return {"config.json": b"{}", "pytorch_model.bin": b"\x80\x02."}
        if name == "org/no-weights":
            return {"config.json": b"{}"}
        if name == "org/no-model":
            return {"README.md": b"#", "q.gguf": b"GGUF"}
        if name == "org/cut-once":
            return {"config.json": b"{}", "model.safetensors": self.server.large}
        return self.server.files

    def file(self, name, file, body):
        content = self.files_of(name).get(file)
        if content is None:
            return self.send(404, b"", body, {"X-Error-Code": "EntryNotFound"})
        digest = hashlib.sha256(content).hexdigest()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{digest}"', "Accept-Ranges": "bytes"}
        if not file.endswith(".safetensors"):
            return self.send(200, content, body, headers)
        headers |= {"X-Linked-ETag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        if name == "org/broken-file" and body:
            return self.send(403, b"", body)
        if name == "org/other-content" and body:
            content = bytes([content[0] ^ 1]) + content[1:]
        if not body:
            return self.send(200, content, body, headers)
        start = 0
        if asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(asked[1])
            self.server.ranges.append(name)
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        part = content[start:]
        if name == "org/cut-once" and name not in self.server.cut_once:
            self.server.cut_once.add(name)
            self.send_response(200, "OK")
            for key, value in {**headers, "Content-Length": str(len(part))}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(part[: len(part) * 3 // 4])
            self.close_connection = True
            return None
        return self.send(206 if start else 200, part, body, headers)

    def send(self, status, content, body, headers=None):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


@pytest.fixture(scope="module")
def server(tiny):
    names = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    hub = Hub({name: (tiny() / name).read_bytes() for name in names} | {"README.md": b"#", "extra.safetensors": b"?"})
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    yield hub
    hub.shutdown()
    hub.server_close()
    thread.join()


def fetch(cases, home, endpoint):
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    cases = [case if isinstance(case, tuple) else (case, {}) for case in cases]
    result = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(cases)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def address(server):
    return f"http://127.0.0.1:{server.server_address[1]}"


def test_refusals_name_the_repository_and_the_cause_at_once(server, tmp_path):
    expected = {
        "org/http-401": ("ModelNotFoundError", "token"),
        "org/http-403": ("ModelNotFoundError", "403"),
        "org/gated": ("ModelNotFoundError", "asked for"),
        "org/absent": ("ModelNotFoundError", "no such model"),
        "org/http-429": ("NetworkError", "too many requests"),
        "org/http-500": ("NetworkError", "HTTP 500"),
        "org/pickled": ("CheckpointError", "unsloth.models.unpickle"),
        "org/no-weights": ("CheckpointError", "model.safetensors"),
    }
    others = [("org/model", {"revision": "v9"}), "org/no-model", ("org/no-model", {"gguf_file": "p.gguf"})]
    results = fetch([*expected, *others], tmp_path, address(server))
    for (name, (error, text)), result in zip(expected.items(), results, strict=False):
        assert result["error"] == error and text in result["message"] and name in result["message"], result
        assert "weights_only=False" not in result["message"]
    revision, no_model, no_gguf = results[-3:]
    assert revision["error"] == "ModelNotFoundError" and "revision" in revision["message"]
    assert no_model["error"] == "CheckpointError" and "config.json" in no_model["message"]
    assert no_gguf["error"] == "ModelNotFoundError" and "q.gguf" in no_gguf["message"]
    assert max(result["seconds"] for result in results) < 5


def test_only_what_is_needed_is_fetched_and_then_works_offline(server, tmp_path):
    (small,) = fetch([("org/model", {"weights": False})], tmp_path / "small", address(server))
    assert "config.json" in small["files"] and "model.safetensors" not in small["files"]
    (first,) = fetch(["org/model"], tmp_path, address(server))
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(first["files"])
    assert not {"README.md", "extra.safetensors"} & set(first["files"])
    model, local, absent = fetch(
        ["org/model", ("org/model", {"local_files_only": True}), "org/absent"], tmp_path, "http://127.0.0.1:9"
    )
    assert model["folder"] == local["folder"] == first["folder"]
    assert absent["error"] == "NetworkError" and "org/absent" in absent["message"]
    assert max(model["seconds"], absent["seconds"]) < 5


def test_a_host_that_cannot_be_found(tmp_path):
    (result,) = fetch(["org/model"], tmp_path, "http://no-such-host.invalid")
    assert result["error"] == "NetworkError" and "org/model" in result["message"]
    assert result["seconds"] < 10


def test_a_cut_download_is_resumed(server, tmp_path):
    (result,) = fetch(["org/cut-once"], tmp_path, address(server))
    if "error" in result:  # a version that leaves the second try to the caller
        (result,) = fetch(["org/cut-once"], tmp_path, address(server))
    assert "org/cut-once" in server.ranges
    weights = Path(result["folder"]) / "model.safetensors"
    assert weights.read_bytes() == server.large


def test_other_content_is_never_used(server, tmp_path):
    first, second, refused = fetch(
        ["org/other-content", ("org/other-content", {"local_files_only": True}), "org/broken-file"],
        tmp_path,
        address(server),
    )
    assert first["error"] == "CheckpointError" and "SHA-256" in first["message"]
    assert "model.safetensors" in first["message"] and "org/other-content" in first["message"]
    assert "model.safetensors" not in second["files"]
    assert refused["error"] == "ModelNotFoundError" and "org/broken-file" in refused["message"]


def test_a_hub_model_loads_and_its_adapter_names_the_hub(tiny, monkeypatch):
    monkeypatch.setattr(hub, "fetch", lambda request: tiny())
    model, tokenizer = FastLanguageModel.from_pretrained("org/model", max_seq_length=64, load_in_16bit=True)
    adapted = FastLanguageModel.get_peft_model(model, r=2)
    assert adapted.peft_config["default"].base_model_name_or_path == "org/model"
