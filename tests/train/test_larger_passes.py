import pytest
import torch

from unsloth import FastLanguageModel, GRPOConfig, GRPOTrainer
from unsloth.core.errors import ConfigError
from unsloth.memory import gauge
from unsloth.models import plan

ROWS = [{"prompt": f"Say {i}:"} for i in range(16)]
# An update of six batches of two completions, on completions of two generations of four batches and back
SPREAD = {"per_device_train_batch_size": 2, "num_generations": 2, "gradient_accumulation_steps": 6}
BATCHES = {
    "one generation": {**SPREAD},
    "updates across generations": {**SPREAD, "steps_per_generation": 4},
    "several updates": {**SPREAD, "gradient_accumulation_steps": 2, "steps_per_generation": 4, "num_iterations": 2},
    "a short update at the end": {**SPREAD, "gradient_accumulation_steps": 5, "steps_per_generation": 4},
}


class Counted(GRPOTrainer):
    """Keeps how many completions each pass had."""

    def _get_per_token_logps_and_entropies(self, model, input_ids, *args, **kwargs):
        if torch.is_grad_enabled():
            self.__dict__.setdefault("passes", []).append(len(input_ids))
        return super()._get_per_token_logps_and_entropies(model, input_ids, *args, **kwargs)


def length(completions, **_):
    return [float(len(completion)) for completion in completions]


def settings(tmp_path, **changes):
    fixed = {"output_dir": str(tmp_path), "logging_steps": 1, "save_strategy": "no", "report_to": "none"}
    fixed |= {"disable_tqdm": True, "use_cpu": True, "max_completion_length": 12, "learning_rate": 1e-3, "seed": 3}
    return {**fixed, **changes}


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def trained(tiny, tmp_path, tokens, **changes):
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(tiny()), max_seq_length=128, dtype=torch.float32, load_in_16bit=True
    )
    model = FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=False)
    args = GRPOConfig(**settings(tmp_path, tokens_per_pass=tokens, **changes))
    trainer = Counted(model, length, args, ROWS, processing_class=tokenizer)
    trainer.train()
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return trainer, weights


def assert_same(one, other):
    for name in ("loss", "grad_norm"):
        for left, right in zip(logged(one[0], name), logged(other[0], name), strict=True):
            assert left == pytest.approx(right, rel=1e-4, abs=1e-6)
    for name, weight in one[1].items():
        torch.testing.assert_close(weight, other[1][name], rtol=1e-4, atol=1e-5, msg=name)
    assert sum(one[0].passes) == sum(other[0].passes)


@pytest.mark.parametrize("batches", BATCHES)
def test_updates_stay_what_they_were(tiny, tmp_path, batches):
    changes = {**BATCHES[batches], "max_steps": 4}
    apart = trained(tiny, tmp_path, 0, **changes)
    together = trained(tiny, tmp_path, 10**6, **changes)
    assert set(apart[0].passes) == {2} and len(together[0].passes) < len(apart[0].passes) / 1.5
    assert_same(apart, together)


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "gspo"])
def test_losses_that_are_sums_of_their_parts(tiny, tmp_path, loss):
    changes = {**SPREAD, "loss_type": loss, "max_steps": 2, "beta": 0.1}
    together = trained(tiny, tmp_path, 10**6, **changes)
    assert together[0].passes == [12, 12]
    assert_same(trained(tiny, tmp_path, 0, **changes), together)


@pytest.mark.parametrize("loss", ["bnpo", "cispo"])
def test_others_stay_apart(tiny, tmp_path, loss):
    trainer, _ = trained(tiny, tmp_path, 10**6, **SPREAD, loss_type=loss, max_steps=1)
    assert trainer.passes == [2] * 6


def test_passes_are_even_and_no_larger_than_they_may_be(tiny, tmp_path):
    trainer, _ = trained(tiny, tmp_path, 5 * 2 * 20, **SPREAD, max_steps=1)
    assert len(trainer.passes) > 1 and max(trainer.passes) - min(trainer.passes) <= 2
    assert trained(tiny, tmp_path, None, **SPREAD, max_steps=1)[0].passes == [2] * 6  # by default, only on a GPU
    with pytest.raises(ConfigError, match="tokens_per_pass"):
        GRPOConfig(**settings(tmp_path, tokens_per_pass=-1))


def test_by_default_a_pass_is_as_large_as_memory_allows(tiny, tmp_path, monkeypatch):
    """What a GPU does: blocks that train as one function, and a reading of its memory."""
    made = plan.plan
    monkeypatch.setattr(plan, "plan", lambda model, **options: made(model, **{**options, "whole": True}))
    trainer, _ = trained(tiny, tmp_path, None, **SPREAD, max_steps=1)
    free = {"bytes": 2**34}
    monkeypatch.setattr(gauge, "read", lambda device: gauge.Reading(free["bytes"], 0, 0))
    assert trainer._fits(30000)
    free["bytes"] = 2**20
    assert not trainer._fits(30000)
    monkeypatch.setattr(plan, "installed", lambda model: None)
    assert not trainer._fits(1)  # nothing is known of other blocks
