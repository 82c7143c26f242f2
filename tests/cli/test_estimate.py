import sys

import pytest
import yaml

from unsloth.cli import main


@pytest.fixture
def estimate(tiny, tmp_path, monkeypatch, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"model": {"model_name": str(tiny()), "max_seq_length": 256}}))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["unsloth", "estimate", str(file), *arguments])
        with pytest.raises(SystemExit) as ended:
            main.main()
        return ended.value.code, capsys.readouterr().out

    return run


def test_the_parts_and_what_fits(estimate):
    code, shown = estimate("--memory", "100MB")
    assert code == 0
    for part in ("weights", "adapter", "optimizer state", "activations", "logits", "together"):
        assert part in shown
    assert "It fits into 95 MiB (given)" in shown
    assert "Largest batch with rows of 256 tokens: " in shown
    assert "Longest rows with a batch of 8: 512 tokens" in shown


def test_what_to_change_if_it_does_not_fit(estimate):
    code, shown = estimate("--memory", "12MB", "--set", "adapter.use_gradient_checkpointing=false")
    assert code == 0
    assert "It does not fit into 11 MiB" in shown
    assert "training.per_device_train_batch_size: 1 with training.gradient_accumulation_steps: 8" in shown
    assert "adapter.use_gradient_checkpointing: unsloth" in shown
    assert "fits" in shown


def test_without_a_size_it_looks_at_this_machine(estimate):
    code, shown = estimate()
    assert code == 0 and "free on" in shown


@pytest.mark.parametrize("method", ["dpo", "kto", "simpo", "reward"])
def test_methods_that_learn_from_preferences(estimate, method):
    code, shown = estimate("--memory", "200MB", "--set", f"training.method={method}")
    assert code == 0 and "A step of 8 x" in shown and "Largest batch with" in shown


def test_a_method_that_samples_shows_both_phases(estimate):
    code, shown = estimate("--memory", "200MB", "--set", "training.method=grpo")
    assert code == 0 and "While completions are sampled" in shown and "keys and values" in shown
    assert "A step of 8 x 256 tokens" in shown and "Largest batch with" in shown
