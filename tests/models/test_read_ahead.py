"""Tensors that are read ahead are those of the files, in any order, and a model loaded from them is the same."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from unsloth import FastLanguageModel
from unsloth.core.errors import CheckpointError
from unsloth.models import load, read_ahead, weight_files
from unsloth.models.read_ahead import ReadAhead, Sizes

CPU = torch.device("cpu")
SMALL = Sizes(threads=3, piece=100, ahead=700)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Two files with eleven layers, odd shapes, several dtypes, an empty tensor and a number."""
    folder = tmp_path_factory.mktemp("stored")
    torch.manual_seed(0)
    first = {f"layers.{i}.weight": torch.randn(3 + i, 7).to(torch.bfloat16) for i in range(11)}
    second = {"head.weight": torch.randn(5, 33), "empty": torch.zeros(0, 4), "count": torch.tensor(7)}
    save_file(first, folder / "a.safetensors")
    save_file(second, folder / "b.safetensors")
    headers = {**weight_files.check_file(folder / "a.safetensors"), **weight_files.check_file(folder / "b.safetensors")}
    return folder, headers, first | second


@pytest.mark.parametrize("order", ["natural", "reversed", "twice"])
def test_tensors_are_those_of_the_files(stored, order):
    _, headers, expected = stored
    names = sorted(expected, key=lambda name: [int(x) if x.isdigit() else -1 for x in name.split(".")])
    names = names[::-1] if order == "reversed" else names * 2 if order == "twice" else names
    with ReadAhead(headers, CPU, SMALL) as reader:
        for name in names:
            found = reader.fetch(name)
            assert found.dtype == expected[name].dtype and torch.equal(found, expected[name]), name


def test_no_more_is_read_than_allowed(stored):
    _, headers, _ = stored
    with ReadAhead(headers, CPU, SMALL) as reader:
        reader.fetch("layers.0.weight")
        held = sum(coming.flat.nbytes for coming in reader._coming.values())
        assert 0 < held < SMALL.ahead + max(header.size for header in headers.values())


def test_a_file_that_was_cut_meanwhile_is_named(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(1000)}, path)
    headers = weight_files.check_file(path)
    with path.open("r+b") as file:
        file.truncate(2000)
    with pytest.raises(CheckpointError, match=re.escape(str(path))), ReadAhead(headers, CPU, SMALL) as reader:
        reader.fetch("a")


@pytest.mark.parametrize("options", [{"load_in_4bit": True}, {"load_in_4bit": False}])
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_is_the_same_one(tiny, monkeypatch, tied, options):
    folder = tiny("llama", tied)
    plain, _ = FastLanguageModel.from_pretrained(str(folder), dtype=torch.float32, **options)
    seen = []
    monkeypatch.setattr(load, "_reads_ahead", lambda *_: seen.append(1) or True)
    read, _ = FastLanguageModel.from_pretrained(str(folder), dtype=torch.float32, **options)
    assert seen
    expected = plain.state_dict()
    assert list(expected) == list(read.state_dict())
    for name, value in read.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert read.generation_config.to_dict() == plain.generation_config.to_dict()
    assert read.config.to_dict() == plain.config.to_dict()
    assert read.name_or_path == plain.name_or_path


def test_which_models_are_read_so(tiny, monkeypatch):
    found = load.source.resolve(str(tiny()))
    config = load.AutoConfig.from_pretrained(found.location)
    arguments = {"config": config, "device_map": {"": torch.device("cuda", 0)}}
    assert load._reads_ahead(found, load.AutoModelForCausalLM, arguments)
    for other in ({"": "cpu"}, {"": CPU}, "auto", {"model": 0, "lm_head": 1}):
        assert not load._reads_ahead(found, load.AutoModelForCausalLM, arguments | {"device_map": other})
    assert not load._reads_ahead(found, object(), arguments)
    monkeypatch.setenv("UNSLOTH_READ_AHEAD", "0")
    assert not load._reads_ahead(found, load.AutoModelForCausalLM, arguments)


def test_a_dtype_that_is_unknown_is_left_to_transformers(stored):
    folder, headers, _ = stored
    assert read_ahead.can_read(headers.values())
    assert set(load_file(folder / "a.safetensors")) < set(headers)
    assert not read_ahead.can_read([weight_files.TensorHeader(folder, "F4", (1,), 0, 1)])
