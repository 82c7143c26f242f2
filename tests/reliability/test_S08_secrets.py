"""Secrets of the host's environment show up nowhere: not in the sandbox, its errors, logs, or a judge's messages."""

import dataclasses
import logging
import sys
from pathlib import Path

import pytest

from unsloth.core.errors import NetworkError, UnslothError
from unsloth.rewards import Endpoint, Rewards, SandboxedFunction, judge

SECRETS = {
    "HF_TOKEN": "hf_S08aaaaaaaaaaaaaaaa",
    "WANDB_API_KEY": "wb_S08bbbbbbbbbbbbbbbb",
    "AWS_SECRET_ACCESS_KEY": "aws_S08cccccccccccccc",
    "OPENAI_API_KEY": "sk_S08dddddddddddddddd",
}

# Everything that Python code can reach from where it stands, as text.
DUMP = """
import sys
def f(x):
    seen, waiting, text = set(), [sys.modules, sys._getframe()], []
    while waiting and len(seen) < 20000:
        thing = waiting.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, (str, bytes)):
            text.append(str(thing)[:200])
        elif isinstance(thing, dict):
            waiting += [*thing.keys(), *thing.values()]
        elif isinstance(thing, (list, tuple, set, frozenset)):
            waiting += list(thing)
        elif type(thing) is type(sys._getframe()):
            waiting += [thing.f_back, thing.f_locals, thing.f_globals]
        else:
            try:
                waiting.append(dict(vars(thing)))
            except TypeError:
                pass
    return "\\n".join(text)[:1000000]
"""


@pytest.fixture
def secrets(monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    return SECRETS


def assert_free(text):
    assert [value for value in SECRETS.values() if value in text] == []


def test_the_sandbox_holds_no_secret(secrets):
    function = SandboxedFunction(DUMP, "f")
    reached = function(1)
    assert len(reached) > 10_000  # it did look around
    assert_free(reached)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_process_started_without_an_environment(secrets):
    function = SandboxedFunction("def f(x):\n    return x")
    outer = function._child.identity
    environment = Path(f"/proc/{outer}/environ").read_bytes()
    assert_free(environment.decode())
    assert len(environment.split(b"\0")) <= 2
    assert_free(Path(f"/proc/{outer}/cmdline").read_text())


def test_errors_and_logs_hold_no_secret(secrets, caplog):
    logging.getLogger("unsloth").addHandler(caplog.handler)
    endpoint = Endpoint("http://127.0.0.1:9/v1", "grader", key=SECRETS["OPENAI_API_KEY"], timeout=1, attempts=1)
    assert_free(repr(endpoint))
    with pytest.raises(NetworkError) as failure:
        endpoint.ask("hello")
    assert_free(repr(failure.value) + str(failure.value))
    rewards = Rewards([judge(endpoint, "Be brief.")], max_infra=1)
    with pytest.raises(UnslothError) as stopped:
        rewards(["p"], ["c"])
    assert_free(repr(stopped.value) + caplog.text + repr(rewards.statistics()))
    assert "judge" in caplog.text


def test_a_redirection_does_not_carry_the_key_elsewhere(secrets):
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    seen = []

    class Redirect(BaseHTTPRequestHandler):
        def do_POST(self):
            seen.append(self.path)
            self.send_response(307)
            self.send_header("Location", f"http://127.0.0.1:{self.server.server_port}/elsewhere")
            self.end_headers()

        do_GET = do_POST

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Redirect)
    Thread(target=server.serve_forever, daemon=True).start()
    endpoint = Endpoint(f"http://127.0.0.1:{server.server_port}/v1", "m", key=SECRETS["OPENAI_API_KEY"])
    with pytest.raises(NetworkError, match="307"):
        dataclasses.replace(endpoint, attempts=1).ask("x")
    server.shutdown()
    server.server_close()
    assert seen == ["/v1/chat/completions"]
