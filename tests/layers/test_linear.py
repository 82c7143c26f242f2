"""What a product reads off a layer, and what it declines to read."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from unsloth.layers import linear


class Model(torch.nn.Module):
    def __init__(self, bias=False):
        super().__init__()
        self.proj = torch.nn.Linear(8, 6, bias=bias)


def adapted(bias=False, **options):
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["proj"], init_lora_weights=False, **options)
    return inject_adapter_in_model(config, Model(bias).requires_grad_(False)).train().proj


def test_reads_base_adapter_and_scale():
    layer = adapted(bias=True)
    found = linear.read(layer)
    assert found.base is layer.base_layer and found.bias is layer.base_layer.bias and not found.quantized
    assert found.adapter.a is layer.lora_A["default"].weight and found.adapter.scale == 1.5
    x = torch.randn(3, 8)
    assert torch.allclose(linear.multiply([found], x)[0], layer(x), atol=1e-6)


def test_without_its_adapter_a_layer_is_its_base():
    layer = adapted()
    layer.enable_adapters(False)
    assert linear.read(layer).adapter is None
    assert linear.read(layer.base_layer).base is layer.base_layer
    x = torch.randn(3, 8)
    assert torch.allclose(linear.multiply([linear.read(layer)], x)[0], layer.base_layer(x))


def trained(layer):
    layer.base_layer.weight.requires_grad_(True)


def hooked(layer):
    layer.lora_B["default"].register_forward_pre_hook(lambda *_: None)


def other_class(layer):
    layer.lora_A["default"] = torch.nn.utils.skip_init(type("Mine", (torch.nn.Linear,), {}), 8, 2)


def other_forward(layer):
    layer.base_layer.forward = lambda x: x


@pytest.mark.parametrize(
    ("options", "change", "reason"),
    [
        ({}, lambda layer: layer.merge(), "merged"),
        ({"lora_dropout": 0.1}, None, "dropout"),
        ({"use_dora": True}, None, "variant"),
        ({"lora_bias": True}, None, "bias"),
        ({}, trained, "trained"),
        ({}, hooked, "hooks"),
        ({}, other_class, "plain linear layers"),
        ({}, other_forward, "hooks on a linear layer"),
        ({}, lambda layer: layer.register_forward_hook(lambda *_: None), "hooks"),
    ],
)
def test_declines_with_a_reason(options, change, reason):
    layer = adapted(bias="lora_bias" in options, **options)
    if change is not None:
        change(layer)
    assert reason in linear.read(layer)


def test_dropout_is_an_obstacle_in_training_only():
    layer = adapted(lora_dropout=0.1)
    assert isinstance(linear.read(layer), str)
    assert isinstance(linear.read(layer.eval()), linear.Frozen)


def test_other_layers_are_declined_by_name():
    assert linear.read(torch.nn.Conv1d(1, 1, 1)) == "a layer of the class Conv1d"


def test_hooks_on_the_layer_that_is_called_are_no_obstacle():
    layer = adapted()
    layer.register_forward_hook(lambda *_: None)
    assert isinstance(linear.read(layer), str)
    assert isinstance(linear.read_called(layer), linear.Frozen)


def test_a_weight_of_another_dtype_is_cast_for_the_product():
    layer = adapted()
    x = torch.randn(3, 8).bfloat16()
    (y,) = linear.multiply([linear.read(layer)], x)
    assert y.dtype == torch.bfloat16
    assert torch.allclose(y.float(), layer(x.float()), atol=0.1)
