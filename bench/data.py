"""A million short rows from a JSON Lines file to tokens and labels: rows a second, processor time a row, memory.

Three kinds of rows: ``text`` (12 words), ``chat`` (a question of 10 words and an answer of 14, answers trained) and
``talk`` (two exchanges). The template is ChatML, the tokenizer that of SmolLM2 (49,152 tokens, byte-level BPE). Each
case runs in a process of its own, whose peak of resident memory is reported beside what it had before the rows came.
Processor time, unlike wall time, says something on a machine that others use too. ``--reference`` renders every row
instead.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = (
    "the quick brown fox jumps over a lazy dog while seven wizards mix potions under cold moonlight and nobody knows "
    "why people write programs that count their own words instead of reading something new for once in summer"
).split()
KINDS = ("text", "chat", "talk")


def write(path: Path, kind: str, rows: int) -> None:
    """Write ``rows`` random rows."""
    draw = random.Random(0)

    def words(count: int) -> str:
        return " ".join(draw.choices(WORDS, k=count))

    with path.open("w") as file:
        for _ in range(rows):
            turns = [("user", 10), ("assistant", 14)] * (1 if kind == "chat" else 2)
            row = {"text": words(12)}
            if kind != "text":
                row = {"messages": [{"role": role, "content": words(count)} for role, count in turns]}
            file.write(json.dumps(row) + "\n")


def resident(field: str) -> float:
    """Megabytes of ``VmRSS`` (now) or ``VmHWM`` (peak) of this process."""
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def processor_seconds() -> float:
    """Of this process and its ended children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def case(path: Path, kind: str, workers: int | None, reference: bool, packing: bool) -> None:
    """Prepare the file's rows, and print what it took."""
    from transformers import AutoTokenizer

    from unsloth.data.encode import PrepareOptions
    from unsloth.data.prepare import prepare
    from unsloth.models import embedded

    tokenizer = AutoTokenizer.from_pretrained(embedded.folder())
    train_on = "all" if kind == "text" else "responses"
    options = PrepareOptions(
        max_length=512, train_on=train_on, num_proc=workers, outlines=not reference, packing=packing
    )
    before, started, used = resident("VmRSS"), time.monotonic(), processor_seconds()
    dataset, report = prepare(path, tokenizer, options)
    wall, processor, peak = time.monotonic() - started, processor_seconds() - used, resident("VmHWM")
    rows = report.rows
    print(
        f"{kind:5s} workers={workers or 1} {'reference ' if reference else ''}{'packed ' if packing else ''}"
        f"{rows:,} rows, {report.tokens / rows:.0f} tokens a row: {rows / wall:,.0f} rows/s, "
        f"{processor / rows * 1e6:.0f} us of processor a row ({2 * rows / processor:,.0f} rows/s if two cores are "
        f"free), resident {before:,.0f} MB before, {peak:,.0f} MB at most; {len(dataset):,} rows out"
    )


def main() -> None:
    """Run the cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--workers", type=int, default=None)
    parser.add_argument("--reference", action="store_true")
    parser.add_argument("--packing", action="store_true")
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.file:
        case(given.file, given.kinds[0], given.workers, given.reference, given.packing)
        return
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        for kind in given.kinds:
            path = Path(folder) / f"{kind}.jsonl"
            write(path, kind, given.rows)
            same = [argument for argument in sys.argv[1:] if argument not in ("--kinds", *KINDS)]
            command = [sys.executable, __file__, *same, "--kinds", kind, "--file", str(path)]
            subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
            path.unlink()


if __name__ == "__main__":
    main()
