"""An input embedding whose rows stay in host memory, from where the GPU gathers those that a batch needs.

A frozen embedding of 128,256 rows of 4,096 takes 1 GB of a GPU's memory, of which a batch reads a few thousand rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from unsloth.core.errors import ModelError
from unsloth.kernels.host_gather import host_gather
from unsloth.memory.pinned import PinnedMemory


class HostEmbedding(torch.nn.Embedding):
    """A frozen look-up table on the host; looks up on the device of the ids.

    Moving or casting the model leaves it where and as it is.

    Args:
        original: Whose rows it takes over; not to be used afterwards.
    """

    def __init__(self, original: torch.nn.Embedding) -> None:
        torch.nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = original.num_embeddings, original.embedding_dim
        self.padding_idx, self.max_norm = original.padding_idx, None
        self.norm_type, self.scale_grad_by_freq, self.sparse = 2.0, False, False
        rows = original.weight.detach().to("cpu", copy=True).contiguous()
        self.weight = torch.nn.Parameter(rows, requires_grad=False)
        self.training = original.training
        self._pinned: PinnedMemory | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pinned": None}

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> HostEmbedding:
        return self

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., K) rows of the integers ``input``, on their device."""
        if self.weight.requires_grad:
            raise ModelError(
                "an embedding in host memory cannot be trained", do="Load the model without offload_embedding."
            )
        if input.is_cuda and (self._pinned is None or self._pinned.address != self.weight.data_ptr()):
            self._pinned = PinnedMemory(self.weight)
        return host_gather(self.weight, input)


def obstacle(model: Any) -> str | None:
    """Why the input embedding of ``model``, a transformers model, cannot be on the host; None if it can."""
    embedding = model.get_input_embeddings()
    if type(embedding) is not torch.nn.Embedding:
        return f"it is a {type(embedding).__name__}"
    if embedding.max_norm is not None:
        return "its rows are renormalized when they are looked up"
    head = model.get_output_embeddings()
    if head is not None and head.weight is embedding.weight:
        return "it is the output head as well, which the GPU needs"
    return "it is trained" if embedding.weight.requires_grad else None


def move(model: Any) -> str | None:
    """Put the input embedding of ``model``, a transformers model, on the host; or say why it stays.

    It is made the last of its parent's modules, since a model's first parameter is what says where the model is.
    """
    reason = obstacle(model)
    if reason is not None:
        return reason
    embedding = model.get_input_embeddings()
    path = next(name for name, module in model.named_modules() if module is embedding)
    parent = model.get_submodule(path.rpartition(".")[0])
    del parent._modules[path.rpartition(".")[2]]
    parent.add_module(path.rpartition(".")[2], HostEmbedding(embedding))
    return None
