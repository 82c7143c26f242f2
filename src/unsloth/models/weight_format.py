"""How the weights in a checkpoint are stored, and how they are to be held: one decision."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils.quantization_config import QuantizationConfigMixin

from unsloth.core.errors import CheckpointError, ConfigError
from unsloth.core.log import get_logger
from unsloth.models import record
from unsloth.models.source import Source
from unsloth.models.weight_files import FLOAT8, TensorHeader
from unsloth.quant import fp8, int8, nf4

_ASKED = {"16bit": "load_in_4bit=False or load_in_16bit=True", "full": "full_finetuning=True"}
_SCALES = (fp8.SCALE_SUFFIX, ".activation_scale", ".input_scale")

logger = get_logger(__name__)


@dataclass(frozen=True)
class WeightFormat:
    """The stored format, and the precision that the loaded weights will have.

    Attributes:
        stored: ``"plain"``, ``"bitsandbytes"`` (which stays as it is) or ``"fp8"`` (which is dequantized).
        precision: How the base weights will be held.
    """

    stored: Literal["plain", "bitsandbytes", "fp8"]
    precision: record.Precision

    def quantization(self, dtype: torch.dtype) -> QuantizationConfigMixin | None:
        """What transformers is to do with the weights while loading them."""
        if self.stored == "bitsandbytes" or self.precision in ("16bit", "full"):
            return None
        return nf4.quantization_config(dtype) if self.precision == "4bit" else int8.quantization_config()

    def prepare(self, config: PretrainedConfig, dtype: torch.dtype) -> None:
        """Adjust a checkpoint's own quantization settings in ``config``."""
        if self.stored == "fp8":
            del config.quantization_config
        elif self.stored == "bitsandbytes":
            own = dict(config.quantization_config)
            own["bnb_4bit_compute_dtype"] = str(dtype).removeprefix("torch.")
            config.quantization_config = own


def choose(found: Source, precision: record.Precision) -> WeightFormat:
    """Decide from a checkpoint's ``quantization_config`` and the precision that was asked for.

    Raises:
        ConfigError: 16-bit weights were asked of a checkpoint that holds 4-bit or 8-bit ones.
        CheckpointError: A format that cannot be trained on.
    """
    stored = found.quantization
    if not stored:
        return WeightFormat("plain", precision)
    method = stored.get("quant_method")
    if method == "fp8":
        return WeightFormat("fp8", precision)
    bits: record.Precision | None = next((b for b in ("4bit", "8bit") if stored.get(f"load_in_{b}")), None)  # type: ignore[misc]
    if bits is None or str(method or "bitsandbytes") != "bitsandbytes":
        raise CheckpointError(
            f"'{found.name}' holds its weights in a format that is not trained on here",
            got=method,
            do="Name the original model, whose weights are in 16 bits.",
        )
    if precision in _ASKED:
        raise ConfigError(
            f"'{found.name}' holds {bits.removesuffix('bit')}-bit weights, which cannot be loaded as 16-bit ones",
            got=_ASKED[precision],
            do=f"Name the original model{_original(found.name)}, or pass load_in_{bits}=True.",
        )
    if precision != bits:
        logger.info("'%s' is a %s checkpoint, and is loaded as such", found.name, bits)
    return WeightFormat("bitsandbytes", bits)


def to_dtype(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Convert a quantized checkpoint's 16-bit weights to ``dtype``, which transformers leaves as they are stored."""
    for parameter in model.parameters():
        sixteen_bit = parameter.dtype in (torch.float16, torch.bfloat16)
        if sixteen_bit and parameter.dtype != dtype and getattr(parameter, "quant_state", None) is None:
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


@contextmanager
def dequantized(found: Source) -> Iterator[dict[str, Any]]:
    """The tensors of an FP8 checkpoint as a state dict whose entries are read and dequantized when they are used.

    Raises:
        CheckpointError: An FP8 weight without its scale.
    """
    block = fp8.block_size(found.quantization or {})
    with ExitStack() as stack:
        paths = {header.file for header in found.tensors.values()}
        files = {path: stack.enter_context(safe_open(path, framework="pt")) for path in sorted(paths)}
        yield {
            name: _entry(name, header, found.tensors, files, block)
            for name, header in found.tensors.items()
            if not name.endswith(_SCALES)
        }


def _entry(
    name: str,
    header: TensorHeader,
    tensors: Mapping[str, TensorHeader],
    files: Mapping[Path, Any],
    block: tuple[int, int] | None,
) -> Any:
    if header.dtype not in FLOAT8:
        return files[header.file].get_slice(name)
    scale = tensors.get(name + fp8.SCALE_SUFFIX)
    if scale is None or scale.dtype not in ("F32", "BF16", "F16"):
        raise CheckpointError(
            f"the FP8 weight {name} in {header.file} has no scale that could be read",
            got=None if scale is None else scale.dtype,
            do="Copy or download it again, or name a version of the model with 16-bit weights.",
        )
    return fp8.StoredWeight(files[header.file], name, files[scale.file], block)


def _original(name: str) -> str:
    """The name of a prequantized checkpoint's original, if its own name shows it: for the message only."""
    for suffix in ("-unsloth-bnb-4bit", "-bnb-4bit", "-bnb-8bit"):
        if name.endswith(suffix):
            return f" ('{name.removesuffix(suffix)}')"
    return ""
