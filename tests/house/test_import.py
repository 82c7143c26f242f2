import subprocess
import sys


def test_importing_loads_no_torch_and_every_public_name_resolves():
    code = "import sys, unsloth; print([m for m in ('torch', 'transformers', 'trl', 'peft') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
    import unsloth

    for name in unsloth.__all__:
        assert getattr(unsloth, name) is not None
