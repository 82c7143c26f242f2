import logging
import re

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.training_args import TrainingArguments as PlainArguments
from trl.trainer.dpo_trainer import DPOTrainer as TRLTrainer

from unsloth import DPOConfig, DPOTrainer, FastLanguageModel
from unsloth.core.errors import ConfigError, DataError, ModelError, TrainingError
from unsloth.quant import nf4
from unsloth.train.progress import TrainingProgress

ROWS = [{"prompt": f"Say {i}:", "chosen": f" yes {i}", "rejected": f" no, never {i}"} for i in range(12)]


def adapted(folder, **options):
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=256, dtype=torch.float32, **{"load_in_16bit": True, **options}
    )
    return FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=False), tokenizer


def config(tmp_path, **changes):
    return DPOConfig(
        output_dir=str(tmp_path),
        **{
            "max_steps": 4,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "use_cpu": True,
            **changes,
        },
    )


DOCUMENTED = """
from unsloth import FastLanguageModel, PatchDPOTrainer
from unsloth import is_bfloat16_supported
PatchDPOTrainer()
import torch
from transformers import TrainingArguments
from trl import DPOTrainer

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name = MODEL,
    max_seq_length = max_seq_length,
    dtype = None,
    load_in_4bit = True,
)
model = FastLanguageModel.get_peft_model(
    model,
    r = 64,
    target_modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    lora_alpha = 64,
    lora_dropout = 0,
    bias = "none",
    use_gradient_checkpointing = "unsloth",
    random_state = 3407,
    max_seq_length = max_seq_length,
)
dpo_trainer = DPOTrainer(
    model = model,
    ref_model = None,
    args = TrainingArguments(
        per_device_train_batch_size = 4,
        gradient_accumulation_steps = 8,
        warmup_ratio = 0.1,
        num_train_epochs = 3,
        fp16 = not is_bfloat16_supported(),
        bf16 = is_bfloat16_supported(),
        logging_steps = 1,
        optim = "adamw_8bit",
        seed = 42,
        output_dir = "outputs",
    ),
    beta = 0.1,
    train_dataset = ROWS,
    tokenizer = tokenizer,
    max_length = 1024,
    max_prompt_length = 512,
)
dpo_trainer.train()
"""


def test_the_documented_call_runs(tiny, tmp_path, monkeypatch):
    from unsloth import compat

    monkeypatch.chdir(tmp_path)
    names = {"MODEL": str(tiny()), "ROWS": ROWS * 3, "max_seq_length": 256}
    try:
        exec(compile(DOCUMENTED, "the documented call", "exec"), names)
    finally:
        compat.unbind()
    trainer = names["dpo_trainer"]
    assert isinstance(trainer, DPOTrainer) and isinstance(trainer, TRLTrainer)
    assert trainer.state.global_step == 6
    assert (trainer.beta, trainer.args.max_length, trainer._options.max_prompt_length) == (0.1, 1024, 512)
    assert trainer.args.gradient_checkpointing  # as get_peft_model was told
    trained = {p.dtype for p in names["model"].parameters() if p.requires_grad}
    assert trained == {torch.float32}


@pytest.mark.parametrize("precision", [{"load_in_16bit": True}, {"load_in_4bit": True, "load_in_16bit": False}])
def test_it_learns_and_the_reference_is_the_model_without_its_adapter(tiny, tmp_path, precision):
    model, tokenizer = adapted(tiny(), **precision)
    trainer = DPOTrainer(
        model=model,
        tokenizer=tokenizer,
        train_dataset=ROWS,
        eval_dataset=ROWS,
        args=config(tmp_path, max_steps=8, logging_steps=4),
    )
    batch = trainer.data_collator(list(trainer.train_dataset))
    with model.disable_adapter(), torch.no_grad():
        labels = batch["input_ids"][:, 1:, None]
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        plain = (logits.log_softmax(-1).gather(-1, labels)[..., 0] * batch["completion_mask"][:, 1:]).sum(1)
    trainer.train()
    trained = torch.cat(trainer.compute_ref_log_probs(trainer.ref_model, batch))
    torch.testing.assert_close(trained, plain, rtol=1e-4, atol=1e-3)
    assert list(model.peft_config) == ["default"]
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] < 0.5 and metrics["eval_rewards/accuracies"] == 1
    logged = trainer.state.log_history[0]
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"):
        assert logged[name] == logged[name]
    assert any(isinstance(callback, TrainingProgress) for callback in trainer.callback_handler.callbacks)


