"""Out of memory: the weights are those of the last step, and the arguments that take less are named."""

import pytest
import torch
from transformers import TrainerCallback

from unsloth.core.errors import TrainingError

OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


class BreakStep(TrainerCallback):
    """The third optimizer step changes half of the weights, and then finds no memory."""

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        if state.global_step != 2:
            return
        inner = optimizer.optimizer

        def step(closure=None):
            parameters = inner.param_groups[0]["params"]
            with torch.no_grad():
                for parameter in parameters[::2]:
                    parameter.add_(1.0)
            raise OUT_OF_MEMORY

        inner.step = step


@pytest.mark.parametrize(("place", "auto"), [("forward", True), ("backward", False), ("step", False)])
def test_the_weights_are_those_before_the_step(runs, tiny, tmp_path, assert_equal, place, auto, monkeypatch):
    expected = runs.build(str(tiny()), str(tmp_path / "expected"), max_steps=2, lr_scheduler_type="constant")
    expected.train()
    trainer = runs.build(
        str(tiny()),
        str(tmp_path / "out"),
        lr_scheduler_type="constant",
        callbacks=[BreakStep()] if place == "step" else None,
        auto_find_batch_size=auto,
    )

    def break_third(function):
        def broken(*args, **kwargs):
            if trainer.state.global_step == 2:
                raise OUT_OF_MEMORY
            return function(*args, **kwargs)

        return broken

    if place == "forward":
        trainer.compute_loss = break_third(trainer.compute_loss)
    if place == "backward":
        monkeypatch.setattr(trainer.accelerator, "backward", break_third(trainer.accelerator.backward))
    with pytest.raises(TrainingError) as raised:
        trainer.train()
    message = str(raised.value)
    assert "out of memory in step 3; the weights are those after step 2" in message
    for knob in (
        "per_device_train_batch_size (now 2",
        "max_length (now 64)",
        "checkpointing (now off)",
        "checkpoint-2",
    ):
        assert knob in message
    assert len(message.splitlines()) <= 5
    assert_equal(runs.weights(trainer), runs.weights(expected))
    trainer = runs.build(str(tiny()), str(tmp_path / "out"), lr_scheduler_type="constant", max_steps=3)
    assert trainer.train(resume_from_checkpoint=True).global_step == 3
