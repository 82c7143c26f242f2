"""From a model to an unquantized GGUF file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType, Keys
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unsloth.core.errors import ConfigError
from unsloth.export import merge
from unsloth.export.gguf import architectures, metadata, methods, rope, tensors, vocabulary
from unsloth.export.gguf.file import Planned, Writer, as_bytes
from unsloth.export.gguf.metadata import Metadata
from unsloth.export.gguf.methods import Shape
from unsloth.export.gguf.tensors import Rule
from unsloth.export.gguf.vocabulary import Vocabulary
from unsloth.export.merge import MergeOptions
from unsloth.models import families
from unsloth.models.record import transformers_model

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
"""The types in which a model may be written before it is quantized."""


@dataclass(frozen=True)
class Conversion:
    """Everything about a file but the values of the weights.

    Attributes:
        model: With its adapters.
        rules: For each tensor of the merged model.
        planned: The tensors of the file.
        extra: Tensors of the file that the model does not have, by name.
        metadata: Of the file.
        vocabulary: Of the tokenizer.
        dtype: Of the weights.
        shape: Of the model, for the choice of types.
        options: What is merged.
    """

    model: torch.nn.Module
    rules: dict[str, Rule]
    planned: list[Planned]
    extra: dict[str, torch.Tensor]
    metadata: Metadata
    vocabulary: Vocabulary
    dtype: str
    shape: Shape
    options: MergeOptions = merge.UNCHANGED

    @property
    def size(self) -> int:
        """Bytes of the file, but for its header."""
        return sum(tensor.size for tensor in self.planned)

    def write(self, path: Path, shard_bytes: int = 0) -> list[Path]:
        """Write the file, one merged tensor at a time; return it, or its shards."""
        by_name = {tensor.name: tensor for tensor in self.planned}
        entries = {**self.metadata.entries}
        entries[Keys.General.FILE_TYPE] = (int(methods.find(self.dtype, self.dtype).file_type), GGUFValueType.UINT32)
        architecture = entries[Keys.General.ARCHITECTURE][0]
        with Writer(path, architecture, entries, self.planned, shard_bytes) as writer:
            for name, tensor in self.extra.items():
                writer.put(name, as_bytes(tensor, by_name[name].type))
            # Of the families that can be written here, none has other names in its checkpoint than in the model.
            for name, tensor in merge.merged_tensors(self.model, DTYPES[self.dtype], self.options):
                rule = self.rules[name]
                writer.put(rule.name, as_bytes(rule.apply(tensor), by_name[rule.name].type))
        return writer.paths


def plan(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    first_conversion: str | None = None,
    *,
    pre_tokenizer: str | None = None,
    options: MergeOptions = merge.UNCHANGED,
) -> Conversion:
    """Find out everything about the file before a single weight is computed.

    Args:
        model: With or without adapters.
        tokenizer: Of the model.
        first_conversion: ``"f32"``, ``"f16"`` or ``"bf16"``; None takes the model's own dtype.
        pre_tokenizer: llama.cpp's name of the way in which the tokenizer cuts words, where it is not found.
        options: What is merged.

    Raises:
        ConfigError: Another first_conversion.
        ExportError: An architecture, or something in it, that llama.cpp does not have.
        TokenizerError: A tokenizer that it does not have.
    """
    inner = transformers_model(model)
    merge.check_adapters(model, options)
    dtype = _first(first_conversion, inner)
    skeleton = merge.skeleton(model, DTYPES[dtype])
    config = skeleton.config
    spec = families.find(inner)
    architecture = architectures.find(spec, config.model_type)
    assert spec is not None
    rotated = rope.rotated_dimensions(config)
    found = tensors.rules(spec, architecture, config, rotated)
    sizes = {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}
    tensors.matched(sizes, found, architecture)
    made = metadata.of_model(spec, architecture, config, rotated, Path(inner.config._name_or_path or "").name)
    rows = sizes[f"{spec.embedding}.weight"][0]
    words = vocabulary.read(tokenizer, rows, pre_tokenizer)
    vocabulary.add(made, words, tokenizer, ends_of(inner, tokenizer))
    extra = rope.factors(config)
    planned = [Planned(name, tuple(tensor.shape), Type.F32) for name, tensor in extra.items()]
    for name, size in sizes.items():
        wide = methods.is_quantized(found[name].name, size)
        kind = methods.find(dtype, dtype).type if wide else Type.F32
        planned.append(Planned(found[name].name, size, kind))
    queries, keys = config.num_attention_heads, config.num_key_value_heads
    large = config.num_hidden_layers == 80 and (spec.name == "qwen2" or (spec.name == "llama" and queries != keys))
    shape = Shape(config.num_hidden_layers, queries // keys, large)
    return Conversion(model, found, planned, extra, made, words, dtype, shape, options)


def _first(first_conversion: str | None, inner: PreTrainedModel) -> str:
    if first_conversion is None:
        return {torch.float32: "f32", torch.float16: "f16"}.get(inner.dtype, "bf16")
    name = methods.ALIASES.get(first_conversion.lower(), first_conversion.lower())
    if name not in DTYPES:
        raise ConfigError("first_conversion is f32, f16 or bf16", got=first_conversion)
    return name


def ends_of(inner: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens at which generation stops: the tokenizer's own first, then those of the generation's settings."""
    generation = getattr(inner, "generation_config", None)
    given = getattr(generation, "eos_token_id", None)
    others: Sequence[int] = [] if given is None else [given] if isinstance(given, int) else given
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return list(dict.fromkeys([*own, *others]))
