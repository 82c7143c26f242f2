"""Projections with adapters are PEFT's, for few rows and for many, and whichever adapter a row has."""

import pytest
import tiny_families
import torch

from unsloth.generate.adapter_bank import Selection
from unsloth.generate.live_model import LiveModel


@pytest.mark.parametrize("rows", [3, 128, 141])
@pytest.mark.parametrize("precision", ["float32", "nf4"])
def test_projections_are_pefts(rows, precision):
    model = tiny_families.build("llama, biases")
    if precision == "nf4":
        tiny_families.quantize(model)
    model = tiny_families.adapt(model, tiny_families.TARGETS).eval()
    live = LiveModel(model, 64, True)
    live.bank.require("default")
    live.begin()
    layer, block = live.decoder.layers[0], live.inner.model.layers[0]
    attention, mlp = block.self_attn, block.mlp
    sites = {
        layer.qkv: (attention.q_proj, attention.k_proj, attention.v_proj),
        layer.output: (attention.o_proj,),
        layer.gate_up: (mlp.gate_proj, mlp.up_proj),
        layer.down: (mlp.down_proj,),
    }
    generator = torch.Generator().manual_seed(rows)
    without = torch.arange(rows) % 3 == 1
    with torch.no_grad():
        for site, modules in sites.items():
            x = torch.randn(rows, site.projections[0].in_features, generator=generator)
            # bitsandbytes' code for CPUs reads rows that are no whole number of blocks in a way of its own
            for fast in (True, False) if precision == "float32" or x.shape[1] % 64 == 0 else (True,):
                every = site(x, Selection(True), fast)
                mixed = site(x, Selection(True, (~without)[:, None].float()), fast)
                for y, z, module in zip(every, mixed, modules, strict=True):
                    torch.testing.assert_close(y, module(x), rtol=1e-5, atol=2e-5)
                    expected = torch.where(without[:, None], module.base_layer(x), module(x))
                    torch.testing.assert_close(z, expected, rtol=1e-5, atol=2e-5)
