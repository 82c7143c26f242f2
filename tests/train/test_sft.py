import pytest
import torch
from peft import LoraConfig
from transformers.training_args import TrainingArguments as PlainArguments
from trl.trainer.sft_config import SFTConfig as TRLConfig

from unsloth import FastLanguageModel, SFTConfig, SFTTrainer, train_on_responses_only
from unsloth.core.errors import ConfigError, DataError, TrainingError
from unsloth.data.masking import IGNORED
from unsloth.layers.lazy_logits import LazyLogits


def adapted(folder, **options):
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=256, dtype=torch.float32, load_in_16bit=True
    )
    return FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=False, **options), tokenizer


def config(tmp_path, **changes):
    return SFTConfig(
        output_dir=str(tmp_path),
        **{
            "max_steps": 4,
            "logging_steps": 1,
            "save_strategy": "no",
            "learning_rate": 1e-3,
            "disable_tqdm": True,
            **changes,
        },
    )


def train(folder, rows, tmp_path, **changes):
    model, tokenizer = adapted(folder)
    trainer = SFTTrainer(model=model, tokenizer=tokenizer, train_dataset=rows, args=config(tmp_path, **changes))
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], model


def test_accumulation_is_exact(tiny, conversations, tmp_path):
    runs = [
        train(tiny(), conversations[:16], tmp_path, per_device_train_batch_size=b, gradient_accumulation_steps=16 // b)
        for b in (1, 4, 16)
    ]
    for losses, _ in runs[1:]:
        assert torch.allclose(torch.tensor(losses), torch.tensor(runs[0][0]), atol=1e-5)


def test_packed_rows_do_not_see_each_other(tiny, conversations, tmp_path):
    model, tokenizer = adapted(tiny())
    plain = SFTTrainer(model=model, tokenizer=tokenizer, train_dataset=conversations, args=config(tmp_path))
    packed = SFTTrainer(
        model=model, tokenizer=tokenizer, train_dataset=conversations, args=config(tmp_path, packing=True)
    )
    assert len(packed.train_dataset) < len(plain.train_dataset)
    losses = []
    for trainer in (plain, packed):
        batch = trainer.data_collator(list(trainer.train_dataset))
        with torch.no_grad():
            losses.append(trainer.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(1.0)).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_responses_only_masks_everything_else(tiny, conversations, tmp_path):
    model, tokenizer = adapted(tiny())
    trainer = SFTTrainer(model=model, tokenizer=tokenizer, train_dataset=conversations, args=config(tmp_path))
    trainer = train_on_responses_only(trainer)
    row = trainer.train_dataset[0]
    kept = tokenizer.decode(
        [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORED]
    )
    assert kept == "well 0<|im_end|>\nwell, 0<|im_end|>\n"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows"),
        ([{"question": "a", "answer": "b"}], "question"),
        ([{"text": "fine"}, {"text": None}], "row 1"),
        ([{"text": " "}], "non-empty"),
        ([{"messages": [{"role": "user", "content": None}]}], "row 0, message 0"),
        ([{"messages": []}], "row 0"),
        ([{"input_ids": [5, 6], "labels": [IGNORED, IGNORED]}], "no row has a token to train"),
    ],
)
def test_bad_rows_are_named(tiny, tmp_path, rows, message):
    model, tokenizer = adapted(tiny())
    with pytest.raises(DataError, match=message):
        SFTTrainer(model=model, tokenizer=tokenizer, train_dataset=rows, args=config(tmp_path))


def test_nothing_to_train_is_refused(tiny, conversations, tmp_path):
    model, tokenizer = FastLanguageModel.from_pretrained(str(tiny()), max_seq_length=128)
    with pytest.raises(TrainingError, match="get_peft_model"):
        SFTTrainer(model=model, tokenizer=tokenizer, train_dataset=conversations, args=config(tmp_path))
    model = FastLanguageModel.get_peft_model(model, r=4)
    with pytest.raises(ConfigError, match="tokenizer"):
        SFTTrainer(model=model, train_dataset=conversations, args=config(tmp_path))


