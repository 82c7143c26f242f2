"""W02 and W03: nothing outside the folder for adapters is touched, and no name is ever run or rendered."""

import os

import httpx
import pytest
from tests.serve.conftest import KEY, start

GOOD = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder for adapters beside a secret, and links from one to the other."""
    root = tmp_path_factory.mktemp("root")
    allowed, secret = root / "adapters", root / "secret"
    allowed.mkdir(), secret.mkdir()
    (secret / "adapter_config.json").write_text("{}")
    (allowed / "link").symlink_to(secret)
    (allowed / "device").symlink_to("/dev/zero")
    return allowed


@pytest.fixture(scope="module")
def running(tiny, workspace):
    made = start(tiny(), adapter_folder=workspace)
    yield made
    made.stop()


PATHS = ["../secret", "a/../../secret", "/etc", "/etc/passwd", "link", "device", "/dev/zero", "..", "%2e%2e/secret",
         "a\0b", "nothing", "~", "-rf", "$(touch x)", "`touch x`", "a\nb", "x" * 4000]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_an_adapter_from_elsewhere_is_refused(running, workspace, path):
    before = sorted(os.listdir(workspace))
    body = {"lora_name": "x", "lora_path": path}
    answer = httpx.post(f"{running.url}/v1/load_lora_adapter", headers=GOOD, json=body)
    assert answer.status_code in (400, 403, 404), answer.text
    assert running.engine.adapters() == [] and sorted(os.listdir(workspace)) == before
    assert httpx.get(f"{running.url}/health", headers=GOOD).status_code == 200


def test_without_a_folder_no_adapter_is_loaded(tiny, workspace):
    made = start(tiny())
    body = {"lora_name": "x", "lora_path": str(workspace)}
    answer = httpx.post(f"{made.url}/v1/load_lora_adapter", headers=GOOD, json=body)
    assert answer.status_code == 403 and "--adapter-folder" in answer.json()["error"]["message"]
    made.stop()


@pytest.mark.parametrize("name", ["../x", "%2e%2e%2fx", "a;$(touch x)", "<script>alert(1)</script>", "--flag", "a%0Ab"])
def test_model_names_are_only_compared(running, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answers = [
        httpx.get(f"{running.url}/v1/models/{name}", headers=GOOD),
        httpx.post(f"{running.url}/v1/completions", headers=GOOD, json={"model": name, "prompt": "a"}),
        httpx.post(f"{running.url}/v1/unload_lora_adapter", headers=GOOD, json={"lora_name": name}),
    ]
    assert [answer.status_code for answer in answers] == [404, 404, 404]
    assert all(answer.headers["content-type"] == "application/json" for answer in answers)
    assert os.listdir(tmp_path) == []
