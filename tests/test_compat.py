import subprocess
import sys

import pytest

HEADER = "import logging; logging.basicConfig()\n"


def run(code, compat="1"):
    result = subprocess.run(
        [sys.executable, "-c", f"import os; os.environ['UNSLOTH_TRL_COMPAT'] = {compat!r}\n{code}"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split(), result.stderr


WHERE = "print(SFTTrainer.__module__, SFTConfig.__module__, TrainingArguments.__module__)"


@pytest.mark.parametrize(
    ("code", "trainer"),
    [
        ("from unsloth import FastLanguageModel\nfrom trl import SFTTrainer, SFTConfig", "unsloth.train.sft"),
        ("import unsloth\nfrom trl import SFTTrainer, SFTConfig", "trl.trainer.sft_trainer"),
        (
            "from unsloth import FastLanguageModel, compat\ncompat.unbind()\nfrom trl import SFTTrainer, SFTConfig",
            "trl.trainer.sft_trainer",
        ),
    ],
)
def test_trl_names_mean_ours_from_the_first_model_class_on(code, trainer):
    found, _ = run(f"{code}\nfrom transformers import TrainingArguments\n{WHERE}")
    ours = trainer.startswith("unsloth")
    assert found[0] == trainer
    assert [module.startswith("unsloth") for module in found] == [ours] * 3


def test_the_switch_leaves_everything_alone():
    code = (
        "from unsloth import FastLanguageModel\nfrom trl import SFTTrainer, SFTConfig\n"
        f"from transformers import TrainingArguments\n{WHERE}"
    )
    found, _ = run(code, compat="0")
    assert not any(module.startswith("unsloth") for module in found)


def test_an_early_import_is_warned_of():
    _, log = run("from trl import SFTTrainer\nfrom unsloth import FastLanguageModel")
    assert "SFTTrainer was imported from trl before unsloth" in log
    _, log = run("import trl\nfrom unsloth import FastLanguageModel")
    assert "was imported from trl before" not in log
