"""Parts that the GGUF tests share."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import PreTrainedModel

from unsloth.export.gguf import runtime

# What llama.cpp does not have of the families' test models: windows in some architectures, norms of heads in shallow
# models, a rotary embedding that is missing elsewhere than in every fourth layer.
NO_WINDOW = {"use_sliding_window": False, "sliding_window": None, "layer_types": None}
CHANGES: dict[str, dict] = {
    "mistral": {"sliding_window": None},
    "ministral": {"sliding_window": 64, "layer_types": ["full_attention", "full_attention"]},
    "cwm": {"sliding_window": 64, "layer_types": ["full_attention", "full_attention"]},
    "qwen2": NO_WINDOW,
    "qwen3": NO_WINDOW,
    "phi3": {"sliding_window": None},
    "smollm3": {**NO_WINDOW, "no_rope_layers": [1, 1, 1, 0], "num_hidden_layers": 4},
}


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


_TINY = _module(Path(__file__).parents[2] / "parity" / "tiny_families.py")
FAMILIES = tuple(_TINY.FAMILIES)


@pytest.fixture(scope="session")
def family() -> Callable[..., PreTrainedModel]:
    """``family(name, **changes)``: a random two-layer model in float32 whose every part makes a difference."""
    original = dict(_TINY.FAMILIES)

    def build(name: str, **changes: object) -> PreTrainedModel:
        prefix, values = original[name]
        _TINY.FAMILIES[name] = (prefix, {**values, **CHANGES.get(name, {}), "vocab_size": 264, **changes})
        return _TINY.build(name).eval()

    return build


@pytest.fixture(scope="session")
def engine() -> str:
    """The installed llama.cpp."""
    found = runtime.available()
    if found is None:
        pytest.skip("llama.cpp is not installed (extra gguf-run)")
    return found


@pytest.fixture(scope="session")
def ids() -> list[list[int]]:
    """Two sequences of tokens of different lengths."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(4, 260, (length,), generator=generator).tolist() for length in (40, 17)]


@torch.no_grad()
def logits(model: PreTrainedModel, ids: list[list[int]]) -> torch.Tensor:
    """Of all positions, float32 [T, V]."""
    return torch.cat([model(input_ids=torch.tensor([each])).logits[0].float() for each in ids])
