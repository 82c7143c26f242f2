import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from unsloth.core.errors import ConfigError, NetworkError
from unsloth.rewards import Endpoint, call_reward, judge

PROMPTS = [[{"role": "user", "content": f"question {n}"}] for n in range(4)]


def test_a_local_model_grades():
    seen = []

    def generate(texts):
        seen.extend(texts)
        return ["Good.\nScore: 10", "score: 0", "First Score: 3, but in the end **Score:** 5", "Score = 99"]

    column = call_reward(judge(generate, "Be kind.", reward=2.0), PROMPTS, ["a", "b", "c", "d"])
    assert column.values == [2.0, 0.0, 1.0, 2.0] and column.name == "judge"
    assert "Be kind." in seen[2] and "question 2" in seen[2] and "<answer>\nc\n</answer>" in seen[2]


def test_no_grade_is_masked_and_not_scored():
    column = call_reward(
        judge(lambda texts: ["Score: 10", "I cannot say", None, "Score: 5"], "r"), PROMPTS, list("abcd")
    )
    assert column.values[0] == 1.0 and column.values[3] == 0.5
    assert [math.isnan(value) for value in column.values] == [False, True, True, False]
    assert column.infra == 2 and "no score" in column.masked[1] and "no answer" in column.masked[2]


def test_texts_with_braces_and_other_ranges():
    seen = []
    reward = judge(
        lambda texts: seen.extend(texts) or ["Score: -1"], "r", low=-1, high=1, template="{completion}|{high:g}"
    )
    assert call_reward(reward, ["{p}"], ["{x} {0}"]).values == [0.0] and seen == ["{x} {0}|1"]
    for arguments in ({"low": 1, "high": 1}, {"template": "no field"}):
        with pytest.raises(ConfigError):
            judge(lambda texts: [], "r", **arguments)


class Grader(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, self.headers["Authorization"], body["model"]))
        text = body["messages"][0]["content"]
        answer = {"choices": [{"message": {"content": f"Score: {len(text)}"}}]}
        content = b"nonsense" if "broken" in text else json.dumps(answer).encode()
        self.send_response(500 if "down" in text else 200)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Grader)
    server.seen = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_an_endpoint_grades(server):
    endpoint = Endpoint(f"http://127.0.0.1:{server.server_port}/v1/", "grader", key="k", attempts=1)
    reward = judge(endpoint, "r", template="{completion}", reward=10)
    column = call_reward(reward, PROMPTS, ["xxx", "broken", "down", "xxxxx"])
    assert (column.values[0], column.values[3]) == (3.0, 5.0) and sorted(column.masked) == [1, 2]
    assert set(server.seen) == {("/v1/chat/completions", "Bearer k", "grader")} and len(server.seen) == 4
    with pytest.raises(NetworkError, match="HTTP Error 500"):
        endpoint.ask("down")


def test_attempts(server):
    endpoint = Endpoint(f"http://127.0.0.1:{server.server_port}", "grader", attempts=3)
    assert endpoint(["down"]) == [None] and len(server.seen) == 3 and server.seen[0][1] is None


@pytest.mark.parametrize("url", ["file:///etc/passwd", "127.0.0.1:80", "", "ftp://x/v1"])
def test_other_addresses_are_refused(url):
    with pytest.raises(ConfigError, match="judge's address"):
        Endpoint(url, "m")
