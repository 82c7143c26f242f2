"""What runs by default on a GPU, all of it together, against the padded run of separate functions."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from unsloth import FastLanguageModel, SFTConfig, SFTTrainer
from unsloth.layers import block_graphs
from unsloth.memory.budget import Budget
from unsloth.models import plan

sys.path.insert(0, str(Path(__file__).parents[1] / "parity"))
sys.path.insert(0, str(Path(__file__).parents[1] / "layers"))
from test_block_graphs import Recorder, keeper_of


def train(folder, rows, tmp_path, policy, **changes):
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=256, dtype=torch.float32, load_in_16bit=True
    )
    model = FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=policy)
    made = None
    if policy is not False:
        plan.remove(model)
        made = plan.plan(model, attention=True, whole=True, graphs=True)
        made.apply()
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


def test_rows_end_to_end_joined_filled_and_recorded_are_the_padded_run(tiny, conversations, tmp_path, monkeypatch):
    expected, weights, _ = train(tiny(), conversations[:36], tmp_path, False)
    Recorder.made = 0
    monkeypatch.setattr(block_graphs, "record", Recorder)
    monkeypatch.setattr(block_graphs, "can_record", lambda x: True)
    monkeypatch.setattr(block_graphs, "new_pool", lambda device: (None, None))
    monkeypatch.setattr("unsloth.train.sft._keeps_rows_apart", lambda model: True)
    found, others, made = train(tiny(), conversations[:36], tmp_path, Budget(device=2**30), fused_head=True)
    standing = [len(layers) for layers in keeper_of(made)._standing.values()]
    assert standing and set(standing) == {keeper_of(made).layers} and Recorder.made == 2 * sum(standing)
    for (loss, tokens), (other, same) in zip(found, expected, strict=True):
        assert abs(loss - other) < 2e-6 * other and tokens == same
    for name, weight in weights.items():
        assert (others[name] - weight).norm() <= 1e-4 * weight.norm()
