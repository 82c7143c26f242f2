"""M07: an export that is killed, or for which there is no room, leaves nothing that loads; the next one succeeds."""

import shutil

import pytest
from safetensors.torch import load_file, save_file
from tests.reliability import killed_child

from unsloth import FastLanguageModel
from unsloth.core import artifact
from unsloth.core.errors import AdapterError, StorageError, UnslothError
from unsloth.export import layout, merge


@pytest.fixture(scope="module")
def model(tiny):
    return killed_child.adapted(tiny())


def kill_in_a_child(save, when):
    """Kill a child that saves as it reaches the given tensor, or the end of the weights."""
    in_checkpoint = layout.in_checkpoint

    def cut(outline, tensors):
        for number, entry in enumerate(in_checkpoint(outline, tensors)):
            if number == when and entry[1].device.type != "meta":
                killed_child.die()
            yield entry

    killed_child.kill_in_a_child(save, lambda: setattr(layout, "in_checkpoint", cut))


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
