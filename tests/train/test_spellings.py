import pytest

from unsloth.core.errors import ConfigError
from unsloth.train.config import SFTConfig, TrainingArguments


@pytest.mark.parametrize("kind", [SFTConfig, TrainingArguments])
@pytest.mark.parametrize(
    ("earlier", "today"),
    [
        ({"evaluation_strategy": "steps", "evaluation_steps": 7}, {"eval_strategy": "steps", "eval_steps": 7}),
        ({"warmup_ratio": 0.1}, {"warmup_steps": 0.1}),
        ({"group_by_length": True}, {"train_sampling_strategy": "group_by_length"}),
        ({"group_by_length": False}, {"train_sampling_strategy": "random"}),
        ({"per_gpu_train_batch_size": 3}, {"per_device_train_batch_size": 3}),
        ({"max_steps": None}, {"max_steps": -1}),
        ({"num_train_epochs": None, "max_steps": 5}, {"num_train_epochs": 3.0, "max_steps": 5}),
        ({"adafactor": True}, {"optim": "adafactor"}),
        ({"include_inputs_for_metrics": True}, {"include_for_metrics": ["inputs"]}),
        ({"logging_dir": "logs"}, {"logging_dir": "logs"}),
        ({"save_safetensors": True, "overwrite_output_dir": True, "fp16_opt_level": "O1"}, {}),
    ],
)
def test_earlier_names_mean_what_they_meant(tmp_path, kind, earlier, today):
    args = kind(output_dir=str(tmp_path), **earlier)
    assert {name: getattr(args, name) for name in today} == today


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learnig_rate": 1e-4}, "learnig_rate.*learning_rate"),
        ({"save_safetensors": False}, "pickle"),
        ({"eval_strategy": "no", "evaluation_strategy": "steps"}, "eval_strategy was given twice"),
        ({"embedding_learning_rate": 0.0}, "embedding_learning_rate must be positive"),
        ({"max_length": 5, "max_seq_length": 6}, "contradict"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path, arguments, message):
    with pytest.raises(ConfigError, match=message):
        SFTConfig(output_dir=str(tmp_path), **arguments)


@pytest.mark.parametrize("kind", [SFTConfig, TrainingArguments])
def test_bfloat16_can_be_asked_for_on_the_cpu(tmp_path, kind):
    assert kind(output_dir=str(tmp_path), bf16=True).bf16
