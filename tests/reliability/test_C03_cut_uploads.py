"""C03: an upload cut at 0, 50 or 99 %, or refused: the model is unaffected, what the hub shows is whole or absent.

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
from base64 import b64decode
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from safetensors.torch import load

CHILD = """
import json, os, sys, time, urllib.request
from pathlib import Path
import torch
from unsloth import FastLanguageModel
from unsloth.core.errors import UnslothError
from unsloth.export import merged_folder, upload

time.sleep = lambda seconds: None  # between tries
model, tokenizer = FastLanguageModel.from_pretrained(sys.argv[1], max_seq_length=64, load_in_16bit=True)
model = FastLanguageModel.get_peft_model(model, r=2)
ids = torch.arange(4, 20)[None]

def step():
    loss = model(input_ids=ids, labels=ids).loss
    model.zero_grad()
    loss.backward()
    return [loss.item()] + [float(p.grad.norm()) for p in model.parameters() if p.grad is not None]

before, write, written = step(), merged_folder.write, []
merged_folder.write = lambda *args: (written.append(args[1].name), write(*args))[1]
for name, options in json.loads(sys.argv[2]):
    again, adapter, gguf = (options.pop(key, False) for key in ("again", "adapter", "gguf"))
    try:
        if again:
            urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/heal")
            url = upload.upload(Path(upload.folder_name(name)), upload.prepare(name))
        elif adapter:
            url = model.push_to_hub(name, **options)
        elif gguf:
            urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/sicken")
            url = model.push_to_hub_gguf(name, tokenizer, ["q8_0", "f16"], verify=False, **options)
        else:
            url = model.push_to_hub_merged(name, tokenizer, max_shard_size="40KB", **options)
        result = {"url": url}
    except UnslothError as error:
        result = {"error": type(error).__name__, "message": str(error)}
    same = step() == before and model.training
    print(json.dumps(result | {"same": same, "written": list(written)}), flush=True)
