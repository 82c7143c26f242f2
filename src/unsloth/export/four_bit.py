"""A merged model in four bits: NF4 as bitsandbytes stores it, made anew from the merged weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from transformers import PreTrainedModel
from transformers.quantizers.base import get_keys_to_not_convert

from unsloth.core.errors import ExportError
from unsloth.export import layout
from unsloth.quant import nf4

_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # of a weight: its code, and its part of the 8-bit scales and of their scales


def quantized_names(skeleton: PreTrainedModel) -> set[str]:
    """The weights that are quantized: those of linear layers, without the output head and what is tied.

    Raises:
        ExportError: A checkpoint of this kind of model has its linear layers in another form.
    """
    kept = set(get_keys_to_not_convert(skeleton))
    names = {
        f"{path}.weight"
        for path, module in skeleton.named_modules()
        if isinstance(module, torch.nn.Linear) and path not in kept
    }
    absent = sorted(names - {tensor.name for tensor in layout.plan(skeleton)})
    if absent or not names:
        raise ExportError(
            "this kind of model cannot be saved in 4 bits: its checkpoint has other linear layers than the model",
            got=absent[:1] or type(skeleton).__name__,
            do='Use save_method="merged_16bit".',
        )
    return names


def sizes(names: set[str], planned: Sequence[layout.Planned]) -> list[int]:
    """Bytes of each planned tensor once the named ones are quantized (without tables of some hundred bytes each)."""
    return [
        round(tensor.nbytes / tensor.dtype.itemsize * _BYTES) if tensor.name in names else tensor.nbytes
        for tensor in planned
    ]


def configure(skeleton: PreTrainedModel, dtype: torch.dtype) -> None:
    """Say in the skeleton's config.json how its weights are stored."""
    skeleton.config.quantization_config = nf4.quantization_config(dtype).to_dict()


def quantized(
    names: set[str], tensors: Iterable[tuple[str, torch.Tensor]], device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    """Quantize the named weights [out, in], on ``device``, one at a time; the others pass as they are.

    Yields:
        For a quantized weight its codes and the tensors of its scales, under the names of bitsandbytes.
    """
    from bitsandbytes import functional

    for name, tensor in tensors:
        if name not in names:
            yield name, tensor
            continue
        codes, state = functional.quantize_4bit(tensor.to(device), quant_type="nf4", compress_statistics=True)
        yield name, codes.cpu()
        for part, value in state.as_dict(packed=True).items():
            yield f"{name}.{part}", value.cpu().contiguous()
