"""``unsloth serve`` under 64 clients at once for minutes: every request is answered, and memory stays level.

``SOAK_SECONDS`` shortens it from ten minutes; by the last quarter the cache must have been filled once.
"""

import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import openai
import pytest

CLIENTS = 64
SECONDS = float(os.environ.get("SOAK_SECONDS", "600"))
CACHE = 1024  # MiB of keys and values, whose pages become resident one after the other


def resident(process: int) -> int:
    """MiB of memory that a process has."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) >> 10 for line in lines if line.startswith("VmRSS"))


def serve(folder: Path, log: Path) -> tuple[subprocess.Popen, str]:
    """A server and its address, once it takes requests."""
    command = [sys.executable, "-m", "unsloth.cli.main", "serve", str(folder), "--port", "0", "--name", "model"]
    environment = {**os.environ, "UNSLOTH_API_KEY": "the-key", "COLUMNS": "200"}
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
    end = time.monotonic() + 300
    while time.monotonic() < end and process.poll() is None:
        found = re.search(r"http://127\.0\.0\.1:\d+/v1", log.read_text())
        if found:
            return process, found[0]
        time.sleep(0.2)
    process.kill()
    raise AssertionError(log.read_text())


class Clients:
    """Threads that ask one thing after the other until the time is over; every twentieth request is left halfway."""

    def __init__(self, url: str, end: float) -> None:
        self.counts: Counter[str] = Counter()
        self._client = openai.OpenAI(base_url=url, api_key="the-key", max_retries=0, timeout=600)
        self._end, self._numbers, self._lock = end, itertools.count(), threading.Lock()

    def run(self) -> None:
        """One client."""
        while time.monotonic() < self._end:
            with self._lock:
                number = next(self._numbers)
            try:
                outcome = self._leave(number) if number % 20 == 19 else self._listen(number)
            except (openai.OpenAIError, OSError) as error:
                outcome = f"failed: {type(error).__name__} {error}"[:200]
            with self._lock:
                self.counts[outcome] += 1

    def _listen(self, number: int) -> str:
        reason, tokens = None, 0
        with self._ask(number) as stream:
            for chunk in stream:
                reason = next((choice.finish_reason for choice in chunk.choices if choice.finish_reason), reason)
                tokens = tokens if chunk.usage is None else chunk.usage.completion_tokens
        with self._lock:
            self.counts["tokens"] += tokens
        return "answered" if reason in ("stop", "length") and tokens else f"failed: {reason}, {tokens} tokens"

    def _leave(self, number: int) -> str:
        with self._ask(number) as stream:
            next(iter(stream))
        return "left"

    def _ask(self, number: int) -> openai.Stream:
        words = " ".join(f"word{number * 7 % 61}" for _ in range(1 + number % 40))
        return self._client.chat.completions.create(
            model="model",
            messages=[{"role": "user", "content": f"Say something about {words}."}],
            max_tokens=8 + number % 24,
            temperature=(number % 3) / 2,
            seed=number,
            stream=True,
            stream_options={"include_usage": True},
        )


@pytest.mark.soak
@pytest.mark.timeout(SECONDS + 600)
def test_sixty_four_streams_for_minutes(smollm2, tmp_path, capsys):
    process, url = serve(smollm2, tmp_path / "log")
    start = time.monotonic()
    clients = Clients(url, start + SECONDS)
    threads = [threading.Thread(target=clients.run, daemon=True) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    memory = []
    try:
        while any(thread.is_alive() for thread in threads):
            memory.append((time.monotonic() - start, resident(process.pid)))
            time.sleep(1)
        process.terminate()
        assert process.wait(60) in (0, -signal.SIGTERM), (tmp_path / "log").read_text()[-2000:]
    finally:
        process.kill()
    last = [mib for seconds, mib in memory if seconds >= 0.75 * SECONDS]
    with capsys.disabled():
        sys.stdout.write(
            f"\n{SECONDS:.0f} s, {CLIENTS} clients: {dict(clients.counts)}; MiB at the start {memory[0][1]}, "
            f"after three quarters {last[0]}, at the end {last[-1]}, most {max(mib for _, mib in memory)}\n"
        )
    failed = {outcome: count for outcome, count in clients.counts.items() if outcome.startswith("failed")}
    assert not failed and clients.counts["answered"] > CLIENTS and clients.counts["left"]
    assert last[-1] < memory[0][1] + CACHE + 512 and max(last[-10:]) < 1.03 * max(last[:10]) + 16
