"""Proof that a written model equals the one it was made from."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from transformers import PreTrainedTokenizerBase

from unsloth.core import device
from unsloth.core.errors import ExportError
from unsloth.export.merge import UNCHANGED, MergeOptions, factors, merged_bias
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
_LONGEST = 512  # tokens of a sample
_MARGIN = 1.1  # a loaded model takes a little more than its weights

Reload = Literal["whole", "layer by layer"]


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


class LayerCheck:
    """Checks for every linear LoRA layer that its merged weight does what the layer itself does.

    Each layer gets a random input of shape [4, in_features]; its output must equal the product with the merged
    weight, within the error of the weight's dtype. Finds a wrong scale, a lost or a doubled update in a single layer,
    which the whole model's output might hide. Calls happen while the weights are merged, one layer at a time.

    Args:
        dtype: Of the merged weights.
        compute: Dtype of the layers' inputs.
        options: What was merged.

    Attributes:
        count: Layers checked.
    """

    def __init__(self, dtype: torch.dtype, compute: torch.dtype, options: MergeOptions) -> None:
        self.count = 0
        self._dtype, self._options = dtype, options
        self._compute = compute if compute.is_floating_point else torch.float32
        self._generator = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def __call__(self, path: str, layer: LoraLayer, weight: torch.Tensor) -> None:
        """Check one layer.

        Args:
            path: Its name, for the message.
            layer: The layer.
            weight: Its merged weight, [out_features, in_features].

        Raises:
            ExportError: Names the layer.
        """
        base = layer.get_base_layer()
        if not hasattr(base, "in_features"):
            return
        where = base.weight.device
        x = torch.randn(4, base.in_features, generator=self._generator).to(where, self._compute)
        with _evaluating(layer):
            actual = _output(layer, x, self._options)
        expected = x.float() @ weight.to(where).float().T
        if getattr(base, "bias", None) is not None:
            expected = expected + merged_bias(layer, self._options)
        coarsest = max(torch.finfo(self._dtype).eps, torch.finfo(self._compute).eps)
        if "8bit" in type(base).__name__:
            coarsest = 0.02  # int8 products also round the input, to 1/127 of its largest entry
        error = (actual - expected).norm() / expected.norm().clamp(min=torch.finfo(torch.float32).tiny)
        if not error <= _LAYER_LIMIT * coarsest:
            raise ExportError(
                f"the merged weight of {path} differs from its layer by {error:.2%}",
                do="Nothing was kept. Please report this with the adapter's configuration.",
            )
        self.count += 1


def compare_reloaded(
    model: torch.nn.Module,
    folder: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    texts: Sequence[str] = SAMPLES,
    options: MergeOptions = UNCHANGED,
    reload: Reload = "whole",
    limit: float = MEDIAN_KL_LIMIT,
) -> Comparison:
    """Load ``folder`` with plain transformers and compare its logits with those of ``model``.

    Args:
        model: The original, with its adapters.
        folder: The saved model.
        tokenizer: Turns the sample texts into tokens; without one, fixed pseudo-random tokens are used.
        texts: The sample texts.
        options: What was merged. Where the original cannot compute the same (a change of DoRA or of weights trained
            in full that was scaled, or an average with the base), it is compared as it is, and no limit applies.
        reload: ``"whole"`` loads the saved model beside the original, on its device. ``"layer by layer"`` reads each
            layer's weights from the saved files when its turn comes and drops them after it, on the CPU, so that no
            second copy of the model is ever held.
        limit: Largest median of the divergence, in nats.

    Raises:
        ExportError: The reloaded model lacks tensors, or its predictions are another model's.
    """
    inner = transformers_model(model)
    ids, mask = _tokens(tokenizer, texts, inner.config.get_text_config().vocab_size)
    with as_merged(model, options) as same:
        expected = _logits(model, ids, mask)
    with tempfile.TemporaryDirectory(dir=Path(folder).parent, prefix=".reload-") as scratch:
        place: dict[str, Any] = {"device_map": {"": inner.device}}
        if reload == "layer by layer":
            place = {"device_map": {"": "disk"}, "offload_folder": scratch}
        reloaded, info = type(inner).from_pretrained(Path(folder), dtype="auto", output_loading_info=True, **place)
        missing = sorted(info["missing_keys"])
        if missing:
            raise ExportError("the written model lacks tensors", got=", ".join(missing[:3]))
        comparison = compare(expected, _logits(reloaded, ids, mask))
        del reloaded
        gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if same and not comparison.median_kl <= limit:
        raise ExportError(
            f"the written model does not predict what the original does ({comparison})",
            do="Nothing was kept. Please report this with the model's name and the adapter's configuration.",
        )
    return comparison


def way_to_reload(model: torch.nn.Module, bytes_needed: int, maximum_memory_usage: float) -> Reload:
    """How to load a second copy of ``bytes_needed``: beside ``model`` if that share of the free memory allows it."""
    free = device.free_memory(transformers_model(model).device)
    fits = free is None or bytes_needed * _MARGIN < free * maximum_memory_usage
    return "whole" if fits else "layer by layer"


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


def _output(layer: Any, x: torch.Tensor, options: MergeOptions) -> torch.Tensor:
    """Output of the layer [4, out_features] in float32, each adapter's part of it scaled as when it is merged."""
    if options == UNCHANGED:
        return layer(x).float()
    base = layer.base_layer(x).float()
    result = base.clone()
    active = layer._active_adapter
    try:
        for adapter, factor in factors(layer, options).items():
            layer._active_adapter = [adapter]
            result += factor * (layer(x).float() - base)
    finally:
        layer._active_adapter = active
    return result


