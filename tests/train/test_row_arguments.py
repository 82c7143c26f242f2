"""The configuration's fields about rows reach the rows."""

from __future__ import annotations

import pytest

from unsloth import FastLanguageModel, SFTConfig, SFTTrainer
from unsloth.core.errors import ConfigError, DataError

TEXTS = [{"text": "word " * n} for n in range(1, 17)]


@pytest.fixture(scope="module")
def model(tiny):
    loaded, tokenizer = FastLanguageModel.from_pretrained(str(tiny()), max_seq_length=64, load_in_16bit=True)
    return FastLanguageModel.get_peft_model(loaded, r=2), tokenizer


def trainer(model, tmp_path, rows=TEXTS, **arguments):
    arguments = {"max_length": 64, "max_steps": 2, "report_to": "none", "use_cpu": True, **arguments}
    return SFTTrainer(
        model=model[0], tokenizer=model[1], train_dataset=rows, args=SFTConfig(output_dir=str(tmp_path), **arguments)
    )


def test_long_rows(model, tmp_path):
    lengths = {
        name: [len(ids) for ids in trainer(model, tmp_path, long_rows=name).train_dataset["input_ids"]]
        for name in ("truncate", "chunk", "drop")
    }
    assert max(lengths["truncate"]) == 64 and len(lengths["truncate"]) == 16
    assert len(lengths["chunk"]) > 16
    assert sum(lengths["chunk"]) == sum(5 * n + 1 for n in range(1, 17)) + len(lengths["chunk"]) - 16
    assert len(lengths["drop"]) == sum(5 * n + 1 <= 64 for n in range(1, 17))
    with pytest.raises(DataError, match="row 12 has 66 tokens"):
        trainer(model, tmp_path, long_rows="error")
    with pytest.raises(ConfigError, match="long_rows must be one of.*truncate.*got 'shorten'"):
        trainer(model, tmp_path, long_rows="shorten")


def test_layout_overrides_the_columns(model, tmp_path):
    rows = [{"text": "misleading", "instruction": f"Add {n}", "output": "done"} for n in range(4)]
    ids = trainer(model, tmp_path, rows, layout="alpaca").train_dataset[0]["input_ids"]
    assert "Add 0" in model[1].decode(ids) and "misleading" not in model[1].decode(ids)
    with pytest.raises(ConfigError, match="layout must be one of"):
        trainer(model, tmp_path, rows, layout="poem")


def test_control_tokens_of_users_become_text(model, tmp_path):
    rows = [{"messages": [{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "a"}]}] * 2
    end = model[1].convert_tokens_to_ids("<|im_end|>")
    counts = [
        trainer(model, tmp_path, rows, escape_control_tokens=escape).train_dataset[0]["input_ids"].count(end)
        for escape in (False, True)
    ]
    assert counts[0] == counts[1] + 1


def test_batches_of_a_number_of_tokens(model, tmp_path):
    made = trainer(model, tmp_path, tokens_per_batch=200)
    batches = list(made.get_train_dataloader())
    sizes = [batch["input_ids"].numel() for batch in batches]
    assert max(sizes) <= 200
    assert sum(sizes) == sum(min(5 * n + 1, 64) for n in range(1, 17))
    assert sum(sizes) / len(sizes) > 150  # filled, not one row each
    starts = sum(int((batch["position_ids"] == 0).sum()) for batch in batches)
    assert starts == 16  # documents are kept apart
    losses = made.train().training_loss
    assert losses > 0


def test_a_number_of_tokens_and_a_number_of_rows_contradict_each_other(model, tmp_path):
    with pytest.raises(ConfigError, match="either a number of rows or a number of tokens"):
        SFTConfig(output_dir=str(tmp_path), tokens_per_batch=100, per_device_train_batch_size=4)
    with pytest.raises(ConfigError, match="max_length=64 does not fit into a batch of tokens_per_batch: got 50"):
        trainer(model, tmp_path, tokens_per_batch=50)


def test_batches_of_tokens_are_the_same_again(model, tmp_path):
    made = [trainer(model, tmp_path, tokens_per_batch=200).train_dataset["input_ids"][:] for _ in range(2)]
    assert made[0] == made[1]
