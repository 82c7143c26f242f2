import pytest
from typer.testing import CliRunner

from unsloth.cli.main import app
from unsloth.core import artifact
from unsloth.core.errors import CheckpointError, ConfigError
from unsloth.train import lock


@pytest.fixture
def output(tmp_path):
    """Checkpoints of steps 2 to 8; the one of step 4 is the best, that of step 6 is damaged."""
    for serial, step in enumerate((2, 4, 6, 8), start=1):
        details = {"step": step, "serial": serial, "epoch": step / 4, "states": []}
        with artifact.stage(tmp_path / f"checkpoint-{step}", kind="checkpoint", details=details) as folder:
            (folder / "adapter_model.safetensors").write_bytes(bytes(1000))
            (folder / "trainer_state.json").write_text(f'{{"best_model_checkpoint": "{tmp_path}/checkpoint-4"}}')
    (tmp_path / "checkpoint-6" / "adapter_model.safetensors").write_bytes(bytes(999) + b"1")
    return tmp_path


def invoke(*arguments):
    return CliRunner().invoke(app, ["checkpoints", *map(str, arguments)])


def test_listing_reads_no_files(output):
    result = invoke(output)
    assert result.exit_code == 0
    lines = [line.split() for line in result.output.splitlines()]
    assert [line[0] for line in lines[1:]] == [f"checkpoint-{step}" for step in (2, 4, 6, 8)]
    assert lines[2][-1] == "(best)"
    assert "complete" in result.output
    assert "SHA" not in result.output


def test_verifying_names_the_file_and_fails(output):
    result = invoke(output, "--verify")
    assert isinstance(result.exception, CheckpointError)
    assert "adapter_model.safetensors" in result.output
    assert "1 of 4 checkpoints cannot be resumed from: checkpoint-6" in str(result.exception)


def test_pruning_keeps_the_newest_whole_ones_and_the_best(output):
    result = invoke(output, "--prune", 1)
    assert result.exit_code == 0, result.exception
    assert sorted(path.name for path in output.iterdir()) == ["checkpoint-4", "checkpoint-8"]


def test_pruning_waits_for_no_run(output):
    with lock.held(output):
        result = invoke(output, "--prune", 1)
    assert "another run is writing" in str(result.exception)
    assert len(list(output.glob("checkpoint-*"))) == 4


def test_nothing_there(tmp_path):
    assert "no checkpoints" in invoke(tmp_path).output
    assert isinstance(invoke(tmp_path / "absent").exception, ConfigError)
