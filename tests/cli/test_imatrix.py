"""``unsloth imatrix``, and dynamic types through ``unsloth export``."""

import json

import pytest
from typer.testing import CliRunner

from unsloth.cli.main import app
from unsloth.core.errors import ConfigError
from unsloth.export.gguf import quantize


def test_a_matrix_is_written_and_used(tiny, conversations, tmp_path):
    data, matrix = tmp_path / "rows.jsonl", tmp_path / "matrix.gguf"
    data.write_text("\n".join(map(json.dumps, conversations)))
    result = CliRunner().invoke(app, ["imatrix", str(tiny()), str(matrix), "--data", str(data), "--tokens", "200"])
    assert result.exit_code == 0, result.output
    assert len(quantize.read_imatrix(matrix)) == 14
    command = ["export", str(tiny()), str(tmp_path / "out"), "--format", "gguf", "-q", "q4_0", "--imatrix", str(matrix)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["details"]["importance"] == "matrix.gguf"


def test_a_dynamic_type(tiny, conversations, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, conversations)))
    command = ["export", str(tiny()), str(tmp_path / "out"), "--format", "gguf", "-q", "dynamic_q4_k_xl"]
    result = CliRunner().invoke(app, [*command, "--data", str(data)])
    assert result.exit_code == 0, result.output
    assert next((tmp_path / "out").glob("*.gguf")).name.endswith(".UD-Q4_K_XL.gguf")


@pytest.mark.parametrize(
    "command",
    [["imatrix", "no/such-model", "matrix.bin"], ["export", "no/such", "out", "--format", "gguf", "-q", "ud-f16"]],
)
def test_mistakes_are_known_before_a_model_is_loaded(command):
    assert isinstance(CliRunner().invoke(app, command).exception, ConfigError)
