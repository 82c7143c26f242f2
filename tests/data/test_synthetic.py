import json
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from unsloth.core.errors import ConfigError, DataError, NetworkError
from unsloth.data import documents, synthetic
from unsloth.data.synthetic import PairOptions
from unsloth.dataprep import SyntheticDataKit


def model(calls, scores="[9, 3]"):
    """Writes two pairs on each text, and rates them."""

    def generate(prompts):
        calls.append(len(prompts))
        replies = []
        for prompt in prompts:
            if prompt.startswith("Rate"):
                replies.append(f"Sure!\n```json\n{scores}\n```")
            elif "bad" in prompt:
                replies.append("I cannot do that [really].")
            else:
                text = prompt.rsplit("Text:\n", 1)[1]
                pairs = [
                    {"question": f"{text}?", "answer": "yes"},
                    {"question": "And?", "answer": "no"},
                    {"question": ""},
                ]
                replies.append(f"Here: {json.dumps(pairs)}")
        return replies

    return generate


def test_pairs_are_written_rated_and_counted(tmp_path):
    rows, report = synthetic.make_pairs(["a", "b", "a", "bad"], model([]), tmp_path / "p.jsonl")
    assert [row["messages"][0]["content"] for row in rows] == ["a?", "b?"]
    assert (report.chunks, report.unreadable, report.pairs, report.rated_out, report.repeated) == (4, 1, 4, 2, 0)
    rows, report = synthetic.make_pairs(["a", "b"], model([]), tmp_path / "q.jsonl", PairOptions(threshold=None))
    assert [row["messages"][1]["content"] for row in rows] == ["yes", "no", "yes"] and report.repeated == 1


def test_an_interrupted_run_goes_on(tmp_path):
    progress, calls = tmp_path / "p.jsonl", []

    def fails(prompts):
        if len(calls) == 4:
            raise NetworkError("gone")
        return model(calls)(prompts)

    options = PairOptions(batch=1)
    with pytest.raises(NetworkError):
        synthetic.make_pairs(["a", "b", "c"], fails, progress, options)
    progress.write_text(progress.read_text() + '{"key": "cut')
    calls.clear()
    rows, _ = synthetic.make_pairs(["a", "b", "c"], model(calls), progress, options)
    assert len(calls) == 2 and len(rows) == 3
    assert synthetic.make_pairs(["a", "b", "c"], model(calls), progress, options)[0] == rows and len(calls) == 2


def test_refusals(tmp_path):
    with pytest.raises(DataError, match="no pair is left"):
        synthetic.make_pairs(["a"], model([], scores="[1, 1]"), tmp_path / "p.jsonl")
    with pytest.raises(DataError, match="one reply for each"):
        synthetic.make_pairs(["a"], lambda prompts: [], tmp_path / "q.jsonl")
    with pytest.raises(ConfigError, match="threshold"):
        PairOptions(threshold=11)


def test_new_rows_after_old_ones():
    rows = [{"text": f"old {i}", "label": "x"} for i in range(7)]
    reply = json.dumps([{"text": "old 1", "label": "x"}, {"text": "new", "label": "y"}, {"text": "no label"}])
    assert synthetic.make_variations(rows, lambda prompts: [reply] * len(prompts), 10) == [
        {"text": "new", "label": "y"}
    ]
    with pytest.raises(DataError, match="same columns"):
        synthetic.make_variations(rows, lambda prompts: ["?"] * len(prompts), 5)


def test_documents_are_read(tmp_path):
    (tmp_path / "a.html").write_text("<title>T</title><script>x</script><p>One &amp;\n two</p><p>Three</p>")
    assert documents.read_document(tmp_path / "a.html") == "T\n\nOne & two\n\nThree"
    (tmp_path / "b.srt").write_text(
        "1\n00:00:01,000 --> 00:00:02,000\n<i>Hello</i>\n\n2\n00:00:03,000 --> 00:00:04,000\nthere\n"
    )
    assert documents.read_document(tmp_path / "b.srt") == "Hello there"
    word = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
    with zipfile.ZipFile(tmp_path / "c.docx", "w") as archive:
        body = "<w:p><w:r><w:t>One</w:t></w:r></w:p><w:p><w:r><w:t>Tw</w:t></w:r><w:r><w:t>o</w:t></w:r></w:p>"
        archive.writestr("word/document.xml", f'<w:document xmlns:w="{word}">{body}</w:document>')
    assert documents.read_document(tmp_path / "c.docx") == "One\n\nTwo"
    (tmp_path / "d.txt").write_text(" \n")
    with pytest.raises(DataError, match="no text"):
        documents.read_document(tmp_path / "d.txt")
    with pytest.raises(DataError, match="Readable are"):
        documents.read_document(Path(__file__))


