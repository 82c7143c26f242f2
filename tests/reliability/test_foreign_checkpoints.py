"""Folders of other programs: accepted with a warning, unless a pickle file in them holds more than data."""

import os
import shutil

import peft
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from unsloth.core.errors import CheckpointError


class Gadget:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.fixture(scope="module")
def foreign(runs, tiny, tmp_path_factory):
    """The folder of a run of plain transformers and PEFT, stopped at step 4 of 8, and the weights at its end."""
    folder = tmp_path_factory.mktemp("foreign")
    tokenizer = AutoTokenizer.from_pretrained(tiny())
    model = AutoModelForCausalLM.from_pretrained(tiny(), dtype=torch.float32)
    transformers.set_seed(3407)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=4, lora_alpha=16, lora_dropout=0.1, target_modules=targets, task_type="CAUSAL_LM")
    )
    rows = []
    for row in runs.rows():
        ids = tokenizer(row["text"] + tokenizer.eos_token)["input_ids"]
        rows.append({"input_ids": ids, "labels": ids})
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(output_dir=str(folder), **{**runs.DEFAULTS, "save_steps": 4}),
        train_dataset=rows,
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
    )
    trainer.train()
    return folder, {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_a_checkpoint_of_plain_transformers_goes_on_exactly(runs, foreign, tiny, tmp_path, assert_equal, messages):
    folder, weights = foreign
    trainer = runs.build(str(tiny()), str(tmp_path))
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert any("has no manifest" in message for message in messages)
    assert_equal(runs.weights(trainer), weights)


def test_found_by_itself_it_is_passed_over(runs, foreign, tiny, tmp_path):
    shutil.copytree(foreign[0] / "checkpoint-4", tmp_path / "checkpoint-4")
    with pytest.raises(CheckpointError, match="no manifest.*Name one made by other programs explicitly"):
        runs.build(str(tiny()), str(tmp_path)).train(resume_from_checkpoint=True)


def test_a_folder_without_weights_is_refused(runs, foreign, tiny, tmp_path):
    with pytest.raises(CheckpointError, match="no weights in this folder.*resume_from_checkpoint=True"):
        runs.build(str(tiny()), str(tmp_path)).train(resume_from_checkpoint=str(foreign[0]))


def test_weights_alone_start_a_run(runs, foreign, tiny, tmp_path, messages):
    folder = tmp_path / "artifact"
    folder.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(foreign[0] / "checkpoint-8" / name, folder)
    trainer = runs.build(str(tiny()), str(tmp_path / "out"), max_steps=1)
    trainer.train(resume_from_checkpoint=str(folder))
    first = trainer.state.log_history[0]
    assert first["step"] == 1
    assert first["loss"] < 5.5  # an untrained adapter starts at 5.76
    assert any("training starts at step 0" in message for message in messages)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_pickles_are_data_or_are_not_opened(runs, foreign, tiny, tmp_path, name):
    folder = tmp_path / "checkpoint-4"
    shutil.copytree(foreign[0] / "checkpoint-4", folder)
    torch.save(Gadget(tmp_path / "canary"), folder / name)
    trainer = runs.build(str(tiny()), str(tmp_path / "out"), max_steps=5)
    if name == "training_args.bin":
        trainer.train(resume_from_checkpoint=str(folder))
    else:
        with pytest.raises(CheckpointError, match=f"{name} is a pickle file") as raised:
            trainer.train(resume_from_checkpoint=str(folder))
        assert "weights_only" not in str(raised.value)
    assert not (tmp_path / "canary").exists()


def test_weights_in_a_pickle_file(runs, foreign, tiny, tmp_path):
    folder = tmp_path / "checkpoint-4"
    shutil.copytree(foreign[0] / "checkpoint-4", folder)
    (folder / "adapter_model.safetensors").unlink()
    torch.save(Gadget(tmp_path / "canary"), folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="adapter_model.bin is a pickle file"):
        runs.build(str(tiny()), str(tmp_path / "out")).train(resume_from_checkpoint=str(folder))
    assert not (tmp_path / "canary").exists()


def test_a_truncated_file_is_named(runs, foreign, tiny, tmp_path):
    for name in ("optimizer.pt", "adapter_model.safetensors"):
        folder = tmp_path / name / "checkpoint-4"
        shutil.copytree(foreign[0] / "checkpoint-4", folder)
        (folder / name).write_bytes((folder / name).read_bytes()[:1000])
        with pytest.raises(CheckpointError, match=f"{name} is damaged"):
            runs.build(str(tiny()), str(tmp_path / "out")).train(resume_from_checkpoint=str(folder))
