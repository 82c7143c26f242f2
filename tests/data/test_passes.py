"""A pass gives the same tokens in one process and in several, from memory and from a file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest
from datasets import Dataset

from unsloth.core.errors import DataError
from unsloth.data import formats, passes
from unsloth.data.encode import Encoder, PrepareOptions
from unsloth.data.sources import load_rows


def rows_of(count):
    return [
        {"messages": [{"role": "user", "content": f"q {n}"}, {"role": "assistant", "content": "a" * (n % 7)}]}
        for n in range(count)
    ]


def encoder_of(tokenizer, rows, **options):
    return Encoder(tokenizer, formats.detect(list(rows[0])), PrepareOptions(max_length=None, **options))


@pytest.fixture(params=["list", "data set", "file"])
def rows(request, tmp_path):
    made = rows_of(passes.BATCH * 2 + 77)
    if request.param == "data set":
        return Dataset.from_list(made)
    if request.param == "list":
        return made
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, made)))
    return load_rows(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("in_memory", [1 << 30, 0], ids=["in memory", "on disk"])
@pytest.mark.parametrize("workers", [None, 3])
def test_every_way_gives_the_same_rows_in_order(rows, workers, in_memory, tokenizer):
    encoder = encoder_of(tokenizer, list(rows), train_on="responses", num_proc=workers)
    expected = encoder.encode(list(rows), range(len(rows)))
    made = passes.encoded(rows, encoder, in_memory=in_memory)
    for name, column in expected.items():
        assert made[name][:] == column


def test_what_is_on_the_disk_is_gone_with_the_data_set_and_readable_until_then(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    rows = rows_of(40)
    made = passes.encoded(rows, encoder_of(tokenizer, rows), in_memory=0)
    assert list(tmp_path.iterdir()) == []
    assert len(made[39]["input_ids"]) > 3


def test_workers_end_when_the_reader_does(tokenizer):
    rows = rows_of(passes.BATCH * 4)
    rows[passes.BATCH + 3]["messages"][0]["role"] = "wizard"
    with pytest.raises(DataError, match=f"row {passes.BATCH + 3}, message 0: unknown role.*wizard"):
        passes.encoded(rows, encoder_of(tokenizer, rows, num_proc=2))
    children = open(f"/proc/self/task/{os.getpid()}/children").read().split()  # noqa: SIM115
    names = [open(f"/proc/{pid}/cmdline", "rb").read() for pid in children]  # noqa: SIM115
    assert not any(b"multiprocessing" in name and b"fork" in name for name in names)


def test_a_large_file_is_read_in_bounded_memory(tmp_path):
    """150 MB of JSON Lines, with a ceiling on the memory above what the libraries need; a larger file needs no more."""
    program = textwrap.dedent("""
        import json, resource, sys
        from conftest import byte_tokenizer
        from unsloth.data.encode import PrepareOptions
        from unsloth.data.prepare import prepare
        path, line = sys.argv[1], json.dumps({"text": "word " * 100, "more": "x" * 99_500})
        with open(path, "w") as file:
            for _ in range(1500):
                file.write(line + "\\n")
        tokenizer = byte_tokenizer()
        prepare([{"text": "a"}] * 9, tokenizer, PrepareOptions(max_length=64))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        dataset, report = prepare(path, tokenizer, PrepareOptions(max_length=64))
        assert len(dataset) == 1500 and report.truncated == 1500
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
    """)
    path = os.pathsep.join([os.path.dirname(os.path.dirname(__file__)), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "large.jsonl")],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < 80
