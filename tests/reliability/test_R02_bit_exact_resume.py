"""A resumed run ends with the weights, losses and steps of the undisturbed one."""

import peft
import pytest
import safetensors.torch
from bitsandbytes.optim import GlobalOptimManager

KEYS = ("step", "loss", "learning_rate", "grad_norm", "num_tokens", "mean_token_accuracy")


def entries(log):
    return [{key: entry[key] for key in KEYS if key in entry} for entry in log if "loss" in entry]


@pytest.mark.parametrize("step", [2, 4, 6])
def test_from_each_checkpoint(runs, whole_run, tiny, tmp_path, assert_equal, step):
    output, weights, log = whole_run
    trainer = runs.build(str(tiny()), str(tmp_path / "out"))
    trainer.train(resume_from_checkpoint=str(output / f"checkpoint-{step}"))
    assert trainer.state.global_step == 8
    assert_equal(runs.weights(trainer), weights)
    assert entries(trainer.state.log_history) == entries(log)


@pytest.mark.parametrize(
    ("precision", "optim"),
    [("full_finetuning", "adamw_8bit"), ("load_in_4bit", "adamw_8bit"), ("load_in_8bit", "adamw_torch")],
)
def test_other_precisions_and_optimizers(runs, tiny, tmp_path, assert_equal, precision, optim):
    options = {"model": str(tiny()), "precision": precision, "optim": optim, "max_steps": 4}
    whole = runs.build(output_dir=str(tmp_path / "out"), **options)
    whole.train()
    trainer = runs.build(output_dir=str(tmp_path / "again"), **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert_equal(runs.weights(trainer), runs.weights(whole))
    assert entries(trainer.state.log_history) == entries(whole.state.log_history)
    # transformers lets embeddings have 32-bit states, by their number, for every later optimizer of the process
    GlobalOptimManager.get_instance().initialize()


def test_the_best_model_is_kept_and_loaded_and_a_resumed_run_knows_it(runs, tiny, tmp_path, assert_equal):
    options = {
        "model": str(tiny()),
        "output_dir": str(tmp_path),
        "eval_data": runs.rows(3, first=50),
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": True,  # so that the first one is the best
        "save_total_limit": 2,
        "learning_rate": 1e-2,
    }
    whole = runs.build(**options)
    whole.train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-8"]
    assert whole.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    best = safetensors.torch.load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    assert_equal(peft.get_peft_model_state_dict(whole.model), best)
    resumed = runs.build(**{**options, "max_steps": 10})
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
