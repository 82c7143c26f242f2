"""A kernel or container that refuses parts of the boundary: refused with the reason, or weaker because asked for."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from unsloth.core.errors import ConfigError, SandboxUnavailableError
from unsloth.rewards import SandboxConfig, SandboxedFunction, call_reward, create_locked_down_function

PROGRAMS = runpy.run_path(str(Path(__file__).with_name("hostile_programs.py")))["PROGRAMS"]
SOURCE = "def f(x):\n    return x + 1"
FILES = ("open_read", "open_write", "os_mkdir", "os_symlink", "os_remove", "os_listdir")

# Installs a filter as a container's would be: the given system calls fail. Then asks for a sandbox.
CONTAINED = """
import ctypes, errno, json, struct, sys
refused = json.loads(sys.argv[1])
lines = [(0x20, 0, 0, 0)]
for number, argument, code in refused:
    if argument is None:
        lines += [(0x15, 0, 1, number), (6, 0, 0, 0x50000 | code)]
    else:
        lines += [(0x15, 0, 3, number), (0x20, 0, 0, 16), (0x15, 0, 1, argument), (6, 0, 0, 0x50000 | code),
                  (0x20, 0, 0, 0)]
lines.append((6, 0, 0, 0x7FFF0000))
code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in lines))
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(Program(len(lines), ctypes.addressof(code))), 0, 0) == 0
from unsloth.rewards import SandboxConfig, SandboxedFunction
found = {}
for level in ("strict", "standard", "process"):
    outcome = SandboxedFunction.attempt("def f(x):\\n    return x + 1", config=SandboxConfig(level=level))
    value = outcome.value.run(1).value if outcome.value else None
    found[level] = [outcome.status, str(outcome.error), value]
print(json.dumps(found))
"""
EPERM, ENOSYS, EINVAL = 1, 38, 22
X86 = pytest.mark.skipif(
    not sys.platform.startswith("linux") or __import__("platform").machine() != "x86_64",
    reason="the filter of this test is written for Linux on x86-64",
)


def contained(refused):
    result = subprocess.run(
        [sys.executable, "-c", CONTAINED, json.dumps(refused)], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@X86
def test_without_namespaces_and_landlock_the_standard_level_holds():
    found = contained([[272, None, EPERM], [444, None, ENOSYS]])  # unshare, landlock_create_ruleset
    assert found["strict"][0] == "infra" and "namespaces: unshare" in found["strict"][1]
    assert "Landlock" in found["strict"][1]
    assert found["standard"] == ["ok", "None", 2]


@X86
def test_where_seccomp_is_refused_it_fails_closed_with_the_reason():
    found = contained([[157, 22, EINVAL]])  # prctl(PR_SET_SECCOMP)
    status, message, value = found["standard"]
    assert status == "infra" and value is None
    assert "seccomp: the kernel refused the filter (Invalid argument)" in message
    assert 'SandboxConfig(level="process")' in message and "Do not score this as 0" in message
    assert found["process"] == ["ok", "None", 2]


@pytest.mark.parametrize(
    ("level", "without", "named"),
    [
        ("standard", ("seccomp",), "seccomp"),
        ("standard", ("limits",), "limits"),
        ("standard", ("capabilities",), "capabilities"),
        ("strict", ("landlock",), "landlock"),
        ("strict", ("namespaces",), "empty_root: needs namespaces"),
        ("process", ("limits",), "limits"),
    ],
)
def test_a_missing_layer_fails_closed(level, without, named):
    with pytest.raises(SandboxUnavailableError, match=named):
        create_locked_down_function(SOURCE, config=SandboxConfig(level=level, without=without))


def test_nothing_of_the_source_runs_without_the_boundary(tmp_path):
    source = PROGRAMS["open_write"].replace("WRITE", str(tmp_path / "made")) + "\nf(1)"
    outcome = SandboxedFunction.attempt(source, config=SandboxConfig(without=("seccomp", "landlock", "namespaces")))
    assert outcome.status == "infra"
    assert list(tmp_path.iterdir()) == []


def test_a_reward_without_its_boundary_is_masked_not_scored():
    def reward(completions, **columns):
        scores = []
        for _ in completions:
            try:
                create_locked_down_function(SOURCE, config=SandboxConfig(without=("seccomp",)))
                scores.append(1.0)
            except Exception:  # noqa: BLE001 - as scripts do
                scores.append(-3.0)
        return scores

    column = call_reward(reward, ["p", "p"], ["a", "b"])
    assert [value != value for value in column.values] == [True, True]
    assert column.infra == 2 and "seccomp" in column.masked[0]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "config",
    [
        SandboxConfig(without=("namespaces", "empty_root", "landlock")),
        SandboxConfig(level="process", without=("namespaces", "empty_root", "seccomp")),
        SandboxConfig(level="process", without=("landlock", "seccomp")),
    ],
    ids=["seccomp alone", "landlock alone", "namespaces alone"],
)
def test_each_layer_alone_keeps_files_away(name, config, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("hidden")
    source = PROGRAMS[name].replace("READ", str(secret)).replace("WRITE", str(tmp_path / "made"))
    function = SandboxedFunction(source, "f", config=config)
    layer = {"namespaces": "empty_root"}.get(config.without[0], "landlock")
    if "seccomp" in config.without and function.boundary["landlock"] and function.boundary["empty_root"]:
        pytest.skip(f"this kernel gives no {layer}")
    outcome = function.run(1)
    if name == "os_listdir" and outcome.status == "ok":  # the empty root may be listed: there is nothing
        assert outcome.value == []
    else:
        assert outcome.status == "error" and isinstance(outcome.error, OSError)
    assert secret.read_text() == "hidden"
    assert [path.name for path in tmp_path.iterdir()] == ["secret.txt"]


def test_the_boundary_tells_what_holds():
    function = SandboxedFunction(SOURCE, config=SandboxConfig(without=("landlock",)))
    assert function.boundary["seccomp"] == "" and function.boundary["limits"] == ""
    assert function.boundary["landlock"] == "switched off by the configuration"


@pytest.mark.parametrize(
    "arguments",
    [
        {"level": "weak"},
        {"seconds": 0},
        {"seconds": 500},
        {"memory_bytes": -1},
        {"without": ("firewall",)},
        {"seconds": float("nan")},
        {"seconds": True},
    ],
)
def test_impossible_settings_are_refused(arguments):
    with pytest.raises(ConfigError):
        SandboxConfig(**arguments)
