"""The model that an engine reads, watched for changes: training goes on between generations.

Three things may change. Values: adapters are copied anew; keys and values computed from the old ones are forgotten.
Storage (a tensor lives elsewhere): captured graphs are void. Structure (an adapter was put on, a layer replaced): the
decoder is read again.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from unsloth.core.errors import ConfigError, PlanError
from unsloth.generate.adapter_bank import AdapterBank
from unsloth.generate.decoder import Decoder
from unsloth.generate.weights import storage_key
from unsloth.models import families, record


@dataclass(frozen=True)
class Change:
    """What has changed.

    Attributes:
        values: Keys and values in the cache belong to other weights.
        storage: Something lives elsewhere now.
    """

    values: bool = False
    storage: bool = False


class LiveModel:
    """A model as the runner needs it.

    Args:
        model: With or without PEFT around it.
        max_len: Positions that there may be.
        fast: False takes the plain references.

    Raises:
        ConfigError: It has no spec, or parts that cannot be computed from it; the message says which.
    """

    def __init__(self, model: torch.nn.Module, max_len: int, fast: bool) -> None:
        self.inner: PreTrainedModel = record.transformers_model(model)
        found = families.find(self.inner)
        if found is None:
            raise ConfigError(
                "the engine has no description of this family of models",
                got=self.inner.config.model_type,
                do="Use model.generate, which transformers computes.",
            )
        self._family, self._max_len, self._fast = found, max_len, fast
        weight = self.inner.get_input_embeddings().weight
        self.bank = AdapterBank(weight.dtype, weight.device)
        self._structure: Hashable = None
        self._storage: Hashable = None
        self._tensors: list[torch.Tensor] = []
        self._values: Hashable = None
        self.decoder = self._read()

    def begin(self) -> Change:
        """Look for every change, before the first step of a generation."""
        structure = self._structure != self._shape_of_model()
        if structure:
            self.decoder = self._read()
        moved = self.bank.refresh()
        self._tensors = self.decoder.tensors()
        storage = storage_key(self._tensors)
        values = self._fingerprint()
        change = Change(self._values != values, structure or moved or self._storage != storage)
        self._storage, self._values = storage, values
        return change

    def look(self) -> Change:
        """Look for what may have changed between two steps, at little cost."""
        values = self.bank.changed()
        moved = self.bank.refresh() if values else False
        storage = storage_key(self._tensors)
        change = Change(values, moved or self._storage != storage)
        self._storage = storage
        return change

    def _read(self) -> Decoder:
        self.bank.clear_sites()
        try:
            decoder = Decoder(self.inner, self._family, self.bank, self._max_len, self._fast)
        except PlanError as error:
            raise ConfigError(f"the engine cannot run this model; {error}") from error
        self._structure = self._shape_of_model()
        return decoder

    def _shape_of_model(self) -> Hashable:
        """Changes when layers are exchanged or adapters added; not when values do."""
        return tuple(
            (id(module), tuple(module.lora_A) if isinstance(module, LoraLayer) else ())
            for module in self.inner.modules()
        )

    def _fingerprint(self) -> Hashable:
        """Changes when weights do: the versions of all, and the norms of those that are trained and of adapters.

        Optimizers that write through raw pointers leave the version as it was.
        """
        read = (*self._tensors, *self.bank.watched)
        versions = tuple((-1 if t.is_inference() else t._version, t.data_ptr()) for t in read)
        trained = [p for p in self.inner.parameters() if p.requires_grad]
        changing = {id(t): t.detach() for t in (*trained, *self.bank.watched) if t.is_floating_point()}
        by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
        for tensor in changing.values():
            by_dtype.setdefault(tensor.dtype, []).append(tensor)
        norms = [torch.stack(torch._foreach_norm(tensors)).float() for tensors in by_dtype.values()]
        return versions, tuple(torch.cat(norms).tolist()) if norms else ()
