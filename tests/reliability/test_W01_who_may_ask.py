"""W01: pages of other origins, other host names and requests without the key reach no route."""

import socket

import httpx
import pytest
from tests.serve.conftest import KEY, start

from unsloth.cli.serve import ServeCommand, serve
from unsloth.core.errors import ConfigError

GOOD = {"Authorization": f"Bearer {KEY}"}
ROUTES = [
    ("GET", "/health"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/tiny"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/unload_lora_adapter"),
    ("GET", "/openapi.json"),
    ("GET", "/no/such/route"),
    ("OPTIONS", "/v1/models"),
]
BAD_HEADERS = {
    "another host": {**GOOD, "Host": "evil.example"},
    "a name that resolves here": {**GOOD, "Host": "127.0.0.1.nip.io:8000"},
    "an empty host": {**GOOD, "Host": ""},
    "a null origin": {**GOOD, "Origin": "null"},
    "a foreign origin": {**GOOD, "Origin": "https://evil.example"},
    "an origin of another port": {**GOOD, "Origin": "http://127.0.0.1:1"},
    "no key": {},
    "another key": {"Authorization": "Bearer other"},
    "an empty key": {"Authorization": "Bearer"},
    "a key of another kind": {"Authorization": f"Basic {KEY}"},
    "a key that is not ASCII": {"Authorization": "Bearer schl\xfcssel".encode("latin-1")},
}


@pytest.fixture(scope="module")
def running(tiny):
    made = start(tiny())
    yield made
    made.stop()


def test_the_routes_are_all_of_them(running):
    paths = httpx.get(f"{running.url}/openapi.json", headers=GOOD).json()["paths"]
    known = {path for _, path in ROUTES}
    assert {path.replace("{name}", "tiny") for path in paths} <= known


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_refused_on_every_route(running, case):
    with httpx.Client(base_url=running.url) as client:
        for method, path in ROUTES:
            answer = client.request(method, path, headers=BAD_HEADERS[case], json={} if method == "POST" else None)
            assert answer.status_code == 403, (method, path)
            assert answer.json()["error"]["message"] and KEY not in answer.text
    assert running.engine.stats().requests == 0


def test_the_right_ones_pass(running):
    for headers in (GOOD, {**GOOD, "Origin": running.url}, {**GOOD, "Host": f"localhost:{running.port}"}):
        assert httpx.get(f"{running.url}/v1/models", headers=headers).status_code == 200


def test_two_host_headers_and_web_sockets_are_refused(running):
    head = f"GET /v1/models HTTP/1.1\r\nAuthorization: Bearer {KEY}\r\nHost: 127.0.0.1\r\n"
    upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: eA==\r\n"
    for more in ("Host: evil.example\r\n", f"Host: evil.example\r\n{upgrade}", f"Origin: null\r\n{upgrade}"):
        with socket.create_connection(("127.0.0.1", running.port), timeout=10) as connection:
            connection.sendall((head + more + "\r\n").encode())
            assert connection.recv(1000).split()[1] in (b"400", b"403")


def test_the_key_in_the_address_does_not_count(running):
    for query in (f"?api_key={KEY}", f"?token={KEY}", f"?Authorization=Bearer+{KEY}"):
        assert httpx.get(f"{running.url}/v1/models{query}").status_code == 403


def test_other_addresses_need_a_key():
    with pytest.raises(ConfigError, match="without an API key"):
        serve(ServeCommand("m", host="0.0.0.0", no_key=True, port=0))
