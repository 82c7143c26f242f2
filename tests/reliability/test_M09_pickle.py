"""M09: pickled weights are refused, nothing in them runs, and the converter that is offered works."""

import os
import pickle
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from unsloth import FastLanguageModel
from unsloth.core.errors import CheckpointError
from unsloth.models import unpickle


class Gadget:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def pickled(tiny, tmp_path):
    """``pickled(content)``: the tiny model with pytorch_model.bin instead of safetensors."""

    def make(content=None):
        folder = shutil.copytree(tiny(), tmp_path / "model")
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        torch.save(content if content is not None else tensors, folder / "pytorch_model.bin")
        return folder

    return make


def load(folder):
    return FastLanguageModel.from_pretrained(str(folder), max_seq_length=64, load_in_16bit=True)


def test_a_gadget_never_runs(pickled, tmp_path):
    canary = tmp_path / "canary"
    folder = pickled({"model.norm.weight": torch.ones(64), "x": Gadget(canary)})
    for name in ("optimizer.pt", "training_args.bin", "rng_state.pth", "scheduler.pt"):
        (folder / name).write_bytes(pickle.dumps(Gadget(canary)))
    with pytest.raises(CheckpointError, match=r"pickle files.*unsloth\.models\.unpickle") as caught:
        load(folder)
    assert "weights_only" not in str(caught.value)
    with pytest.raises(CheckpointError, match="nothing in it was run"):
        unpickle.convert(folder, tmp_path / "converted")
    assert not canary.exists() and not (tmp_path / "converted").exists()


def test_files_of_a_run_beside_good_weights_are_not_read(tiny, tmp_path):
    folder = shutil.copytree(tiny(), tmp_path / "model")
    for name in ("optimizer.pt", "training_args.bin", "rng_state.pth", "pytorch_model.bin"):
        (folder / name).write_bytes(pickle.dumps(Gadget(tmp_path / "canary")))
    assert load(folder)
    assert not (tmp_path / "canary").exists()


def test_the_advice_works_as_it_is_written(pickled, tmp_path, tiny):
    folder = pickled()
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    command = re.search(r"python (-m \S+) FOLDER NEW_FOLDER", str(caught.value))[1].split()
    converted = tmp_path / "converted"
    result = subprocess.run([sys.executable, *command, str(folder), str(converted)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    ids = torch.arange(4, 40)[None]
    plain = AutoModelForCausalLM.from_pretrained(tiny(), dtype=torch.bfloat16)
    model, _ = FastLanguageModel.from_pretrained(
        str(converted), max_seq_length=64, load_in_16bit=True, dtype=torch.bfloat16, fast_layers=False
    )
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert not list(converted.glob("*.bin"))


def test_a_pickled_adapter(tiny, tmp_path):
    model, _ = load(tiny())
    FastLanguageModel.get_peft_model(model, r=2).save_pretrained(tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    torch.save(load_file(weights), tmp_path / "adapter" / "adapter_model.bin")
    weights.unlink()
    with pytest.raises(CheckpointError, match="unpickle"):
        load(tmp_path / "adapter")
    unpickle.convert(tmp_path / "adapter", tmp_path / "converted")
    assert load(tmp_path / "converted")


def test_what_is_not_a_table_of_tensors(pickled, tmp_path):
    with pytest.raises(CheckpointError, match="not a table of tensors"):
        unpickle.convert(pickled({"model.norm.weight": [1.0]}), tmp_path / "converted")
    with pytest.raises(CheckpointError, match=r"no pytorch_model\.bin"):
        unpickle.convert(tmp_path, tmp_path / "converted")
