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


ALL = ("SFT", "DPO", "KTO", "ORPO", "CPO", "Reward")


def test_every_trainer_is_bound_and_given_back():
    code = f"""
import trl
before = dict(vars(trl))
from unsloth import FastLanguageModel, compat
for name in {ALL}:
    for kind in ("Trainer", "Config"):
        assert getattr(trl, name + kind).__module__.startswith("unsloth.train"), name + kind
compat.unbind()
assert not compat.is_bound()
for name in {ALL}:
    for kind in ("Trainer", "Config"):
        theirs = getattr(trl, name + kind, None)
        assert theirs is None if name in ("ORPO", "CPO") else theirs.__module__.startswith("trl."), name + kind
compat.bind()
from trl import ORPOTrainer, CPOConfig
print(ORPOTrainer.__module__, CPOConfig.__module__)
"""
    assert run(code)[0] == ["unsloth.train.orpo", "unsloth.train.cpo"]


def test_calls_of_earlier_scripts_bind_and_say_so():
    code = """
from unsloth import PatchDPOTrainer, PatchFastRL
PatchDPOTrainer()
PatchFastRL("GRPO", object)
from trl import DPOTrainer
print(DPOTrainer.__module__)
"""
    found, log = run(code)
    assert found == ["unsloth.train.dpo"]
    assert log.count("is not needed any more") == 2


def test_every_configuration_takes_earlier_names(tmp_path):
    code = f"""
import unsloth
for name in {ALL}:
    config = getattr(unsloth, name + "Config")
    args = config(output_dir={str(tmp_path)!r}, warmup_ratio=0.1, evaluation_strategy="steps")
    print(args.warmup_steps, args.eval_strategy.value)
"""
    assert run(code)[0] == ["0.1", "steps"] * len(ALL)