"""


class Hub(http.server.ThreadingHTTPServer):
    """Takes uploads; what it has stored and committed can be looked at."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.stored: dict[str, dict[str, bytes]] = defaultdict(dict)
        self.committed: dict[str, dict[str, bytes]] = defaultdict(dict)
        self.commits: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()  # by repository: files whose bytes arrived
        self.private: dict[str, bool] = {}
        self.tokens: set[str] = set()
        self.unknown: list[str] = []
        self.healed = False


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def content(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, status, content=None, headers=None):
        body = json.dumps(content if content is not None else {}).encode()
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def fault(self, name, kind, count=3):
        """Whether this repository still has a fault of this kind to show."""
        if kind not in name or self.server.healed:
            return False
        self.server.faults[name] += 1
        return "always" in name or self.server.faults[name] <= count

    def do_GET(self):
        if self.path == "/heal":
            self.server.healed = True
            return self.answer(200)
        if self.path == "/sicken":
            self.server.healed = False
            return self.answer(200)
        found = re.match(r"/api/models/([^/]+/[^/]+)/tree/main", self.path)
        if found is None:
            self.server.unknown.append(self.path)
            return self.answer(404)
        name = found[1]
        files = [
            {"type": "file", "path": path, "size": len(data), "oid": "0" * 40}
            for path, data in self.server.committed[name].items()
        ]
        self.answer(200, files)

    def do_POST(self):
        body = self.content()
        if self.path == "/api/repos/create":
            return self.create(json.loads(body))
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"warnings": [], "errors": []})
        if found := re.match(r"/api/models/([^/]+/[^/]+)/preupload/main", self.path):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".gguf")) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        if found := re.match(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self.path):
            return self.batch(found[1], json.loads(body))
        if found := re.match(r"/api/models/([^/]+/[^/]+)/commit/main", self.path):
            return self.commit(found[1], [json.loads(line) for line in body.splitlines()])
        self.server.unknown.append(self.path)
        return self.answer(404)

    def create(self, asked):
        name = f"{asked.get('organization', 'me')}/{asked['name']}"
        self.server.tokens.add(self.headers.get("Authorization", ""))
        if found := re.search(r"http-(\d+)", name):
            return self.answer(int(found[1]))
        self.server.private.setdefault(name, asked.get("private") or asked.get("visibility") == "private")
        return self.answer(200, {"url": f"http://{self.headers['Host']}/{name}", "name": name})

    def batch(self, name, asked):
        objects = []
        for entry in asked["objects"]:
            action = {"upload": {"href": f"http://{self.headers['Host']}/store/{name}/{entry['oid']}"}}
            known = entry["oid"] in self.server.stored[name]
            objects.append({**entry, **({} if known else {"actions": action})})
        self.answer(200, {"objects": objects})

    def do_PUT(self):
        name, digest = re.match(r"/store/([^/]+/[^/]+)/(\w+)", self.path).groups()
        length = int(self.headers["Content-Length"])
        if self.fault(name, "cut-0"):
            self.close_connection = True
            return
        if self.fault(name, "cut-50"):
            self.rfile.read(length // 2)
            self.close_connection = True
            return
        data = self.rfile.read(length)
        if self.server.sent[name] >= 2 and self.fault(name, "full"):
            return self.answer(500)
        assert hashlib.sha256(data).hexdigest() == digest
        self.server.stored[name][digest] = data
        self.server.sent[name] += 1
        self.answer(200)

    def commit(self, name, lines):
        if self.fault(name, "cut-99"):
            return self.answer(500)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.server.committed[name][value["path"]] = b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.committed[name][value["path"]] = self.server.stored[name][value["oid"]]
            elif line["key"] == "deletedFile":
                del self.server.committed[name][value["path"]]
        self.server.commits[name] += 1
        url = f"http://{self.headers['Host']}/{name}/commit/{'1' * 40}"
        self.answer(200, {"success": True, "commitOid": "1" * 40, "commitUrl": url, "hookOutput": ""})


@pytest.fixture
def server():
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    yield hub
    hub.shutdown()
    hub.server_close()
    thread.join()


@pytest.fixture
def push(server, tiny, tmp_path):
    def run(*cases):
        environment = {
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        cases = [case if isinstance(case, tuple) else (case, {}) for case in cases]
        command = [sys.executable, "-c", CHILD, str(tiny()), json.dumps(cases)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        return [json.loads(line) for line in result.stdout.splitlines()], result.stderr

    return run


def local_files(folder: Path):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_faults_that_pass_are_survived_the_others_are_told_and_an_upload_goes_on_where_it_was(push, server, tmp_path):
    server.committed["me/cut-0"] = {"model-00001-of-00099.safetensors": b"stale", "notes.txt": b"kept"}
    server.committed["me/adapter"] = {"model.safetensors": b"a model beside which the adapter is put"}
    token = {"token": "hf_a_secret"}
    results, log = push(
        ("me/http-401", token),
        "me/http-403",
        *((f"me/cut-{at}", {}) for at in (0, 50, 99)),
        ("me/public", {"private": False}),
        ("me/adapter", {"adapter": True}),
        "me/always-full",
        ("me/always-full", {"again": True}),
        ("me/http-401-gguf", {**token, "gguf": True}),
        ("me/cut-50-gguf", {"gguf": True}),
        ("me/always-cut-99-gguf", {"gguf": True}),
        ("me/always-cut-99-gguf", {"again": True}),
    )
    assert all(result["same"] for result in results)
    refused, forbidden, *whole, adapter, full, again = results[:-4]
    assert refused["error"] == forbidden["error"] == "UploadError"
    assert "HTTP 401" in refused["message"] and "token=" in refused["message"] and not refused["written"]
    assert "HTTP 403" in forbidden["message"] and not forbidden["written"]
    for name, result in zip(["cut-0", "cut-50", "cut-99", "public"], whole, strict=True):
        assert result["url"].endswith(f"/me/{name}"), result
        files = local_files(tmp_path / name)
        kept = {"notes.txt": b"kept"} if name == "cut-0" else {}
        assert server.committed[f"me/{name}"] == {**files, **kept}
        assert server.commits[f"me/{name}"] == 1
    assert {name: server.private[f"me/{name}"] for name in ("cut-0", "public")} == {"cut-0": True, "public": False}
    assert "url" in adapter and "adapter_model.safetensors" in server.committed["me/adapter"]
    assert "model.safetensors" in server.committed["me/adapter"]
    assert load(server.committed["me/adapter"]["adapter_model.safetensors"])
    assert full["error"] == "UploadError" and "local copy at 'always-full' is whole" in full["message"]
    files = local_files(tmp_path / "always-full")  # it went on where it was: each file arrived once
    assert "url" in again and server.committed["me/always-full"] == files and server.commits["me/always-full"] == 1
    assert server.sent["me/always-full"] == len([name for name in files if name.endswith(".safetensors")]) > 2
    assert server.tokens >= {"Bearer hf_a_secret"} and "hf_a_secret" not in log + json.dumps(results)
    assert not any(b"hf_a_secret" in data for data in local_files(tmp_path / "cut-0").values())

    refused, cut, always, again = results[-4:]
    assert "HTTP 401" in refused["message"] and not (tmp_path / "http-401-gguf").exists()
    assert cut["url"].endswith("/me/cut-50-gguf") and server.private["me/cut-50-gguf"]
    files = local_files(tmp_path / "cut-50-gguf")
    assert server.committed["me/cut-50-gguf"] == files and server.commits["me/cut-50-gguf"] == 1
    kinds = {name.rpartition(".")[2] for name in files}
    assert kinds == {"gguf", "json", "md", "Modelfile"} and sum(name.endswith(".gguf") for name in files) == 2
    card = files["README.md"].decode()
    assert "library_name: gguf" in card and "| adapter | LoRA, r = 2" in card and "Q8_0.gguf" in card
    assert always["error"] == "UploadError" and "always-cut-99-gguf' is whole" in always["message"]
    assert "url" in again and server.sent["me/always-cut-99-gguf"] == 2  # each file's bytes went once
    assert server.committed["me/always-cut-99-gguf"] == local_files(tmp_path / "always-cut-99-gguf")
