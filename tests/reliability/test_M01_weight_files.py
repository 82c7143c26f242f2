"""M01: truncated, missing, extra and foreign weight files; an index that points outside its folder."""

import json
import logging
import shutil

import pytest
from transformers import AutoModelForCausalLM

from unsloth import FastLanguageModel
from unsloth.core.errors import CheckpointError

INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(tiny, tmp_path):
    """The tiny model in several shards; returns its folder and the names of the shards."""
    folder = tmp_path / "model"
    shutil.copytree(tiny(), folder)
    (folder / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(tiny()).save_pretrained(folder, max_shard_size="100KB")
    shards = sorted(path.name for path in folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    return folder, shards


def load(folder):
    return FastLanguageModel.from_pretrained(str(folder), max_seq_length=64, load_in_16bit=True)


def test_whole_shards_load(sharded):
    assert load(sharded[0])


def test_a_truncated_shard(sharded):
    folder, shards = sharded
    content = (folder / shards[1]).read_bytes()
    (folder / shards[1]).write_bytes(content[:-100])
    with pytest.raises(
        CheckpointError, match=f"{shards[1]} has {len(content) - 100:,} bytes instead of {len(content):,}"
    ):
        load(folder)
    (folder / shards[1]).write_bytes(content[:4])
    with pytest.raises(CheckpointError, match=rf"{shards[1]} is not a safetensors file.*\(4 bytes\)"):
        load(folder)


def test_a_missing_shard(sharded):
    folder, shards = sharded
    (folder / shards[1]).unlink()
    with pytest.raises(CheckpointError, match=f"missing.*{shards[1]}"):
        load(folder)


def test_a_web_page_instead_of_a_shard(sharded):
    folder, shards = sharded
    (folder / shards[0]).write_bytes(b"<!doctype html><html>" + b"x" * 1000)
    with pytest.raises(CheckpointError, match=f"{shards[0]}.*1,021 bytes.*web page"):
        load(folder)


def test_shards_of_another_save_are_mentioned(sharded):
    folder, shards = sharded
    shutil.copyfile(folder / shards[0], folder / "model-00001-of-00009.safetensors")
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("unsloth").addHandler(handler)
    load(folder)
    logging.getLogger("unsloth").removeHandler(handler)
    size = (folder / shards[0]).stat().st_size
    assert any(f"model-00001-of-00009.safetensors ({size:,} bytes)" in message for message in messages)


def test_two_sets_of_weights(sharded, tiny):
    folder, _ = sharded
    shutil.copyfile(tiny() / "model.safetensors", folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="two sets of weights"):
        load(folder)


@pytest.mark.parametrize(
    "outside", ["../other/model.safetensors", "/etc/passwd", "sub/model.safetensors", "..\\x", ".."]
)
def test_an_index_that_points_outside(sharded, tmp_path, tiny, outside):
    folder, _ = sharded
    (tmp_path / "other").mkdir()
    shutil.copyfile(tiny() / "model.safetensors", tmp_path / "other" / "model.safetensors")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = outside
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="points outside its folder"):
        load(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"weight_map": {}}', '{"weight_map": 3}'])
def test_a_broken_index(sharded, content):
    folder, _ = sharded
    (folder / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match="index"):
        load(folder)


def test_a_flipped_header(sharded):
    folder, shards = sharded
    content = bytearray((folder / shards[0]).read_bytes())
    content[9] ^= 0xFF
    (folder / shards[0]).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{shards[0]} has a damaged header"):
        load(folder)


def test_an_adapter_is_checked_alike(tiny, tmp_path):
    model, _ = load(tiny())
    FastLanguageModel.get_peft_model(model, r=2).save_pretrained(tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-8])
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors has .* bytes instead of"):
        load(tmp_path / "adapter")
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"missing.*adapter_model\.safetensors"):
        load(tmp_path / "adapter")