def test_full_fine_tuning_keeps_a_copy_or_precomputes(tiny, tmp_path):
    losses = []
    for precomputed in (False, True):
        model, tokenizer = FastLanguageModel.from_pretrained(
            str(tiny()), max_seq_length=256, dtype=torch.float32, full_finetuning=True
        )
        args = config(tmp_path, precompute_ref_log_probs=precomputed, learning_rate=1e-3)
        trainer = DPOTrainer(model=model, tokenizer=tokenizer, train_dataset=ROWS, args=args)
        assert (trainer.ref_model is None) == precomputed
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][-1] < losses[0][0] == pytest.approx(0.6931, abs=1e-3)


def test_a_reference_model_can_be_given(tiny, tmp_path):
    model, tokenizer = adapted(tiny())
    other = AutoModelForCausalLM.from_pretrained(tiny(), dtype=torch.float32)
    with torch.no_grad():
        other.model.norm.weight.mul_(1.5)
    trainer = DPOTrainer(model, other, config(tmp_path), train_dataset=ROWS, tokenizer=tokenizer)
    batch = trainer.data_collator(list(trainer.train_dataset))
    own = trainer.token_logprobs(model, batch).sum(1)
    assert (torch.cat(trainer.compute_ref_log_probs(other, batch)) - own).abs().min() > 1e-2
    assert trainer.train().global_step == 4


def test_a_trained_adapter_is_not_part_of_the_reference(tiny, tmp_path, monkeypatch):
    from unsloth.train import reference

    said = []
    monkeypatch.setattr(reference.logger, "handle", lambda record: said.append(record.getMessage()))
    model, tokenizer = adapted(tiny())
    DPOTrainer(model=model, tokenizer=tokenizer, train_dataset=ROWS, args=config(tmp_path)).train()
    assert not said
    again = DPOTrainer(model=model, tokenizer=tokenizer, train_dataset=ROWS, args=config(tmp_path))
    assert len(said) == 1 and "the reference is the model without it" in said[0]
    again.train()
    assert again.state.log_history[0]["loss"] < 0.5


def test_what_trl_alone_computes_is_left_to_trl(tiny, tmp_path):
    found = []
    for weighting in (False, True):
        model, tokenizer = adapted(tiny())
        args = config(tmp_path, use_weighting=weighting)
        trainer = DPOTrainer(model=model, tokenizer=tokenizer, train_dataset=ROWS, args=args)
        trainer.train()
        found.append(trainer.state.log_history[0]["loss"])
    assert 0 < found[1] < found[0]


