"""M07: an export that is killed, or for which there is no room, leaves nothing that loads; the next one succeeds."""

import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

from unsloth import FastLanguageModel
from unsloth.core import artifact
from unsloth.core.errors import AdapterError, StorageError, UnslothError
from unsloth.export import layout, merge


@pytest.fixture(scope="module")
def model(tiny):
    loaded, tokenizer = FastLanguageModel.from_pretrained(
        str(tiny()), max_seq_length=64, dtype=torch.float32, load_in_4bit=True
    )
    model = FastLanguageModel.get_peft_model(loaded, r=4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model, tokenizer


def kill_in_a_child(save, when):
    """Fork, and let the child be killed (SIGKILL) as it reaches the given tensor, or the end of the weights."""
    child = os.fork()
    if child:
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        return
    in_checkpoint = layout.in_checkpoint

    def cut(outline, tensors):
        for number, entry in enumerate(in_checkpoint(outline, tensors)):
            if number == when and entry[1].device.type != "meta":
                os.kill(os.getpid(), signal.SIGKILL)
            yield entry

    layout.in_checkpoint = cut
    artifact.write_manifest = lambda *args, **options: os.kill(os.getpid(), signal.SIGKILL)
    try:
        save()
    finally:
        os._exit(1)


@pytest.mark.parametrize("when", [0, 7, 10**6])
def test_a_killed_merge_leaves_nothing_under_its_name(model, tmp_path, when):
    model, tokenizer = model
    target = tmp_path / "merged"
    save = lambda: model.save_pretrained_merged(target, tokenizer, max_shard_size="60KB")
    kill_in_a_child(save, when)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".merged.stage-") and any(left.glob("*.safetensors"))
    with pytest.raises(UnslothError):
        FastLanguageModel.from_pretrained(str(target), max_seq_length=64)
    save()
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    assert artifact.verify(target) == []


def test_a_killed_merge_leaves_the_earlier_one(model, tmp_path):
    model, tokenizer = model
    target = tmp_path / "merged"
    save = lambda: model.save_pretrained_merged(target, tokenizer)
    save()
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    kill_in_a_child(save, 5)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before


def test_no_room_is_known_before_anything_is_computed(model, tmp_path, monkeypatch):
    model, tokenizer = model
    usage = shutil.disk_usage(tmp_path)
    size = sum(tensor.nbytes for tensor in layout.plan(merge.skeleton(model)))
    monkeypatch.setattr(merge, "merged_weight", lambda *args, **options: pytest.fail("a weight was merged"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size))
    with pytest.raises(StorageError, match=f"bytes needed, {size:,} free"):
        model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_other_files_is_not_touched(model, tmp_path, monkeypatch):
    model, tokenizer = model
    monkeypatch.setattr(merge, "merged_weight", lambda *args, **options: pytest.fail("a weight was merged"))
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "thesis.tex").write_text("years of work")
    with pytest.raises(StorageError, match=r"thesis\.tex"):
        model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["thesis.tex"]


def test_an_adapter_on_another_base_is_not_merged(model, tiny, tmp_path):
    model, tokenizer = model
    model.save_pretrained_merged(tmp_path / "adapter", tokenizer, save_method="lora")
    other = tmp_path / "other"
    shutil.copytree(tiny(), other)

    tensors = {name: tensor * 1.5 for name, tensor in load_file(other / "model.safetensors").items()}
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(tiny()), str(other)))
    with pytest.raises(AdapterError, match="another model than the one it was trained on"):
        FastLanguageModel.from_pretrained(str(tmp_path / "adapter"), max_seq_length=64)
