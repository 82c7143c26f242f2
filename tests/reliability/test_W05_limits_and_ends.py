"""W05: large and malformed bodies, a second start, a kill, and a restart."""

import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest
from tests.serve.conftest import KEY, start

from unsloth.cli.serve import ServeCommand, serve
from unsloth.core.errors import ConfigError

GOOD = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def running(tiny):
    made = start(tiny(), max_body_bytes=10_000)
    yield made
    made.stop()


def test_a_large_body_is_refused_before_it_is_sent(running):
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {KEY}\r\n"
        "Content-Type: application/json\r\nContent-Length: 2147483648\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", running.port), timeout=10) as connection:
        connection.sendall(head.encode())
        assert b" 413 " in connection.recv(1000)


def test_a_large_body_without_a_length_is_cut_off(running):
    def pieces():
        for _ in range(100):
            yield b" " * 1000

    answer = httpx.post(f"{running.url}/v1/completions", headers=GOOD, content=pieces())
    assert answer.status_code == 413 and "10,000 bytes" in answer.json()["error"]["message"]


def test_a_body_that_never_arrives_is_given_up(tiny):
    running = start(tiny(), body_seconds=0.2)
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {KEY}\r\n"
        "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    )
    with socket.create_connection(("127.0.0.1", running.port), timeout=10) as connection:
        connection.sendall(head.encode())
        assert b" 408 " in connection.recv(1000)
    running.stop()


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'"text"', b'{"model": "tiny"}', b"\xff\xfe", b'{"model": NaN}', b"[" * 9000]
)
def test_malformed_bodies(running, body):
    for path in ("chat/completions", "completions", "load_lora_adapter", "unload_lora_adapter"):
        headers = {**GOOD, "Content-Type": "application/json"}
        answer = httpx.post(f"{running.url}/v1/{path}", headers=headers, content=body)
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["type"] == "invalid_request_error"


def command(folder, port, *more):
    words = [sys.executable, "-m", "unsloth.cli.main", "serve", str(folder), "--port", str(port), *more]
    environment = {**os.environ, "UNSLOTH_API_KEY": KEY}
    return subprocess.Popen(
        [*words, "--precision", "16bit", "--max-seq-length", "128"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(port, process):
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        try:
            return httpx.get(f"http://127.0.0.1:{port}/v1/models", headers=GOOD, timeout=5).json()["data"][0]["id"]
        except httpx.HTTPError:
            time.sleep(0.2)
    raise AssertionError(process.communicate(timeout=5)[0])


def test_start_twice_kill_start_again_and_end(tiny):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    first = command(tiny(), port, "--name", "mine")
    try:
        assert wait_for(port, first) == "mine"
        with pytest.raises(ConfigError, match="Another server may be running"):
            serve(ServeCommand(str(tiny()), port=port, no_key=True))
        assert wait_for(port, first) == "mine"
    finally:
        first.kill()
        first.communicate()
    third = command(tiny(), port, "--name", "again", "--drain-seconds", "5")
    try:
        assert wait_for(port, third) == "again"
        body = {"model": "again", "prompt": "a", "max_tokens": 100, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", f"http://127.0.0.1:{port}/v1/completions", headers=GOOD, json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            third.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]" and '"finish_reason": "length"' in rest[-2]
        said = third.communicate(timeout=60)[0]
    finally:
        third.kill()
    assert KEY not in said and "Traceback" not in said and f"http://127.0.0.1:{port}/v1" in said
