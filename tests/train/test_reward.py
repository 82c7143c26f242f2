import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl.trainer.reward_trainer import RewardTrainer as TRLTrainer

from unsloth import FastLanguageModel, RewardConfig, RewardTrainer
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


@pytest.mark.parametrize("how", ["load_in_4bit", "load_in_16bit", "full_finetuning"])
def test_a_language_model_becomes_a_reward_model(tiny, tokenizer, tmp_path, how):
    head = {"auto_model": AutoModelForSequenceClassification, "num_labels": 1}
    made = [FastLanguageModel.from_pretrained(str(tiny()), dtype=torch.float32, **{how: True}, **head) for _ in "ab"]
    assert torch.equal(*(model.score.weight for model, _ in made))  # which no file had
    model = FastLanguageModel.get_peft_model(made[0][0], r=4)
    args = config(tmp_path, learning_rate=1e-2)
    trainer = RewardTrainer(model=model, tokenizer=tokenizer, train_dataset=ROWS, eval_dataset=ROWS, args=args)
    trainer.train()
    assert trainer.evaluate()["eval_accuracy"] == 1
    model.save_pretrained(tmp_path / "made")
    if how == "full_finetuning":
        tokenizer.save_pretrained(tmp_path / "made")
    again, _ = FastLanguageModel.from_pretrained(str(tmp_path / "made"), dtype=torch.float32, **{how: True}, **head)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        assert (again.eval()(ids).logits - model.eval()(ids).logits).abs().max() < 1e-4


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
