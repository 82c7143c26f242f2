"""A LoRA adapter as a GGUF file of its own, which llama.cpp adds to the base model's file when it loads it.

llama.cpp computes ``W x + (alpha / r) B A x`` with one alpha for the whole file and r the rank of each pair. A scaling
of another form (rank-stabilized, or per layer) goes into B. Several adapters become one, of the sum of their ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gguf import Keys
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper

from unsloth.core.errors import AdapterError, ExportError
from unsloth.export import merge
from unsloth.export.gguf.convert import DTYPES, Conversion
from unsloth.export.gguf.file import Planned, Writer, as_bytes
from unsloth.export.gguf.metadata import REAL, TEXT, Metadata
from unsloth.export.gguf.methods import Method
from unsloth.export.merge import MergeOptions
from unsloth.models.record import transformers_model


def plan(model: PeftModel, conversion: Conversion, method: Method) -> tuple[Metadata, list[Planned]]:
    """Metadata and tensors of the adapter's file.

    Args:
        model: With the adapter.
        conversion: Of the whole model, which has the names.
        method: One of the unquantized types.

    Raises:
        AdapterError: There is no adapter, or it holds something else than LoRA on linear layers.
        ExportError: A type that adapters are not stored in.
    """
    if method.name not in DTYPES:
        raise ExportError("an adapter is stored as f32, f16 or bf16", got=method.name, do='Use "f16".')
    alpha = _alpha(model)
    made = Metadata(limits=list(conversion.metadata.limits))
    made.entries[Keys.General.ARCHITECTURE] = conversion.metadata.entries[Keys.General.ARCHITECTURE]
    made.add(Keys.General.TYPE, "adapter", TEXT)
    made.add(Keys.Adapter.TYPE, "lora", TEXT)
    made.add(Keys.Adapter.LORA_ALPHA, float(alpha), REAL)
    planned = [Planned(name, tuple(tensor.shape), method.type) for name, tensor in _pairs(model, conversion, alpha)]
    return made, planned


def write(model: PeftModel, conversion: Conversion, path: Path, made: Metadata, planned: list[Planned]) -> None:
    """Write the file that :func:`plan` describes."""
    architecture = made.entries[Keys.General.ARCHITECTURE][0]
    with Writer(path, architecture, made.entries, planned) as writer:
        for name, tensor in _pairs(model, conversion, _alpha(model)):
            writer.put(name, as_bytes(tensor, planned[0].type))


def base_of(conversion: Conversion) -> Conversion:
    """The conversion of the base model without the adapter."""
    return replace(conversion, options=MergeOptions(adapter_scale=0.0))


def _alpha(model: Any) -> float:
    if not isinstance(model, PeftModel):
        raise AdapterError("the model has no adapter to save", do='Leave out save_method="lora".')
    return float(model.active_peft_config.lora_alpha)


def _pairs(model: PeftModel, conversion: Conversion, alpha: float) -> Iterator[tuple[str, torch.Tensor]]:
    """Name in the file and float32 tensor: A [r, in] and B [out, r] of every adapted layer."""
    found = False
    for path, module in transformers_model(model).named_modules():
        if not isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            continue
        factors = _factors(path, module, conversion.options)
        if not factors:
            continue
        # sum_i f_i B_i A_i = [f_1 B_1 | f_2 B_2 ...] [A_1; A_2 ...]
        a = torch.cat([module.lora_A[name].weight.detach().float().cpu() for name in factors])
        b = torch.cat(
            [
                factor * module.scaling[name] * module.lora_B[name].weight.detach().float().cpu()
                for name, factor in factors.items()
            ],
            dim=1,
        )
        rule = conversion.rules[f"{path}.weight"]
        found = True
        yield f"{rule.name}.lora_a", a.contiguous()
        yield (
            f"{rule.name}.lora_b",
            ((rule.reorder(b) if rule.heads else b) * rule.factor * len(a) / alpha).contiguous(),
        )
    if not found:
        raise AdapterError("no layer has an active LoRA adapter", do="Activate one with model.set_adapter(...).")


def _factors(path: str, module: Any, options: MergeOptions) -> dict[str, float]:
    """What the change of each of the layer's adapters is multiplied by, by the adapter's name.

    Raises:
        AdapterError: Anything that a LoRA file of llama.cpp cannot hold.
    """
    if not isinstance(module, LoraLayer):
        raise _not_lora(
            path, "weights trained in full" if "Wrapper" in type(module).__name__ else type(module).__name__
        )
    found = merge.factors(module, options)
    for name in found:
        if name in module.lora_embedding_A:
            raise _not_lora(path, "LoRA on an embedding")
        if module.lora_variant.get(name) is not None or module.lora_bias.get(name):
            raise _not_lora(path, "DoRA, or biases in the adapter")
    return found


def _not_lora(path: str, what: str) -> AdapterError:
    return AdapterError(
        f"llama.cpp's adapters hold LoRA on linear layers only; {path} has something else",
        got=what,
        do="Save the merged model: leave out save_method.",
    )
