"""Every kernel compiles for every architecture we promise, on a machine without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import unsloth

# sm_75 has no bfloat16 arithmetic, so float16 stands for it.
TARGETS = [(75, "fp16"), (80, "bf16"), (90, "bf16"), (100, "bf16")]


@pytest.mark.parametrize(("sm", "dtype"), TARGETS)
def test_kernels_compile(sm: int, dtype: str) -> None:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(Path(unsloth.__file__).parents[1]), env.get("PYTHONPATH", "")])
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run([sys.executable, str(script), str(sm), dtype], env=env, capture_output=True, text=True)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    errors = [row for row in rows if "error" in row]
    assert not errors, "\n".join(f"{row.get('kernel', row['module'])}: {row['error']}" for row in errors)
    assert done.returncode == 0, done.stderr[-4000:]
    assert all(row["cubin"] > 0 for row in rows)
