import json

import pytest
import torch
from safetensors.torch import load_file

from unsloth.core.errors import ConfigError, ExportError
from unsloth.export import shards
from unsloth.export.layout import Planned


def example():
    tensors = {
        "flag": torch.tensor([True, False, True]),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "wide": torch.randn(5, 3),
        "narrow": torch.randn(7, 3).to(torch.bfloat16),
        "half": torch.randn(4).to(torch.float16),
        "empty": torch.empty(0, 3),
    }
    return tensors, [Planned(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]


def test_a_file_holds_what_was_given_in_any_order(tmp_path):
    tensors, planned = example()
    shards.write(tmp_path, planned, reversed(tensors.items()), 10**6)
    read = load_file(tmp_path / "model.safetensors")
    assert set(read) == set(tensors)
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in tensors.items())
    assert not (tmp_path / "model.safetensors.index.json").exists()


@pytest.mark.parametrize("write", ["planned", "held"])
def test_files_keep_to_their_size_and_the_index_names_each_tensor(tmp_path, write):
    tensors, planned = example()
    if write == "planned":
        shards.write(tmp_path, planned, tensors.items(), 60)
    else:
        shards.write_held(tmp_path, tensors.items(), 60)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 3
    assert {path.name for path in tmp_path.glob("*.safetensors")} == set(index["weight_map"].values())
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors[name])
    for file in set(index["weight_map"].values()):
        assert sum(t.nbytes for t in load_file(tmp_path / file).values()) <= 60


def test_what_does_not_fit_the_plan_is_an_error(tmp_path):
    tensors, planned = example()
    with pytest.raises(ExportError, match="did not give all tensors.*wide"):
        shards.write(tmp_path, planned, ((n, t) for n, t in tensors.items() if n != "wide"), 10**6)
    with pytest.raises(ExportError, match="does not have, or twice"):
        shards.write(tmp_path, planned, [*tensors.items(), ("wide", tensors["wide"])], 10**6)
    with pytest.raises(ExportError, match="float64.*where its checkpoint has.*float32"):
        shards.write(tmp_path, planned, [("wide", tensors["wide"].double())], 10**6)


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 MiB", 3 * 2**19), (7, 7), ("200kb", 200_000)])
def test_sizes(text, size):
    assert shards.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "5 apples", True])
def test_what_is_not_a_size(text):
    with pytest.raises(ConfigError, match="max_shard_size"):
        shards.parse_size(text)