@contextmanager
def as_merged(model: torch.nn.Module, options: MergeOptions) -> Iterator[bool]:
    """Let the model compute what was merged; yields whether it can."""
    inner = transformers_model(model)
    if options == UNCHANGED:
        yield True
        return
    layers: list[Any] = [module for module in inner.modules() if isinstance(module, LoraLayer)]
    chosen = {id(layer): factors(layer, options) for layer in layers}
    variants = any(adapter in layer.lora_variant for layer in layers for adapter in chosen[id(layer)])
    whole = any(isinstance(module, ModulesToSaveWrapper) for module in inner.modules())
    scaled_whole = whole and (options.adapters is not None or options.base_weight > 0)
    if variants or scaled_whole or not layers:
        yield False
        return
    before = [(layer._active_adapter, dict(layer.scaling)) for layer in layers]
    try:
        for layer in layers:
            layer._active_adapter = list(chosen[id(layer)])
            for adapter, factor in chosen[id(layer)].items():
                layer.scaling[adapter] *= factor
        yield True
    finally:
        for layer, (active, scaling) in zip(layers, before, strict=True):
            layer._active_adapter = active
            layer.scaling.update(scaling)


def _tokens(
    tokenizer: PreTrainedTokenizerBase | None, texts: Sequence[str], vocabulary: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [N, T], filled up on the right, and the mask of those that count."""
    if tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(vocabulary, (len(texts), 24), generator=generator)
        return ids, torch.ones_like(ids)
    longest = min(tokenizer.model_max_length, _LONGEST)
    encoded = [tokenizer(text=text, truncation=True, max_length=longest)["input_ids"] for text in texts]
    rows = [torch.tensor(row) for row in encoded]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return ids, mask


@torch.no_grad()
def _logits(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Float32 logits [T, V] on the CPU of all positions that count."""
    where = transformers_model(model).device
    if where.type == "meta":  # weights that come from the disk
        where = torch.device("cpu")
    with _evaluating(model):
        logits = model(input_ids=ids.to(where), attention_mask=mask.to(where), use_cache=False).logits
    return logits.cpu()[mask.bool()].float()


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
