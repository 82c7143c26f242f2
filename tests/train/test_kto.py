import pytest
import torch
from trl.trainer.kto_trainer import KTOTrainer as TRLTrainer

from unsloth import FastLanguageModel, KTOConfig, KTOTrainer
from unsloth.core.errors import ConfigError, DataError
from unsloth.train.kto import MismatchingCollator

PAIRS = [{"prompt": f"Say {i}:", "chosen": f" yes {i}", "rejected": f" no, never {i}"} for i in range(8)]
RATED = [
    {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
    for row in PAIRS
    for side in ("chosen", "rejected")
]


def build(folder, tmp_path, rows, changes=None, **arguments):
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=256, dtype=torch.float32, load_in_16bit=True
    )
    model = FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=False)
    settings = {
        "max_steps": 8,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "use_cpu": True,
    }
    args = KTOConfig(output_dir=str(tmp_path), **{**settings, **(changes or {})})
    return KTOTrainer(model=model, tokenizer=tokenizer, train_dataset=rows, eval_dataset=rows, args=args, **arguments)


@pytest.mark.parametrize("rows", [PAIRS, RATED], ids=["pairs", "rated"])
def test_it_learns(tiny, tmp_path, rows):
    trainer = build(tiny(), tmp_path, rows)
    assert isinstance(trainer, TRLTrainer)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(0.5, abs=1e-4)
    trainer.train()
    found = trainer.evaluate()
    assert found["eval_loss"] < 0.4
    assert found["eval_rewards/chosen"] > found["eval_rewards/rejected"]
    assert found["eval_rewards/margins"] == pytest.approx(found["eval_rewards/chosen"] - found["eval_rewards/rejected"])
    assert len(trainer.train_dataset) == 16


def test_rows_are_shuffled_and_mismatched_within_the_batch(tiny, tmp_path):
    trainer = build(tiny(), tmp_path, RATED)
    assert trainer.args.train_sampling_strategy == "random"
    batch = next(iter(trainer.get_train_dataloader()))
    first = trainer.train_dataset[0]["prompt_ids"]
    assert batch["input_ids"][0, : len(first)].tolist() != first

    def texts(name):
        return [trainer.processing_class.decode(row[row != trainer._tokenizer.pad_token_id]) for row in batch[name]]

    prompts = [text.partition(":")[0] for text in texts("input_ids")]
    answers = [text.partition(":")[2] for text in texts("input_ids")]
    expected = [f"{prompt}:{answer}" for prompt, answer in zip(prompts, answers[-1:] + answers[:-1], strict=True)]
    assert texts("KL_input_ids") == expected


def test_the_collator_respects_the_maximum_length():
    rows = [{"prompt_ids": [1, 2], "completion_ids": [3] * n, "label": True} for n in (1, 5)]
    batch = MismatchingCollator(pad_token_id=0, max_length=4).torch_call(rows)
    assert batch["KL_input_ids"].tolist() == [[1, 2, 3, 3], [1, 2, 3, 0]]
    assert "KL_input_ids" not in MismatchingCollator(pad_token_id=0, mismatch=False).torch_call(rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per_device_train_batch_size": 1}, "at least two.*per_device_train_batch_size=2"),
        ({"precompute_ref_log_probs": True}, "cannot be computed beforehand"),
        ({"loss_type": "bco"}, "loss_type must be kto or apo_zero_unpaired"),
    ],
)
def test_what_makes_no_sense_is_refused(tiny, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        build(tiny(), tmp_path, RATED, changes)


def test_a_row_without_a_rating_is_named(tiny, tmp_path):
    with pytest.raises(DataError, match="row 16: 'label' must be true or false"):
        build(tiny(), tmp_path, [*RATED, {"prompt": "a", "completion": "b", "label": None}])


def test_a_reference_computed_beforehand_gives_the_same(tiny, tmp_path):
    losses = []
    for beforehand in (False, True):
        changes = {"loss_type": "apo_zero_unpaired", "precompute_ref_log_probs": beforehand}
        trainer = build(tiny(), tmp_path, RATED, changes)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_answers_that_are_all_rated_alike_are_refused(tiny, tmp_path):
    rows = [{"prompt": f"Say {i}:", "completion": f" yes {i}", "label": True} for i in range(4)]
    with pytest.raises(DataError, match="all 4 answers are rated good.*SFTTrainer"):
        build(tiny(), tmp_path, rows)
