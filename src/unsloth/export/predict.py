"""Next-token predictions of a model folder, an adapter or a GGUF file, to be scored."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedTokenizerBase

from unsloth.core import device
from unsloth.core.errors import ConfigError, ModelNotFoundError
from unsloth.export.gguf import runtime
from unsloth.models import adapter_config, load, record, source, tokenizer
from unsloth.quant import nf4

_ANSWER_BYTES = 2**29  # of logits that one llama.cpp process returns
_SHARD = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")

Ids = Sequence[int]


class Predictor(Protocol):
    """What can be scored.

    Attributes:
        name: As the user named it.
        nbytes: Size of its files (of an adapter, with those of its base).
        vocabulary: How many tokens it has logits for.
    """

    name: str
    nbytes: int
    vocabulary: int

    def logits(self, sequences: Sequence[Ids]) -> Iterator[torch.Tensor]:
        """Float32 logits [T, V] on the CPU for each sequence of T token ids, in order."""
        ...

    def generate(self, ids: Ids, max_new_tokens: int) -> list[int]:
        """The most probable continuation, token by token, up to an end-of-text token."""
        ...


class ModelPredictor:
    """A model in this process.

    Args:
        model: With or without adapters.
        name: As the user named it.
        nbytes: Size of its files.
        batch_size: Sequences computed at once, filled up to the longest.
    """

    def __init__(self, model: Any, name: str, nbytes: int, batch_size: int = 1) -> None:
        if batch_size < 1:
            raise ConfigError("batch_size is at least 1", got=batch_size)
        self.name, self.nbytes, self._model, self._batch_size = name, nbytes, model.eval(), batch_size
        inner = record.transformers_model(model)
        self._device = inner.device
        self.vocabulary = int(inner.config.get_text_config().vocab_size)

    def logits(self, sequences: Sequence[Ids]) -> Iterator[torch.Tensor]:
        """See :class:`Predictor`."""
        remaining = iter(sequences)
        while batch := [torch.tensor(list(ids)) for ids in islice(remaining, self._batch_size)]:
            ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)
            mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in batch], batch_first=True)
            with torch.no_grad():
                found = self._model(
                    input_ids=ids.to(self._device), attention_mask=mask.to(self._device), use_cache=False
                ).logits
            for row, tokens in zip(found, batch, strict=True):
                yield row[: len(tokens)].float().cpu()

    def generate(self, ids: Ids, max_new_tokens: int) -> list[int]:
        """See :class:`Predictor`."""
        given = torch.tensor([list(ids)], device=self._device)
        made = self._model.generate(input_ids=given, max_new_tokens=max_new_tokens, do_sample=False)
        return made[0, len(ids) :].tolist()


class GgufPredictor:
    """A GGUF file, computed by llama.cpp in processes of its own, which load it for every few sequences.

    Args:
        path: The file, or the first of its shards.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ModelNotFoundError("no such GGUF file", got=path)
        self.name, self._path = str(path), path
        self.nbytes = sum(shard.stat().st_size for shard in shards(path))
        first = runtime.ask(runtime.Request(path, ids=[[0]]))
        self.vocabulary, self._ends = first.logits[0].shape[-1], first.ends

    def logits(self, sequences: Sequence[Ids]) -> Iterator[torch.Tensor]:
        """See :class:`Predictor`."""
        limit = max(1, _ANSWER_BYTES // (4 * self.vocabulary))  # tokens
        group: list[Ids] = []
        for ids in sequences:
            if group and sum(map(len, group)) + len(ids) > limit:
                yield from runtime.ask(runtime.Request(self._path, ids=group)).logits
                group = []
            group.append(ids)
        if group:
            yield from runtime.ask(runtime.Request(self._path, ids=group)).logits

    def generate(self, ids: Ids, max_new_tokens: int) -> list[int]:
        """See :class:`Predictor`."""
        raise ConfigError(
            "answers are not generated from a GGUF file here, only scored",
            got=self.name,
            do="Choose tasks that compare given answers, or evaluate the model that the file was made from.",
        )


def open_predictor(
    name: str,
    *,
    precision: record.Precision = "16bit",
    batch_size: int = 1,
    trust_remote_code: bool = False,
) -> tuple[Predictor, PreTrainedTokenizerBase | None]:
    """Load what ``name`` is; return it with its tokenizer (None for a GGUF file).

    Args:
        name: A folder, an adapter's folder, a hub id, or a GGUF file.
        precision: How to hold the base weights, of a model or adapter; a quantized checkpoint is loaded as it is.
        batch_size: Sequences computed at once.
        trust_remote_code: Whether the model's repository may run code.

    Raises:
        ModelNotFoundError: There is no such file or model.
        ExportError: llama.cpp is not installed, or does not read the file.
        UnslothError: As for :func:`unsloth.models.load.load`.
    """
    if name.lower().endswith(".gguf"):
        return GgufPredictor(Path(name).expanduser()), None
    found = source.resolve(name, weights=True, trust_remote_code=trust_remote_code)
    nbytes = _weight_bytes(Path(found.location))
    base = found
    if found.adapter_base is not None:
        base = source.resolve(found.adapter_base, trust_remote_code=trust_remote_code)
        nbytes += _weight_bytes(Path(base.location))
    stored = next((bits for bits in ("4bit", "8bit") if (base.quantization or {}).get(f"load_in_{bits}")), precision)
    options = load.LoadOptions(
        model_name=name,
        precision=stored,  # type: ignore[arg-type]
        dtype=device.default_dtype(),
        trust_remote_code=trust_remote_code,
        use_gradient_checkpointing=False,
    )
    model, loaded_tokenizer = load.load(options)
    nf4.keep_layout(model)
    return ModelPredictor(model, name, nbytes, batch_size), loaded_tokenizer


def load_tokenizer(name: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id, without its model."""
    found = source.resolve(name, weights=False, trust_remote_code=trust_remote_code)
    return tokenizer.load(found.location, max_seq_length=2**31, trust_remote_code=trust_remote_code)


def _weight_bytes(folder: Path) -> int:
    if (folder / adapter_config.NAME).is_file():
        return (folder / adapter_config.WEIGHTS).stat().st_size
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def shards(path: Path) -> list[Path]:
    """All files of a GGUF model of which ``path`` is the only one or the first."""
    found = _SHARD.search(path.name)
    if found is None:
        return [path]
    stem = path.name[: found.start()]
    return sorted(path.parent.glob(f"{stem}-?????-of-{found[1]}.gguf"))
