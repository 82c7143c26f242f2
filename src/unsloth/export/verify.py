"""Proof that a written model equals the one it was made from."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from unsloth.core import device
from unsloth.core.errors import ExportError
from unsloth.export.merge import merged_weight
from unsloth.models.record import transformers_model

SAMPLES = (
    "The library closes at six, so we walked there right after lunch and read until the lights went out.",
    "To bake the bread you need 500 grams of flour, 350 grams of water, salt, yeast, and patience.",
    "def area(width, height):\n    return width * height\n\nprint(area(3, 4))",
    "Question: what is 17 plus 25? Answer: 42, because 17 and 25 make 42.",
)
"""Texts that the two models are compared on."""

# Nats. Rounding to 16 bits costs about 1e-3; another model's predictions cost more than 1. The median, because a
# single position at which the model itself is on the edge can cost 5 by rounding alone, and dominate the mean.
MEDIAN_KL_LIMIT = 0.05
_LAYER_LIMIT = 4  # times the dtype's epsilon, relative to the size of the layer's output


@dataclass(frozen=True)
class Comparison:
    """How far a reloaded model is from the original, over the tokens of some sample texts.

    Attributes:
        tokens: Positions compared.
        median_kl: Median Kullback-Leibler divergence of the next-token distributions, in nats.
        mean_kl: Their mean.
        max_kl: The largest.
        top1_agreement: Share of positions at which both prefer the same token.
    """

    tokens: int
    median_kl: float
    mean_kl: float
    max_kl: float
    top1_agreement: float

    def __str__(self) -> str:
        return (
            f"same next token at {self.top1_agreement:.1%} of {self.tokens} positions, "
            f"KL divergence {self.median_kl:.1e} nats in the median, {self.mean_kl:.1e} in the mean"
        )


def compare_reloaded(
    model: torch.nn.Module,
    folder: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    texts: Sequence[str] = SAMPLES,
) -> Comparison:
    """Load ``folder`` with plain transformers and compare its logits with those of ``model``.

    Args:
        model: The original, with its adapters.
        folder: The saved model.
        tokenizer: Turns the sample texts into tokens; without one, fixed pseudo-random tokens are used.
        texts: The sample texts.

    Raises:
        ExportError: The reloaded model lacks tensors, or its predictions are another model's.
    """
    inner = transformers_model(model)
    batches = list(_token_batches(tokenizer, texts, inner.config.get_text_config().vocab_size))
    expected = _logits(model, batches)
    reloaded, info = AutoModelForCausalLM.from_pretrained(
        Path(folder), dtype="auto", device_map={"": inner.device}, output_loading_info=True
    )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ExportError("the written model lacks tensors", got=", ".join(missing[:3]))
    comparison = compare(torch.cat(expected), torch.cat(_logits(reloaded, batches)))
    del reloaded
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if not comparison.median_kl <= MEDIAN_KL_LIMIT:
        raise ExportError(
            f"the written model does not predict what the original does ({comparison})",
            do="Nothing was kept. Please report this with the model's name and the adapter's configuration.",
        )
    return comparison


def fits_for_comparison(model: torch.nn.Module, bytes_needed: int, maximum_memory_usage: float) -> bool:
    """Whether a second copy of ``bytes_needed`` may be loaded beside ``model`` on its device."""
    free = device.free_memory(transformers_model(model).device)
    return free is None or bytes_needed * 1.1 < free * maximum_memory_usage


@torch.no_grad()
def check_layers(model: torch.nn.Module, dtype: torch.dtype) -> int:
    """Check for every linear LoRA layer that its merged weight does what the layer itself does.

    Each layer gets a random input of shape [4, in_features]; its output must equal the product with the merged
    weight rounded to ``dtype``, within that rounding's error. Finds a wrong scale, a lost or a doubled update in
    a single layer, which the whole model's output might hide.

    Returns:
        The number of layers checked.

    Raises:
        ExportError: Names the layer.
    """
    inner = transformers_model(model)
    layers = [
        (path, module)
        for path, module in inner.named_modules()
        if isinstance(module, LoraLayer) and hasattr(module.get_base_layer(), "in_features")
    ]
    generator = torch.Generator().manual_seed(0)
    with _evaluating(model):
        for path, layer in layers:
            base = layer.get_base_layer()
            x = torch.randn(4, base.in_features, generator=generator).to(inner.device)
            compute = inner.dtype if inner.dtype.is_floating_point else torch.float32
            actual = layer(x.to(compute)).float()  # type: ignore[operator]
            weight = merged_weight(layer).to(inner.device, dtype).float()
            expected = x.to(compute).float() @ weight.T
            if getattr(base, "bias", None) is not None:
                expected = expected + base.bias.float()
            coarsest = max(torch.finfo(dtype).eps, torch.finfo(compute).eps)
            if "8bit" in type(base).__name__:
                coarsest = 0.02  # int8 products also round the input, to 1/127 of its largest entry
            error = (actual - expected).norm() / expected.norm().clamp(min=torch.finfo(torch.float32).tiny)
            if not error <= _LAYER_LIMIT * coarsest:
                raise ExportError(
                    f"the merged weight of {path} differs from its layer by {error:.2%}",
                    do="Nothing was kept. Please report this with the adapter's configuration.",
                )
    return len(layers)


def _token_batches(
    tokenizer: PreTrainedTokenizerBase | None, texts: Sequence[str], vocabulary: int
) -> Iterator[torch.Tensor]:
    if tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        for _ in texts:
            yield torch.randint(vocabulary, (1, 24), generator=generator)
        return
    for text in texts:
        yield tokenizer(text, return_tensors="pt").input_ids


@torch.no_grad()
def _logits(model: torch.nn.Module, batches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Float32 logits [T, V] on the CPU for each batch of tokens [1, T]."""
    where = transformers_model(model).device
    with _evaluating(model):
        return [model(input_ids=ids.to(where), use_cache=False).logits[0].float().cpu() for ids in batches]


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def compare(expected: torch.Tensor, actual: torch.Tensor) -> Comparison:
    """Compare two models' logits.

    Args:
        expected: Of the original, [T, V], float32.
        actual: Of the other, [T, V], float32.
    """
    log_p, log_q = expected.log_softmax(-1), actual.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    return Comparison(
        tokens=len(kl),
        median_kl=kl.median().item(),
        mean_kl=kl.mean().item(),
        max_kl=kl.max().item(),
        top1_agreement=(expected.argmax(-1) == actual.argmax(-1)).float().mean().item(),
    )


def parameter_bytes(model: PreTrainedModel, dtype: torch.dtype) -> int:
    """Bytes of the model's weights once dequantized to ``dtype``, each tied weight counted once."""
    total = 0
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            shape = getattr(getattr(parameter, "quant_state", None), "shape", parameter.shape)
            total += torch.Size(shape).numel() * dtype.itemsize
    return total
