import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl.trainer.reward_trainer import RewardTrainer as TRLTrainer

from unsloth import RewardConfig, RewardTrainer
from unsloth.core.errors import ConfigError, DataError

ROWS = [
    {"prompt": f"Say {i}:", "chosen": f" yes {i}", "rejected": f" no, never {i}", "margin": i / 10} for i in range(12)
]


def classifier(folder):
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)


def config(tmp_path, **changes):
    settings = {
        "max_steps": 12,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
    }
    return RewardConfig(output_dir=str(tmp_path), **{**settings, **changes})


def test_it_learns_to_score(tiny, tokenizer, tmp_path):
    trainer = RewardTrainer(
        model=classifier(tiny()),
        tokenizer=tokenizer,
        train_dataset=ROWS,
        eval_dataset=ROWS,
        args=config(tmp_path, center_rewards_coefficient=0.01),
        peft_config=LoraConfig(
            r=4, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS", modules_to_save=["score"]
        ),
    )
    assert isinstance(trainer, TRLTrainer)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate(ROWS)
    assert after["eval_accuracy"] == 1 and after["eval_margin"] > before["eval_margin"] + 0.5
    assert after["eval_loss"] < before["eval_loss"]


def test_margins_are_asked_for(tiny, tokenizer, tmp_path):
    losses = {}
    for name, rows in (("with", ROWS), ("without", [{k: v for k, v in r.items() if k != "margin"} for r in ROWS])):
        trainer = RewardTrainer(
            model=classifier(tiny()), tokenizer=tokenizer, train_dataset=rows, args=config(tmp_path)
        )
        batch = trainer.data_collator(list(trainer.train_dataset))
        losses[name] = trainer.compute_loss(trainer.model, batch).item()
    assert losses["with"] > losses["without"] + 0.1


def test_what_is_no_reward_model_is_refused(tiny, tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="one output.*LlamaForCausalLM.*num_labels=1"):
        model = AutoModelForCausalLM.from_pretrained(tiny())
        RewardTrainer(model=model, tokenizer=tokenizer, train_dataset=ROWS, args=config(tmp_path))
    with pytest.raises(DataError, match="no column 'rejected'"):
        RewardTrainer(
            model=classifier(tiny()), tokenizer=tokenizer, train_dataset=[{"chosen": "a"}], args=config(tmp_path)
        )
