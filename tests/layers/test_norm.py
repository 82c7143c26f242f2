"""Norms at mixed dtypes: the same bits as the modules that they stand for."""

from __future__ import annotations

import pytest
import torch
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from unsloth.layers.norm import NormOptions, add_and_normalize, normalize

FORMS = {
    "llama": (LlamaRMSNorm, NormOptions("rms", 1e-5, 0.0, True)),
    "gemma": (GemmaRMSNorm, NormOptions("rms", 1e-5, 1.0, False)),
    "cohere": (CohereLayerNorm, NormOptions("layer", 1e-5, 0.0, False)),
}


def module(name):
    torch.manual_seed(0)
    made = FORMS[name][0](16, eps=1e-5)
    torch.nn.init.normal_(made.weight)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FORMS)
def test_a_float32_weight(name, dtype):
    norm, x = module(name), torch.randn(5, 16).to(dtype)
    ours = normalize(x, norm.weight, FORMS[name][1])
    assert ours.dtype == norm(x).dtype
    assert torch.equal(ours, norm(x))


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.bfloat16, torch.float32), (torch.bfloat16,) * 2])
@pytest.mark.parametrize("name", FORMS)
def test_adding_first(name, dtypes):
    norm, x, residual = module(name), torch.randn(5, 16).to(dtypes[0]), torch.randn(5, 16).to(dtypes[1])
    ours, total = add_and_normalize(x, residual, norm.weight, FORMS[name][1])
    assert torch.equal(total, residual + x)
    assert torch.equal(ours, norm(total))
