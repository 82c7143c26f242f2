"""What an export would write, known without loading weights."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from unsloth.core.errors import AdapterError
from unsloth.export import four_bit, layout, shards
from unsloth.models import adapter_config, full_layers, load, source, weight_files

_WIDTH = torch.bfloat16


@dataclass(frozen=True)
class Forecast:
    """An export before it is made.

    Attributes:
        base: Name of the model, or of the model that the adapter belongs to.
        method: As in ``save_pretrained_merged``.
        tensors: How many tensors will be written.
        nbytes: Their size in bytes; tokenizer and configuration come on top.
        files: How many weight files.
        free: Free bytes of the file system that the folder will be on.
    """

    base: str
    method: str
    tensors: int
    nbytes: int
    files: int
    free: int

    @property
    def fits(self) -> bool:
        """Whether there is room on the disk."""
        return self.nbytes < self.free


def forecast(
    name: str,
    folder: str | os.PathLike[str],
    method: str,
    *,
    max_shard_size: int | str = "5GB",
    trust_remote_code: bool = False,
) -> Forecast:
    """Work out what an export of a model or adapter would write, from configurations and headers.

    Args:
        name: Folder, adapter folder or hub id.
        folder: Where it would be written.
        method: As in ``save_pretrained_merged``.
        max_shard_size: Largest weight file.
        trust_remote_code: Whether the model's repository may run code.

    Raises:
        AdapterError: ``"lora"`` of a model that is no adapter.
        UnslothError: The configuration cannot be read.
    """
    found = source.resolve(name, weights=False, trust_remote_code=trust_remote_code)
    saved: dict[str, weight_files.TensorHeader] = {}
    if found.adapter_base is not None:
        found = source.resolve(name)
        saved = weight_files.check_file(Path(found.location) / adapter_config.WEIGHTS)
    elif method == "lora":
        raise AdapterError("the model is no adapter", got=name, do='Use "merged_16bit".')
    limit = shards.parse_size(max_shard_size)
    if method == "lora":
        sizes = [(Path(found.location) / adapter_config.WEIGHTS).stat().st_size]
        count, files = len(saved), 1
    else:
        merged = outline(name, trust_remote_code=trust_remote_code)
        planned = layout.plan(merged)
        sizes = [tensor.nbytes for tensor in planned]
        count, files = len(planned), len(shards.split(planned, limit))
        if method.startswith("merged_4bit"):
            sizes = four_bit.sizes(four_bit.quantized_names(merged), planned)
            files = max(1, -(-sum(sizes) // limit))
    return Forecast(found.adapter_base or name, method, count, sum(sizes), files, free_at(folder))


def free_at(folder: str | os.PathLike[str]) -> int:
    """Free bytes of the file system that a folder is, or would be, on."""
    nearest = next(path for path in (Path(folder).resolve(), *Path(folder).resolve().parents) if path.exists())
    return shutil.disk_usage(nearest).free


def outline(name: str, dtype: torch.dtype = _WIDTH, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model that an export of ``name`` would write, without values.

    It has the rows and the head of its own that an adapter brings.

    Raises:
        UnslothError: The configuration cannot be read.
    """
    found = source.resolve(name, weights=False, trust_remote_code=trust_remote_code)
    saved: dict[str, weight_files.TensorHeader] = {}
    if found.adapter_base is not None:
        saved = weight_files.check_file(Path(source.resolve(name).location) / adapter_config.WEIGHTS)
    config = load.read_config(load.LoadOptions(model_name=name, trust_remote_code=trust_remote_code))
    layers = {name.removesuffix(".weight").rsplit(".", 1)[-1]: header for name, header in saved.items()}
    whole = {layer: header for layer, header in layers.items() if layer in full_layers.FULL}
    text = config.get_text_config()
    rows = [header.shape[0] for header in whole.values()]
    text.vocab_size = max([text.vocab_size, *rows])
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    return layout.skeleton(model, dtype, own_head=len(whole) == 1)
