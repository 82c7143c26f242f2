"""D05: broken and unusual files are read, or refused with the line and what to do."""

import gzip
import json

import pytest

from unsloth.core.errors import DataError
from unsloth.data.encode import PrepareOptions
from unsloth.data.prepare import prepare
from unsloth.data.sources import load_rows

GOOD = b'{"text": "a"}\n'


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("cut.jsonl", GOOD * 6 + b'{"text": "b\n' + GOOD, "line 7: no valid JSON at column"),
        ("value.jsonl", GOOD + b'"text"\n', "line 2: a row must be a mapping"),
        ("latin.jsonl", GOOD * 2 + '{"text": "é"}\n'.encode("latin-1"), "line 3: the bytes are not UTF-8"),
        ("half.jsonl", GOOD + b'{"text": "\\ud83d"}\n', "line 2: half of a surrogate pair"),
        ("empty.jsonl", b"", "empty"),
        ("blank.jsonl", b"\xef\xbb\xbf\n \r\n", "no rows"),
        ("cut.jsonl.gz", gzip.compress(GOOD * 100, mtime=0)[:-9], "no complete gzip file"),
        ("cut.json", b'[{"text": "a"},\n{"text": }]', "line 2: no valid JSON"),
        ("empty.csv", b"", "empty"),
        ("head.csv", b"text,n\n", "no rows"),
        ("twice.csv", b"text,text\na,b\n", "two columns have one name"),
        ("wide.csv", b"text,n\na,1\nb,2,3\n", "line 3.*3 cells instead of 2"),
        ("narrow.csv", b"text,n\na\n", "1 cells instead of 2"),
        ("latin.csv", "text\na\né\n".encode("latin-1"), "line 3: the bytes are not UTF-8"),
        ("bad.parquet", b"PAR1 and nothing", "no complete Parquet file"),
        ("bad.xlsx", b"not a workbook", "no Excel file"),
    ],
)
def test_the_line_and_the_remedy_are_named(tmp_path, name, content, expected):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=expected) as raised:
        list(load_rows(path))
    message = str(raised.value)
    assert name in message and len(message.splitlines()) <= 5
    assert message.rstrip().endswith((".", ")")) and ". " in message


def test_a_broken_line_is_named_by_the_preparation_too(tmp_path, tokenizer):
    path = tmp_path / "late.jsonl"
    path.write_bytes(GOOD * 700 + b"{\n")
    with pytest.raises(DataError, match="line 701"):
        prepare(path, tokenizer, PrepareOptions(max_length=16))


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_byte_order_marks_line_ends_and_surrogate_pairs_are_read(tmp_path, line_end, mark):
    path = tmp_path / "good.jsonl"
    path.write_bytes(mark + line_end.join([b'{"text": "\\ud83d\\ude00 \xc3\xa9"}', b"", b'{"text": "b"}']))
    assert [row["text"] for row in load_rows(path)] == ["😀 é", "b"]


def test_a_row_of_ten_megabytes(tmp_path, tokenizer):
    text = "word " * 2_000_000
    (tmp_path / "big.jsonl").write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": "b"}))
    (tmp_path / "big.csv").write_text(f'text,n\n"{text}",1\n')
    assert load_rows(tmp_path / "big.jsonl")[0]["text"] == text
    assert load_rows(tmp_path / "big.csv")[0]["text"] == text
