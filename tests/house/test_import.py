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
import torch, transformers, peft, trl, bitsandbytes, datasets
from peft.tuners import lora
from transformers.models.llama import modeling_llama

def snapshot():
    found = {}
    for module in (torch.nn, transformers, peft, trl, bitsandbytes, datasets, lora, modeling_llama):
        for name, value in list(vars(module).items()):
            found[module.__name__, name] = id(value)
            if isinstance(value, type):
                found.update({(module.__name__, name, key): id(v) for key, v in vars(value).items() if callable(v)})
    return found

# transformers resolves its names lazily, so every name that exists before is resolved before
for module in (transformers, trl):
    for name in ("AutoModelForCausalLM", "AutoTokenizer", "Trainer", "SFTTrainer", "SFTConfig", "TrainingArguments"):
        getattr(module, name, None)
before = snapshot()
import unsloth
[getattr(unsloth, name) for name in unsloth.__all__]
model, _ = unsloth.FastLanguageModel.from_pretrained(FOLDER, max_seq_length=64)
unsloth.FastLanguageModel.get_peft_model(model)
after = snapshot()
print(sorted(key for key in before if after.get(key) != before[key]))
"""


def test_nothing_of_other_libraries_is_changed(tiny):
    assert run(f"FOLDER = {str(tiny())!r}\n{UNCHANGED}").splitlines()[-1] == "[]"
