"""R12, R13: the same rows in the same order, whatever the split of the batch, the workers, or where it was resumed."""

import pytest
from datasets import Dataset
from transformers import TrainerCallback

from unsloth.core.errors import ConfigError

ROWS = 9  # does not divide by the batch


class Interrupt(TrainerCallback):
    """Stops a run that would go on."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def train(runs, model, output, resume=None, stop=None, streamed=False, **changes):
    """Train 2 epochs, with one checkpoint at ``stop``; return the trainer, and the token ids of each step."""
    saving = {"save_steps": stop} if stop else {"save_strategy": "no"}
    options = {"max_steps": -1, "num_train_epochs": 2, **saving, **changes}
    callbacks = [Interrupt(stop)] if stop else None
    data = Dataset.from_list(runs.rows(ROWS)).to_iterable_dataset() if streamed else runs.rows(ROWS)
    trainer = runs.build(model, str(output), data=data, callbacks=callbacks, **options)
    seen = {}
    inner = trainer.compute_loss

    def recorded(model, inputs, *args, **kwargs):
        batch = inputs["input_ids"].tolist()
        rows = [[token for token in row if token != trainer.processing_class.pad_token_id] for row in batch]
        seen.setdefault(trainer.state.global_step, []).extend(rows)
        return inner(model, inputs, *args, **kwargs)

    trainer.compute_loss = recorded
    trainer.train(resume_from_checkpoint=resume)
    return trainer, seen


def test_R12_another_split_of_the_same_global_batch(runs, tiny, tmp_path):
    split = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    other = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    whole, expected = train(runs, str(tiny()), tmp_path / "whole", **split)
    _, before = train(runs, str(tiny()), tmp_path / "parts", stop=4, **split)
    resumed, after = train(runs, str(tiny()), tmp_path / "parts", resume=True, **other)
    assert resumed.state.max_steps == whole.state.max_steps == 6
    assert {**before, **after} == expected
    with pytest.raises(ConfigError, match="global_batch_size was 4, is 2"):
        train(runs, str(tiny()), tmp_path / "parts", resume=True, per_device_train_batch_size=2)


@pytest.mark.parametrize(
    "options",
    [
        {"dataloader_num_workers": 2},
        {"packing": True, "max_length": 48},
        {"padding_free": True},
        {"gradient_accumulation_steps": 2, "logging_steps": 3},
        {"train_sampling_strategy": "group_by_length"},
        {"streamed": True, "max_steps": 8},
    ],
    ids=["workers", "packing", "padding_free", "accumulation", "by length", "streamed"],
)
def test_R13_in_the_middle_of_a_later_epoch(runs, tiny, tmp_path, assert_equal, options):
    whole, expected = train(runs, str(tiny()), tmp_path / "whole", **options)
    stop = whole.state.max_steps // 2 + 1
    _, before = train(runs, str(tiny()), tmp_path / "parts", stop=stop, **options)
    resumed, after = train(runs, str(tiny()), tmp_path / "parts", resume=True, **options)
    assert {**before, **after} == expected
    assert_equal(runs.weights(resumed), runs.weights(whole))
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (whole, resumed)]
    assert losses[0] == losses[1]
