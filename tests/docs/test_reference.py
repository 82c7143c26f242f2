import importlib.util
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_the_reference_is_what_the_docstrings_say():
    spec = importlib.util.spec_from_file_location("generate_reference", DOCS / "generate_reference.py")
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    assert (DOCS / "reference.md").read_text(encoding="utf-8") == generator.reference(), (
        "run python docs/generate_reference.py"
    )