def test_the_fused_head_is_the_same_mathematics(tiny, conversations, tmp_path):
    found = []
    for fused in (True, False):
        model, tokenizer = adapted(tiny())
        trainer = SFTTrainer(
            model=model, tokenizer=tokenizer, train_dataset=conversations, args=config(tmp_path, fused_head=fused)
        )
        batch = trainer.data_collator(list(trainer.train_dataset))
        loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(100))
        loss.backward()
        found.append((loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (fused_loss, fused_gradients), (loss, gradients) = found
    assert fused_loss == pytest.approx(loss, rel=1e-5)
    assert gradients.keys() == fused_gradients.keys()
    for name in gradients:
        assert (gradients[name] - fused_gradients[name]).norm() <= 1e-5 * max(gradients[name].norm(), 1e-3), name


@pytest.mark.parametrize("kind", [PlainArguments, TRLConfig])
def test_configurations_of_other_libraries_are_accepted(tiny, conversations, tmp_path, kind):
    model, tokenizer = adapted(tiny())
    args = kind(output_dir=str(tmp_path), max_steps=1, learning_rate=3e-4, save_strategy="no", bf16=False, use_cpu=True)
    trainer = SFTTrainer(model=model, tokenizer=tokenizer, train_dataset=conversations, args=args)
    assert (trainer.args.learning_rate, trainer.args.max_steps) == (3e-4, 1)
    assert trainer.train().global_step == 1


def test_untouched_fields_of_plain_arguments_follow_the_model(tiny, conversations, tmp_path):
    model, tokenizer = FastLanguageModel.from_pretrained(str(tiny()), max_seq_length=96, dtype=torch.bfloat16)
    model = FastLanguageModel.get_peft_model(model, r=4)
    args = PlainArguments(output_dir=str(tmp_path), use_cpu=True)
    trainer = SFTTrainer(model=model, tokenizer=tokenizer, train_dataset=conversations, args=args)
    assert (trainer.args.bf16, trainer.args.gradient_checkpointing, trainer.args.max_length) == (True, True, 96)


def test_evaluation_in_half_precision_leaves_the_weights_alone(tiny, conversations, tmp_path):
    model, tokenizer = adapted(tiny())
    args = config(tmp_path, fp16_full_eval=True)
    trainer = SFTTrainer(
        model=model, tokenizer=tokenizer, train_dataset=conversations, eval_dataset=conversations, args=args
    )
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    assert trainer.evaluate()["eval_loss"] > 0
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert args.fp16_full_eval


def test_an_adapter_can_be_added_by_the_trainer(tiny, conversations, tmp_path):
    model, tokenizer = FastLanguageModel.from_pretrained(str(tiny()), max_seq_length=96, dtype=torch.float32)
    trainer = SFTTrainer(
        model=model,
        tokenizer=tokenizer,
        train_dataset=conversations,
        args=config(tmp_path, max_steps=1),
        peft_config=LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    trainer.train()
    adapters = [p for n, p in trainer.model.named_parameters() if "lora_B" in n]
    assert adapters and all(p.dtype == torch.float32 and p.abs().max() > 0 for p in adapters)


def test_a_missing_tracker_is_named(tiny, conversations, tmp_path):
    model, tokenizer = adapted(tiny())
    with pytest.raises(ConfigError, match="wandb.*pip install wandb"):
        SFTTrainer(
            model=model, tokenizer=tokenizer, train_dataset=conversations, args=config(tmp_path, report_to="wandb")
        )


def test_a_resumed_run_ends_where_the_uninterrupted_one_does(tiny, conversations, tmp_path):
    def run(folder, steps, resume=None):
        model, tokenizer = adapted(tiny())
        args = config(
            tmp_path / folder, max_steps=steps, save_strategy="steps", save_steps=2, lr_scheduler_type="constant"
        )
        trainer = SFTTrainer(model=model, tokenizer=tokenizer, train_dataset=conversations, args=args)
        trainer.train(resume_from_checkpoint=resume)
        return model

    whole = run("whole", 6)
    run("parts", 4)
    resumed = run("parts", 6, resume=True)
    for (name, expected), actual in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(actual, expected), name


def metrics_run(tiny, rows, tmp_path, fused_by, **changes):
    """(evaluation metrics, shape of the logits seen) with the head of this library, TRL's, or the plain one."""
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(tiny()), max_seq_length=256, dtype=torch.float32, load_in_16bit=True, fused_head=fused_by == "us"
    )
    model = FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=False)
    seen = []
    trainer = SFTTrainer(
        model=model,
        tokenizer=tokenizer,
        train_dataset=rows,
        eval_dataset=rows[:6],
        args=config(tmp_path, fused_head=fused_by is not None, per_device_eval_batch_size=3, **changes),
        preprocess_logits_for_metrics=lambda logits, labels: seen.append(logits.shape[-1]) or logits.argmax(-1),
        compute_metrics=lambda p: {"hits": float((p.predictions[:, :-1] == p.label_ids[:, 1:]).sum())},
    )
    return trainer.evaluate(), seen


@pytest.mark.filterwarnings("ignore:`return_outputs=True`")
def test_metrics_see_real_logits_whoever_computes_the_loss(tiny, conversations, tmp_path):
    runs = {by: metrics_run(tiny, conversations, tmp_path, by) for by in (None, "us", "trl")}
    plain, _ = runs[None]
    assert plain["eval_hits"] > 0
    for metrics, seen in runs.values():
        assert seen == [260, 260]
        assert metrics["eval_hits"] == plain["eval_hits"]
        assert metrics["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-5)
        assert metrics["eval_mean_token_accuracy"] == pytest.approx(plain["eval_mean_token_accuracy"], rel=1e-5)


def test_logits_are_there_when_asked_for(tiny, conversations, tmp_path, monkeypatch):
    model, tokenizer = adapted(tiny())

    def logits(**changes):
        trainer = SFTTrainer(
            model=model, tokenizer=tokenizer, train_dataset=conversations, args=config(tmp_path, **changes)
        )
        batch = trainer.data_collator(list(trainer.train_dataset))
        return trainer.compute_loss(model, dict(batch), return_outputs=True)[1].logits

    assert type(logits(fused_head=True)) is not torch.Tensor
    assert type(logits(fused_head=True, return_logits=True)) is torch.Tensor
    assert type(logits()) is torch.Tensor  # on the CPU
    monkeypatch.setenv("UNSLOTH_RETURN_LOGITS", "1")
    assert type(logits(fused_head=True)) is torch.Tensor
    assert type(logits(fused_head=True, return_logits=False)) is not torch.Tensor


def test_the_fused_heads_of_trl_and_of_the_model_do_not_meet(tiny, conversations, tmp_path):
    losses = []
    for fused in (True, False):
        model, tokenizer = FastLanguageModel.from_pretrained(
            str(tiny()), max_seq_length=256, dtype=torch.float32, load_in_16bit=True, fused_head=fused
        )
        model = FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=False)
        trainer = SFTTrainer(
            model=model, tokenizer=tokenizer, train_dataset=conversations, args=config(tmp_path, loss_type="dft")
        )
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        labels = torch.tensor([[5, 6, 7]])
        assert type(model(input_ids=labels).logits) is torch.Tensor
    assert losses[0] == losses[1]


def test_rows_are_laid_end_to_end_by_default_where_that_costs_nothing(tiny, conversations, tmp_path, monkeypatch):
    rows, batches = conversations[:12], {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    expected, other = train(tiny(), rows, tmp_path, **batches)
    monkeypatch.setattr("unsloth.train.sft._keeps_rows_apart", lambda model: True)
    calls = []

    class Counting(SFTTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            calls.append(inputs["input_ids"].shape)
            return super().compute_loss(model, inputs, *args, **kwargs)

    def again(joins=None, **more):
        calls.clear()
        model, tokenizer = FastLanguageModel.from_pretrained(
            str(tiny()), max_seq_length=256, dtype=torch.float32, load_in_16bit=True
        )
        model = FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing="unsloth")
        args = config(tmp_path, **batches, join_batches=joins)
        trainer = Counting(model=model, tokenizer=tokenizer, train_dataset=rows, args=args, **more)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert torch.allclose(torch.tensor(losses), torch.tensor(expected), rtol=2e-6)
        for a, b in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)

    again()
    assert len(calls) == 4 and all(shape[0] == 1 for shape in calls)  # an update is one pass
    again(joins=False)
    assert len(calls) == 12 and all(shape[0] == 1 for shape in calls)
    again(compute_metrics=lambda found: {})
    assert len(calls) == 12 and all(shape[0] == 2 for shape in calls)


def test_logits_stay_away_where_outputs_are_converted(tiny, conversations, tmp_path, monkeypatch):
    def refuse(self):
        raise AssertionError("the whole logits were computed")

    monkeypatch.setattr(LazyLogits, "materialize", refuse)
    model, tokenizer = adapted(tiny())
    args = config(tmp_path, bf16=True, use_cpu=True, fused_head=True, max_steps=2)
    trainer = SFTTrainer(model=model, tokenizer=tokenizer, train_dataset=conversations[:8], args=args)
    trainer.train()
    logged = [entry["mean_token_accuracy"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 2 and all(isinstance(value, float) and 0 <= value <= 1 for value in logged)
