import subprocess
import sys


def run(*arguments, timeout=120):
    command = [sys.executable, "-m", "unsloth.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


def test_version_and_help():
    assert run("--version").stdout.startswith("unsloth 0.")
    assert "demo" in run("--help").stdout


def test_a_wrong_output_is_one_clear_sentence(tmp_path):
    (tmp_path / "file").write_text("x")
    result = run("demo", "--output", str(tmp_path / "file"))
    assert result.returncode == 1
    assert "the output folder is a file" in result.stderr
    assert "Traceback" not in result.stderr


def test_an_unknown_option_ends_with_2():
    assert run("demo", "--stepz", "3").returncode == 2
