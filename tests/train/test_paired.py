import pytest
import torch
from transformers.training_args import TrainingArguments as PlainArguments

from unsloth import CPOConfig, CPOTrainer, FastLanguageModel, ORPOConfig, ORPOTrainer
from unsloth.core.errors import ConfigError, DataError

ROWS = [{"prompt": f"Say {i}:", "chosen": f" yes {i}", "rejected": f" no, never {i}"} for i in range(12)]
SETTINGS = {
    "max_steps": 8,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "use_cpu": True,
    "bf16": False,
}


def adapted(folder, **options):
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=256, dtype=torch.float32, **{"load_in_16bit": True, **options}
    )
    return FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=False), tokenizer


METHODS = {
    "orpo": (ORPOTrainer, ORPOConfig, {"beta": 0.3}),
    "cpo": (CPOTrainer, CPOConfig, {}),
    "simpo": (CPOTrainer, CPOConfig, {"loss_type": "simpo", "beta": 2.0, "cpo_alpha": 0.0}),
}


@pytest.mark.parametrize("precision", [{"load_in_16bit": True}, {"load_in_4bit": True, "load_in_16bit": False}])
@pytest.mark.parametrize("method", METHODS)
def test_they_learn(tiny, tmp_path, method, precision):
    trainer_class, config_class, particular = METHODS[method]
    model, tokenizer = adapted(tiny(), **precision)
    args = config_class(output_dir=str(tmp_path), **SETTINGS, **particular)
    trainer = trainer_class(model=model, tokenizer=tokenizer, train_dataset=ROWS, eval_dataset=ROWS, args=args)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate(ROWS)
    assert after["eval_loss"] < before["eval_loss"]
    assert after["eval_rewards/margins"] > before["eval_rewards/margins"]
    assert after["eval_rewards/accuracies"] == 1
    assert "nll_loss" in trainer.state.log_history[1] and trainer.state.log_history[1]["num_tokens"] > 0
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("method", ["orpo", "simpo"])
def test_plain_arguments_and_trainer_level_ones(tiny, tmp_path, method):
    trainer_class, config_class, _ = METHODS[method]
    model, tokenizer = adapted(tiny())
    trainer = trainer_class(
        model=model,
        tokenizer=tokenizer,
        train_dataset=ROWS,
        args=PlainArguments(output_dir=str(tmp_path), **{**SETTINGS, "max_steps": 1}),
        beta=0.7,
        max_length=64,
        max_prompt_length=3,
        max_completion_length=5,
    )
    assert isinstance(trainer.args, config_class)
    assert (trainer.args.beta, trainer.args.max_length, trainer.args.learning_rate) == (0.7, 64, 1e-2)
    assert max(map(len, trainer.train_dataset["prompt_ids"])) == 3
    assert max(map(len, trainer.train_dataset["rejected_ids"])) == 5
    assert trainer.train().global_step == 1


def test_accumulated_batches_are_averaged(tiny, tmp_path):
    gradients = []
    for size, steps in ((12, 1), (4, 3)):
        model, tokenizer = adapted(tiny())
        settings = {
            **SETTINGS,
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": steps,
            "max_steps": 1,
            "max_grad_norm": 0.0,
            "optim": "sgd",
            "learning_rate": 1.0,
            "lr_scheduler_type": "constant",
        }
        args = CPOConfig(output_dir=str(tmp_path), **settings, cpo_alpha=0.0)
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        CPOTrainer(model=model, tokenizer=tokenizer, train_dataset=ROWS, args=args).train()
        gradients.append({name: p - before[name] for name, p in model.named_parameters() if p.requires_grad})
    for name, whole in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], whole, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("trainer_class", "changes", "message"),
    [
        (ORPOTrainer, {"beta": -1.0}, "beta must not be negative"),
        (CPOTrainer, {"beta": 0.0}, "beta must be positive"),
        (CPOTrainer, {"loss_type": "kto"}, "loss_type must be one of sigmoid"),
        (CPOTrainer, {"label_smoothing": 0.6}, "label_smoothing must be in"),
        (ORPOTrainer, {"train_dataset": None}, "train_dataset is missing"),
        (ORPOTrainer, {"simpo_gamma": 1.0}, "unknown trainer argument"),
    ],
)
def test_what_makes_no_sense_is_refused(tiny, tmp_path, trainer_class, changes, message):
    model, tokenizer = adapted(tiny())
    args = PlainArguments(output_dir=str(tmp_path), **SETTINGS)
    with pytest.raises(ConfigError, match=message):
        trainer_class(**{"model": model, "tokenizer": tokenizer, "train_dataset": ROWS, "args": args, **changes})


def test_alphapo_is_simpo_without_the_cross_entropy(tmp_path):
    args = CPOConfig(output_dir=str(tmp_path), loss_type="alphapo", alpha=0.1)
    assert (args.loss_type, args.cpo_alpha, args.alpha) == ("simpo", 0.0, 0.1)


def test_a_row_without_a_rejected_side_is_named(tiny, tmp_path):
    model, tokenizer = adapted(tiny())
    args = ORPOConfig(output_dir=str(tmp_path), **SETTINGS)
    rows = [*ROWS, {"prompt": "a", "chosen": "b", "rejected": ""}]
    with pytest.raises(DataError, match="row 12: 'rejected' is empty"):
        ORPOTrainer(model=model, tokenizer=tokenizer, train_dataset=rows, args=args)
