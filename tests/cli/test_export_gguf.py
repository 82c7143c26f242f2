import re

import pytest
from typer.testing import CliRunner

from unsloth.cli.export_gguf import GgufOptions, export
from unsloth.cli.main import app
from unsloth.core.errors import ConfigError
from unsloth.export.gguf import forecast


def test_files_are_written_and_what_was_found_is_said(tiny, tmp_path, capsys):
    export(GgufOptions(name=str(tiny()), out=str(tmp_path / "out"), methods=("q8_0", "F16")))
    printed = capsys.readouterr().out.replace("\n", "")
    assert "Q8_0.gguf: 20 tensors (15 Q8_0, 5 F32)" in printed and "F16.gguf" in printed
    assert len(list((tmp_path / "out").glob("*.gguf"))) == 2 and (tmp_path / "out" / "Modelfile").is_file()


def test_the_command(tiny, tmp_path):
    command = ["export", str(tiny()), str(tmp_path / "out"), "--format", "gguf", "-q", "q4_0"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert [path.name.rsplit(".", 2)[1] for path in (tmp_path / "out").glob("*.gguf")] == ["Q4_0"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--format", "gguf", "-q", "q4"], "q4_k_m"),
        (["--format", "onnx"], "gguf"),
        (["--format", "gguf", "--method", "lora", "--dry-run"], "dry"),
        (["--format", "gguf", "--max-shard-size", "4 apples"], "max_shard_size"),
        (["--format", "gguf", "--base-weight", "2"], "base_weight"),
    ],
)
def test_mistakes_are_known_before_a_model_is_loaded(more, message, tmp_path):
    result = CliRunner().invoke(app, ["export", "no/such-model", str(tmp_path / "out"), *more])
    assert isinstance(result.exception, ConfigError) and message in str(result.exception)


def test_a_dry_run_writes_nothing_and_knows_the_sizes(tiny, tmp_path):
    command = ["export", str(tiny()), str(tmp_path / "out"), "--format", "gguf", "--push-to", "me/model"]
    command += [part for name in ("q8_0", "q4_k_m", "iq2_xxs", "UD-Q4_K_XL") for part in ("-q", name)]
    result = CliRunner().invoke(app, [*command, "--dry-run"])
    assert result.exit_code == 0, result.output
    assert list(tmp_path.iterdir()) == [] and "me/model, private" in result.output
    text = re.sub(r"\s+", " ", result.output)
    assert "14 tensors in another type" in text and "importance matrix measured on conversations that ship" in text
    made = forecast.of_model(str(tiny()), tmp_path / "out", ["q8_0", "q4_k_m"])
    export(GgufOptions(name=str(tiny()), out=str(tmp_path / "out"), methods=("q8_0", "q4_k_m")))
    for file in made.files:
        (path,) = (tmp_path / "out").glob(f"*.{file.method.upper()}.gguf")
        header = 20_000  # tokens and merges
        assert file.nbytes < path.stat().st_size < file.nbytes + header
    assert made.fits and [file.replaced for file in made.files] == [0, 14]