def test_pdf_without_its_package_names_it(tmp_path, monkeypatch):
    (tmp_path / "a.pdf").write_bytes(b"%PDF-1.4")
    monkeypatch.setattr(documents.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install pypdf"):
        documents.read_document(tmp_path / "a.pdf")


@pytest.mark.parametrize(("size", "overlap"), [(50, 0), (50, 10), (7, 3)])
def test_chunks_lose_nothing(size, overlap):
    text = "\n\n".join(f"Sentence {i} is here. And one more." for i in range(30))
    pieces = documents.chunks(text, size, overlap)
    assert all(len(piece) <= size for piece in pieces)
    words = iter(" ".join(pieces).split()) if not overlap and size > 20 else None
    if words is not None:
        assert list(words) == text.split()
    position = 0
    for piece in pieces:
        found = text.find(piece, max(position - overlap - 2, 0))
        assert found != -1 and not text[position:found].strip()
        position = found + len(piece)
    assert not text[position:].strip()


def test_the_kit_writes_a_training_file(tmp_path):
    (tmp_path / "doc.txt").write_text("Tea is hot.")
    kit = SyntheticDataKit(model([]))
    rows, _ = kit.make_pairs(tmp_path / "doc.txt", tmp_path / "out")
    written = (tmp_path / "out" / "pairs" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in written] == rows and rows[0]["messages"][0]["content"] == "Tea is hot.?"


def test_a_server_that_speaks_openais_protocol():
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):  # noqa: N802
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked, key = body["messages"][0]["content"], self.headers["Authorization"]
            answer = json.dumps({"choices": [{"message": {"content": f"{body['model']} {asked} {key}"}}]}).encode()
            self.send_response(200 if asked != "fail" else 500)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        kit = SyntheticDataKit.from_endpoint(f"http://127.0.0.1:{server.server_port}/v1", "m", api_key="k")
        assert kit._generate(["a", "b"]) == ["m a Bearer k", "m b Bearer k"]
        with pytest.raises(NetworkError, match="500"):
            kit._generate(["fail"])
    finally:
        server.shutdown()


def test_a_local_model(tiny, tmp_path):
    kit = SyntheticDataKit.from_pretrained(str(tiny()), max_seq_length=512, max_generation_tokens=4, load_in_16bit=True)
    replies = kit._generate(["x"])
    assert len(replies) == 1 and isinstance(replies[0], str)


def test_rows_from_a_description_alone():
    replies = iter(
        [
            'Sure: [{"text": "Great!", "label": "positive"}, {"text": "Bad.", "label": "negative"}, {"text": "no"}]',
            "nothing",
            '[{"text": "great!", "label": "positive"}, {"text": "Fine.", "label": "neutral"}]',
        ]
    )
    prompts = []

    def generate(asked):
        prompts.extend(asked)
        return [next(replies)]

    rows = synthetic.invent("reviews", ["text", "label"], generate, count=3)
    assert [row["text"] for row in rows] == ["Great!", "Bad.", "Fine."]
    assert "reviews" in prompts[0] and "Bad." in prompts[1]
    with pytest.raises(DataError, match="no reply held rows of these columns"):
        synthetic.invent("reviews", ["text"], lambda asked: ["no"], count=3)
    with pytest.raises(ConfigError, match="at least one must be wanted"):
        synthetic.invent("reviews", [], lambda asked: ["no"], count=3)


def test_rows_of_another_shape_become_conversations():
    def generate(asked):
        pair = '{"question": "q", "answer": "a"}'
        return [f"[{pair}, {pair}]" if "Tea" in prompt else f"[{pair}]" for prompt in asked]

    rows, failed = synthetic.restructure([{"note": "Tea"}, {"note": "hot"}, {"x": 1}, {"x": 2}], generate, per_prompt=2)
    assert (
        rows
        == [
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        ]
        * 2
    )
    assert failed == [2, 3]
    with pytest.raises(DataError, match="no reply held a pair for each row"):
        synthetic.restructure([{"x": 1}], lambda asked: ["[]"])


class Interrupted:
    """A model whose connection is lost after some prompts, and comes back."""

    def __init__(self, reply, after):
        self.reply, self.after, self.asked = reply, after, 0

    def __call__(self, prompts):
        if self.asked + len(prompts) > self.after:
            raise NetworkError("gone")
        self.asked += len(prompts)
        return [self.reply(prompt) for prompt in prompts]


