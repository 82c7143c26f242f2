import subprocess
import sys

import pytest


def run(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_importing_loads_no_torch():
    assert run("import sys, unsloth; print([m for m in ('torch', 'transformers', 'trl') if m in sys.modules])") == "[]"


def test_every_public_name_resolves():
    import unsloth

    assert set(unsloth.__all__) <= set(dir(unsloth))
    for name in unsloth.__all__:
        assert getattr(unsloth, name) is not None
    with pytest.raises(AttributeError, match="FastCarModel"):
        _ = unsloth.FastCarModel


UNCHANGED = """
import sys, torch, peft, trl, bitsandbytes, datasets
from peft.tuners import lora
from transformers.models.llama import modeling_llama

# transformers resolves its names lazily, and is another module object after peft is imported
transformers = sys.modules["transformers"]
LAZY = ("AutoModelForCausalLM", "AutoTokenizer", "Trainer", "TrainingArguments")
METHODS = ("SFT", "DPO", "KTO", "ORPO", "CPO", "Reward")
LAZY += tuple(f"{name}{kind}" for name in METHODS for kind in ("Trainer", "Config"))

def snapshot():
    found = {}
    for module in (transformers, trl):
        found.update({(module.__name__, name): id(getattr(module, name, None)) for name in LAZY})
    for module in (torch.nn, transformers, peft, trl, bitsandbytes, datasets, lora, modeling_llama):
        for name, value in list(vars(module).items()):
            found[module.__name__, name] = id(value)
            if isinstance(value, type):
                found.update({(module.__name__, name, key): id(v) for key, v in vars(value).items() if callable(v)})
    return found

before = snapshot()
import unsloth
[getattr(unsloth, name) for name in unsloth.__all__]
model, _ = unsloth.FastLanguageModel.from_pretrained(FOLDER, max_seq_length=64)
unsloth.FastLanguageModel.get_peft_model(model)
after = snapshot()
changed = [key for key in before if after.get(key) != before[key]]
print(sorted(key for key in changed if len(key) == 2 or key[:2] not in changed))
"""


METHODS = ("CPO", "DPO", "KTO", "ORPO", "Reward", "SFT")
BOUND = ["transformers.TrainingArguments", *(f"trl.{name}{kind}" for name in METHODS for kind in ("Config", "Trainer"))]


@pytest.mark.parametrize(("switch", "changed"), [("0", []), ("1", BOUND)])
def test_nothing_else_of_other_libraries_is_changed(tiny, switch, changed):
    code = f"import os; os.environ['UNSLOTH_TRL_COMPAT'] = {switch!r}; FOLDER = {str(tiny())!r}\n{UNCHANGED}"
    assert run(code).splitlines()[-1] == str([tuple(name.rsplit(".", 1)) for name in changed])
