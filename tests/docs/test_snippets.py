"""Every Python block of the documentation runs: a page's blocks in order, in one namespace, in an empty folder.

Only names of models and data sets are exchanged, for a tiny model and a few local rows.
"""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODELS = ("HuggingFaceTB/SmolLM2-135M-Instruct", "embedded:SmolLM2-135M-Instruct")
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[str]:
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def write_rows(folder: Path, rows: list[dict]) -> str:
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(folder)


@pytest.fixture(scope="module")
def exchanged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What is written in the documentation, and what runs in its place."""
    spec = importlib.util.spec_from_file_location("shared_parts", ROOT / "tests" / "conftest.py")
    assert spec and spec.loader
    shared = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shared)
    folder = tmp_path_factory.mktemp("documented")
    model = str(shared.make_tiny(folder / "model", positions=8192))
    chat = [
        {"conversations": [{"from": "human", "value": f"Count to {n}."}, {"from": "gpt", "value": f"One to {n}."}]}
        for n in range(24)
    ]
    alpaca = [{"instruction": f"Add {n} and 1.", "input": "", "output": str(n + 1)} for n in range(24)]
    stories = [{"text": f"There once were {n} ducks. They swam away, and came back."} for n in range(24)]
    return {
        **dict.fromkeys(MODELS, model),
        "mlabonne/FineTome-100k": write_rows(folder / "chat", chat),
        "yahma/alpaca-cleaned": write_rows(folder / "alpaca", alpaca),
        "roneneldan/TinyStories": write_rows(folder / "stories", stories),
    }


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_every_snippet_runs(page, exchanged, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for number, code in enumerate(blocks(page), start=1):
        for written, run in exchanged.items():
            code = code.replace(f'"{written}"', repr(run))
        exec(compile(code, f"{page.name}, Python block {number}", "exec"), namespace)