@pytest.mark.parametrize("kind", [PlainArguments, DPOConfig])
def test_trainer_level_arguments_take_precedence(tiny, tmp_path, kind):
    model, tokenizer = adapted(tiny())
    args = kind(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    trainer = DPOTrainer(
        model=model,
        tokenizer=tokenizer,
        train_dataset=ROWS,
        args=args,
        beta=0.7,
        loss_type="hinge",
        max_length=64,
        max_prompt_length=3,
        label_pad_token_id=-100,
    )
    assert (trainer.beta, trainer.loss_types, trainer.args.max_length) == (0.7, ["hinge"], 64)
    assert max(len(ids) for ids in trainer.train_dataset["prompt_ids"]) == 3


def test_evaluation_takes_rows_as_they_are(tiny, tmp_path):
    model, tokenizer = adapted(tiny())
    named = {"first": ROWS[:4], "second": ROWS[4:]}
    trainer = DPOTrainer(
        model=model, tokenizer=tokenizer, train_dataset=ROWS, eval_dataset=named, args=config(tmp_path)
    )
    found = trainer.evaluate()
    assert found["eval_first_loss"] == found["eval_second_loss"] == pytest.approx(0.6931, abs=1e-3)
    assert trainer.evaluate(ROWS[:2])["eval_loss"] == pytest.approx(0.6931, abs=1e-3)


def test_an_adapter_can_be_added_by_the_trainer(tiny, tmp_path):
    model, tokenizer = FastLanguageModel.from_pretrained(str(tiny()), max_seq_length=256, dtype=torch.float32)
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = DPOTrainer(
        model=model, tokenizer=tokenizer, train_dataset=ROWS, args=config(tmp_path, max_steps=1), peft_config=lora
    )
    assert trainer.train().global_step == 1


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"train_dataset": None}, ConfigError, "train_dataset is missing"),
        ({"train_dataset": [{"prompt": "a", "chosen": "b"}]}, DataError, "no column 'rejected'"),
        ({"tokenizer": None}, ConfigError, "needs the tokenizer"),
        ({"loss_type": "sigmoyd"}, ConfigError, "loss_type must be one of sigmoid"),
        ({"beta": -1.0}, ConfigError, "beta must be positive"),
        ({"batea": 0.1}, ConfigError, "unknown trainer argument.*beta"),
        ({"args": {"beta": 0.1}}, ConfigError, re.escape("Pass args=DPOConfig(...)")),
        ({"max_prompt_length": 0}, ConfigError, "max_prompt_length must be at least 1"),
    ],
)
def test_what_makes_no_sense_is_refused(tiny, tmp_path, changes, error, message):
    model, tokenizer = adapted(tiny())
    arguments = {"tokenizer": tokenizer, "train_dataset": ROWS, "args": config(tmp_path), **changes}
    with pytest.raises(error, match=message):
        DPOTrainer(model=model, **arguments)


def test_nothing_to_train_is_refused(tiny, tmp_path):
    model, tokenizer = FastLanguageModel.from_pretrained(str(tiny()), max_seq_length=128)
    with pytest.raises(TrainingError, match="get_peft_model"):
        DPOTrainer(model=model, tokenizer=tokenizer, train_dataset=ROWS, args=config(tmp_path))


def test_counts_are_said(tiny, tmp_path, monkeypatch):
    from unsloth.train import preference

    said = []
    monkeypatch.setattr(preference.logger, "handle", lambda record: said.append(record))
    model, tokenizer = adapted(tiny())
    rows = [*ROWS, {"prompt": "a", "chosen": "same", "rejected": "same"}]
    DPOTrainer(model=model, tokenizer=tokenizer, train_dataset=rows, args=config(tmp_path))
    assert [record.levelno for record in said] == [logging.INFO]
    assert "train data: 12 of 13 rows; 1 pairs have the same answer on both sides" in said[0].getMessage()


def test_4bit_weights_of_a_foreign_model_are_not_repacked_by_an_evaluation(tiny, tmp_path):
    def foreign():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(
            tiny(), quantization_config=nf4.quantization_config(torch.float32), dtype=torch.float32
        )
        return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))

    _, tokenizer = adapted(tiny())
    losses = []
    for evaluates in (False, True):
        model = foreign()
        args = config(tmp_path, gradient_checkpointing=False)
        trainer = DPOTrainer(model=model, tokenizer=tokenizer, train_dataset=ROWS, eval_dataset=ROWS, args=args)
        if evaluates:
            trainer.evaluate()
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
        assert layers and not any(getattr(m.weight.quant_state, "packing_format_for_cpu", False) for m in layers)
    assert losses[0] == losses[1]
    layers[0].weight.quant_state.packing_format_for_cpu = True  # as an evaluation before the trainer leaves it
    with pytest.raises(ModelError, match="repacked 4-bit weights"):
        DPOTrainer(model=model, tokenizer=tokenizer, train_dataset=ROWS, args=config(tmp_path))
