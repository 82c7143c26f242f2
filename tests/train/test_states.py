import json
import random

import bitsandbytes
import numpy as np
import pytest
import torch

from unsloth.core.errors import TrainingError
from unsloth.train import randomness, states


def test_values_come_back_as_they_were(tmp_path):
    shared = torch.arange(4)
    value = {
        "numbers": (1, 0.1 + 0.2, float("inf"), None, True, "text"),
        7: [shared, {"again": shared, "view": torch.arange(12.0).view(3, 4).t()}],
        "empty": torch.zeros(0),
        "half": torch.tensor([1.5], dtype=torch.bfloat16),
        "scalar": torch.tensor(3),
        "array": np.array([2**32 - 1, 5], dtype=np.uint32),
        "$mapping": {"$tensor": "not one"},
    }
    states.write(value, tmp_path, "x")
    back = states.read(tmp_path, "x")
    assert back["numbers"] == value["numbers"]
    assert back["$mapping"] == value["$mapping"]
    assert back[7][0] is back[7][1]["again"]
    assert torch.equal(back[7][1]["view"], value[7][1]["view"])
    assert back["half"].dtype == torch.bfloat16
    assert back["scalar"].shape == ()
    assert back["array"].dtype == np.uint32
    assert np.array_equal(back["array"], value["array"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json", "x.safetensors"]
    json.loads((tmp_path / "x.json").read_text())


def test_what_only_pickle_could_store_is_refused(tmp_path):
    with pytest.raises(TrainingError, match="x.inner is a set"):
        states.write({"inner": {1}}, tmp_path, "x")


def test_random_generators_go_on_where_they_were(tmp_path):
    def draw():
        return random.random(), np.random.rand(), np.random.randn(), torch.rand(3).tolist()

    np.random.randn()  # leaves a second value behind
    states.write(randomness.capture(), tmp_path, "rng")
    expected = draw()
    draw()
    randomness.restore(states.read(tmp_path, "rng"))
    assert draw() == expected


@pytest.mark.parametrize(
    "make",
    [
        lambda p: bitsandbytes.optim.AdamW8bit(p, lr=1e-2),
        lambda p: bitsandbytes.optim.PagedAdamW8bit(p, lr=1e-2),
        lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
        lambda p: torch.optim.Adagrad(p, lr=1e-2),
        lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    ],
    ids=["adamw_8bit", "paged_adamw_8bit", "adamw", "adagrad", "sgd"],
)
@pytest.mark.filterwarnings("ignore:.*[Pp]aged")
def test_an_optimizer_goes_on_exactly(tmp_path, make):
    def run(parameters, optimizer, steps):
        for step in steps:
            for i, parameter in enumerate(parameters):
                generator = torch.Generator().manual_seed(step * 10 + i)
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()

    def fresh(values):
        parameters = [torch.nn.Parameter(value.detach().clone()) for value in values]
        return parameters, make(parameters)

    start = [torch.ones(96, 64), torch.ones(8)]  # from 4,096 values on, bitsandbytes keeps 8-bit states
    whole, optimizer = fresh(start)
    run(whole, optimizer, range(4))
    middle, optimizer = fresh(start)
    run(middle, optimizer, range(2))
    states.write(optimizer.state_dict(), tmp_path, "optimizer")
    resumed, optimizer = fresh(middle)
    optimizer.load_state_dict(states.read(tmp_path, "optimizer"))
    run(resumed, optimizer, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(resumed, whole, strict=True))
