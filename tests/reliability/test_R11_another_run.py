"""R11, R15: other data, another base, other arguments: shown with both values, and refused unless accepted by name."""

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from unsloth.core.errors import CheckpointError, ConfigError


def resumed(runs, whole_run, tiny, tmp_path, **changes):
    changes = {"model": str(tiny()), "max_steps": 8, **changes}
    trainer = runs.build(output_dir=str(tmp_path / "out"), **changes)
    trainer.train(resume_from_checkpoint=str(whole_run[0] / "checkpoint-4"))
    return trainer


@pytest.mark.parametrize("change", ["other rows", "shuffled", "seed"])
def test_R11_other_data_is_refused(runs, whole_run, tiny, tmp_path, change):
    rows = runs.rows()
    data = {"other rows": runs.rows(10, first=1), "shuffled": [rows[1], rows[0], *rows[2:]], "seed": rows}[change]
    options = {"seed": 12} if change == "seed" else {}
    name = (
        "seed was 11, is 12" if change == "seed" else r"data was 10 rows \([0-9a-f]{12}\), is 10 rows \([0-9a-f]{12}\)"
    )
    with pytest.raises(ConfigError, match=name):
        resumed(runs, whole_run, tiny, tmp_path, data=data, **options)


def test_several_differences_are_accepted_by_name(runs, whole_run, tiny, tmp_path):
    changes = {"data": runs.rows(10, first=1), "learning_rate": 5e-4, "weight_decay": 0.1}
    with pytest.raises(ConfigError, match=r'resume_allow=\["learning_rate", "weight_decay", "data"\]'):
        resumed(runs, whole_run, tiny, tmp_path, **changes)
    allow = ["data", "learning_rate", "weight_decay"]
    trainer = resumed(runs, whole_run, tiny, tmp_path, resume_allow=allow, **changes)
    rates = {entry["step"]: entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry}
    earlier = {entry["step"]: entry["learning_rate"] for entry in whole_run[2] if "loss" in entry}
    assert rates[4] == earlier[4]
    for step in (5, 6, 7, 8):
        assert rates[step] == pytest.approx(earlier[step] / 2)
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.0, 0.1} - (
        {0.0} if len(trainer.optimizer.param_groups) == 1 else set()
    )


def test_more_steps_need_no_permission(runs, whole_run, tiny, tmp_path):
    assert resumed(runs, whole_run, tiny, tmp_path, max_steps=9).state.global_step == 9


def test_R15_another_optimizer_starts_anew_if_accepted(runs, whole_run, tiny, tmp_path):
    with pytest.raises(ConfigError, match="optim was adamw_torch, is sgd"):
        resumed(runs, whole_run, tiny, tmp_path, optim="sgd")
    trainer = resumed(runs, whole_run, tiny, tmp_path, optim="sgd", resume_allow=["optim"])
    assert isinstance(trainer.optimizer.optimizer, torch.optim.SGD)


@pytest.mark.parametrize(
    ("adapter", "shown"),
    [
        ({"r": 8}, "r was 4, is 8"),
        ({"target_modules": ["q_proj", "v_proj"]}, "target_modules was"),
        ({"lora_alpha": 32}, "lora_alpha was 16, is 32"),
    ],
)
def test_R15_another_adapter_is_refused(runs, whole_run, tiny, tmp_path, adapter, shown):
    with pytest.raises(ConfigError, match=shown):
        resumed(runs, whole_run, tiny, tmp_path, adapter=adapter)


def test_R15_other_shapes_are_refused_by_name_whatever_is_allowed(runs, whole_run, tiny, tmp_path):
    with pytest.raises(CheckpointError, match=r"q_proj.lora_A.weight is 4x64, not 8x64|is 4x\d+, not 8x\d+"):
        resumed(runs, whole_run, tiny, tmp_path, adapter={"r": 8}, resume_allow=["r"])


def test_another_base_is_refused(runs, whole_run, tiny, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny())
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.mul_(1.01)
    other = tmp_path / "other"
    model.save_pretrained(other)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (other / name).write_bytes((tiny() / name).read_bytes())
    with pytest.raises(ConfigError, match="base was .* other weights"):
        resumed(runs, whole_run, tiny, tmp_path, model=str(other))
    assert resumed(runs, whole_run, tiny, tmp_path, model=str(other), resume_allow=["base"]).state.global_step == 8


def test_checkpoints_hold_the_adapter_only_and_load_in_plain_peft(whole_run, tiny):
    folder = whole_run[0] / "checkpoint-8"
    assert not list(folder.glob("model*.safetensors"))
    assert not [path.name for path in folder.iterdir() if path.suffix in (".pt", ".pth", ".bin", ".pkl")]
    plain = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny()), folder)
    loaded = peft.get_peft_model_state_dict(plain)
    for name, value in whole_run[1].items():
        assert torch.equal(loaded[name.replace(".default", "")], value)
