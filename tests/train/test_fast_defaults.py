"""What runs by default on a GPU, all of it together, against the padded run of separate functions."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from unsloth import FastLanguageModel, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from unsloth.layers import block_graphs
from unsloth.memory.budget import Budget
from unsloth.models import plan

sys.path.insert(0, str(Path(__file__).parents[1] / "parity"))
sys.path.insert(0, str(Path(__file__).parents[1] / "layers"))
from test_block_graphs import Recorder, keeper_of


def make(folder, policy):
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=256, dtype=torch.float32, load_in_16bit=True
    )
    model = FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=policy)
    made = None
    if policy is not False:
        plan.remove(model)
        made = plan.plan(model, attention=True, whole=True, graphs=True)
        made.apply()
    return model, tokenizer, made


@pytest.fixture
def recorder(monkeypatch):
    """Graphs that are computed on the CPU."""
    Recorder.made = 0
    monkeypatch.setattr(block_graphs, "record", Recorder)
    monkeypatch.setattr(block_graphs, "can_record", lambda x: True)
    monkeypatch.setattr(block_graphs, "new_pool", lambda device: (None, None))


def train(folder, rows, tmp_path, policy, **changes):
    model, tokenizer, made = make(folder, policy)
    args = SFTConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        max_steps=6,
        logging_steps=1,
        learning_rate=1e-3,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        **changes,
    )
    trainer = SFTTrainer(model=model, tokenizer=tokenizer, train_dataset=rows, args=args)
    trainer.train()
    logged = [(entry["loss"], entry["num_tokens"]) for entry in trainer.state.log_history if "loss" in entry]
    return logged, {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}, made


def test_rows_end_to_end_joined_filled_and_recorded_are_the_padded_run(
    tiny, conversations, tmp_path, monkeypatch, recorder
):
    expected, weights, _ = train(tiny(), conversations[:36], tmp_path, False)
    monkeypatch.setattr("unsloth.train.sft._keeps_rows_apart", lambda model: True)
    found, others, made = train(tiny(), conversations[:36], tmp_path, Budget(device=2**30), fused_head=True)
    standing = [len(layers) for layers in keeper_of(made)._standing.values()]
    assert standing and set(standing) == {keeper_of(made).layers} and Recorder.made == 2 * sum(standing)
    for (loss, tokens), (other, same) in zip(found, expected, strict=True):
        assert abs(loss - other) < 2e-6 * other and tokens == same
    for name, weight in weights.items():
        assert (others[name] - weight).norm() <= 1e-4 * weight.norm()


def reinforce(folder, tmp_path, policy):
    """Completions of every length, in groups that share a prompt, with a reference."""
    model, tokenizer, made = make(folder, policy)
    model.generation_config.eos_token_id = [*range(4, 20), tokenizer.eos_token_id]  # so that some end early
    args = GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=8,
        num_generations=4,
        gradient_accumulation_steps=2,
        max_completion_length=24,
        max_steps=5,
        logging_steps=1,
        learning_rate=1e-3,
        beta=0.1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )

    def letters(completions, **_):
        return [float(sum(map(ord, completion)) % 7) for completion in completions]

    rows = [{"prompt": f"Say {i}:" * (1 + i % 3)} for i in range(12)]
    trainer = GRPOTrainer(model=model, tokenizer=tokenizer, reward_funcs=letters, train_dataset=rows, args=args)
    trainer._fills = made is not None
    trainer.train()
    names = ("loss", "kl", "entropy", "completions/mean_length", "completions/min_length", "num_tokens")
    logged = [[entry[name] for name in names] for entry in trainer.state.log_history if "loss" in entry]
    return logged, {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}, made


def test_completions_end_to_end_filled_and_recorded_are_the_padded_run(tiny, tmp_path, recorder):
    expected, weights, _ = reinforce(tiny(), tmp_path, False)
    found, others, made = reinforce(tiny(), tmp_path, Budget(device=2**30))
    assert any(length < 24 for *_, length, _ in expected)
    assert Recorder.made >= 2 * keeper_of(made).layers
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-6)
    for name, weight in weights.items():
        assert (others[name] - weight).norm() <= 1e-3 * weight.norm()
