"""Options of a server, and its key."""

import stat

import pytest

from unsloth.core.errors import ConfigError
from unsloth.serve import server
from unsloth.serve.options import ServeOptions, is_loopback


def test_without_a_key_only_this_machine_may_ask():
    assert ServeOptions("m").host == "127.0.0.1"
    for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"):
        assert is_loopback(host) and ServeOptions("m", host=host)
    for host in ("0.0.0.0", "::", "192.168.1.2", "example.com"):
        assert not is_loopback(host)
        with pytest.raises(ConfigError, match="without an API key"):
            ServeOptions("m", host=host)
        assert ServeOptions("m", host=host, api_key="k")


@pytest.mark.parametrize(
    "wrong", [{"max_requests": 0}, {"port": 70000}, {"drain_seconds": -1}, {"api_key": ""}, {"api_key": "a\nb"}]
)
def test_options_that_make_no_sense(wrong):
    with pytest.raises(ConfigError):
        ServeOptions("m", **wrong)


def test_a_new_key_is_only_its_owners(tmp_path):
    path = tmp_path / "deep" / "serve.key"
    first = server.make_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and server.read_key(path) == first
    assert server.make_key(path) != first and len(list(path.parent.iterdir())) == 1


@pytest.mark.parametrize("content", [None, "", "\nkey", "\xff"])
def test_a_key_file_without_a_key(tmp_path, content):
    path = tmp_path / "key"
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match="the file of the API key"):
        server.read_key(path)


def test_a_taken_port_is_said_at_once():
    with server.listen(ServeOptions("m", port=0)) as first:
        port = first.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}.*Another server may be running"):
            server.listen(ServeOptions("m", port=port))
    with pytest.raises(ConfigError, match="cannot listen"):
        server.listen(ServeOptions("m", host="203.0.113.7", api_key="k", port=0))