def invented(prompt):
    return json.dumps([{"text": f"{len(prompt)} {prompt[-40:]}\u2028"}])


def pairs(prompt):
    rows = [line for line in prompt.splitlines() if line.startswith("{")]
    return json.dumps([{"question": row, "answer": "\u2028 yes"} for row in rows])


@pytest.mark.parametrize(
    ("way", "reply", "lost_after"),
    [
        (lambda kit, out: kit.invent("texts", ["text"], 6, out), invented, 4),
        (lambda kit, out: kit.make_variations([{"text": f"old {i}"} for i in range(90)], 95, out), invented, 16),
        (lambda kit, out: kit.restructure([{"n": i} for i in range(95)], out), pairs, 16),
    ],
    ids=["invent", "make_variations", "restructure"],
)
def test_what_a_model_wrote_is_not_asked_for_again(way, reply, lost_after, tmp_path):
    whole = Interrupted(reply, 1000)
    expected = way(SyntheticDataKit(whole), None)
    with pytest.raises(NetworkError):
        way(SyntheticDataKit(Interrupted(reply, lost_after)), tmp_path)
    (log,) = tmp_path.glob("*.progress.jsonl")
    log.write_bytes(log.read_bytes() + b'{"key": "cut \xe2\x80')
    rest = Interrupted(reply, 1000)
    assert way(SyntheticDataKit(rest), tmp_path) == expected
    assert rest.asked == whole.asked - lost_after
    assert way(SyntheticDataKit(Interrupted(reply, 0)), tmp_path) == expected
    rows = expected[0] if isinstance(expected, tuple) else expected
    (written,) = tmp_path.glob("*/train.jsonl")
    assert [json.loads(line) for line in written.read_bytes().splitlines()] == rows


@pytest.fixture
def site():
    """A web site: pages by path, as status, headers and body."""
    pages = {
        "/page": (200, {"Content-Type": "text/html"}, "<title>T</title><p>Käse &amp; Tee</p>".encode()),
        "/latin": (200, {"Content-Type": "text/html; charset=latin-1"}, "<p>Käse</p>".encode("latin-1")),
        "/meta": (200, {"Content-Type": "text/html"}, '<meta charset="windows-1252"><p>Käse</p>'.encode("cp1252")),
        "/text": (200, {"Content-Type": "text/plain; charset=utf-16"}, "Käse".encode("utf-16")),
        "/moved": (302, {"Location": "/page"}, b""),
        "/local": (302, {"Location": "file:///etc/passwd"}, b""),
        "/gone": (404, {}, b""),
        "/image": (200, {"Content-Type": "image/png"}, b"x"),
        "/script": (200, {"Content-Type": "text/html"}, b"<script>fill()</script>"),
        "/odd": (200, {"Content-Type": "text/html; charset=klingon"}, b"<p>x</p>"),
        "/wrong": (200, {"Content-Type": "text/html; charset=utf-8"}, b"<p>\xff</p>"),
        "/cut": (200, {"Content-Type": "text/html", "Content-Length": "1000"}, b"<p>half"),
    }

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802
            status, headers, body = pages[self.path]
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/page", "T\n\nKäse & Tee"),
        ("/latin", "Käse"),
        ("/meta", "Käse"),
        ("/text", "Käse"),
        ("/moved", "T\n\nKäse & Tee"),
    ],
)
def test_pages_of_the_web_are_documents(path, expected, site, tmp_path):
    assert documents.read_document(site + path) == expected
    assert SyntheticDataKit(model([])).chunk_data(site + path) == [expected]


@pytest.mark.parametrize(
    ("path", "error", "expected"),
    [
        ("/gone", NetworkError, "status 404"),
        ("/local", NetworkError, "status 302"),
        ("/cut", NetworkError, "IncompleteRead"),
        ("/image", DataError, "kind image/png"),
        ("/script", DataError, "no text.*scripts"),
        ("/odd", DataError, "encoding that is unknown.*klingon"),
        ("/wrong", DataError, "not utf-8 at byte 3"),
    ],
)
def test_pages_that_cannot_be_read_say_why(path, error, expected, site):
    with pytest.raises(error, match=expected) as raised:
        documents.read_document(site + path)
    assert site + path in str(raised.value) or "klingon" in str(raised.value)


def test_a_site_that_does_not_answer():
    with pytest.raises(NetworkError, match="could not be fetched.*Check the address"):
        documents.read_document("http://127.0.0.1:9/x", timeout=2)
