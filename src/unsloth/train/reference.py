"""The reference of preference training: what the policy is compared with."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from unsloth.core.log import get_logger

logger = get_logger(__name__)


class AdapterFree(nn.Module):
    """A model seen with its adapter off: the reference that needs no memory.

    It owns no weights: they are those of ``model``, under its own names in ``state_dict``.

    Args:
        model: The model with its adapter.
    """

    def __init__(self, model: PeftModel) -> None:
        super().__init__()
        self._seen = (model,)  # in a tuple, so that it does not become a submodule
        self.config = model.config
        self.eval()

    @property
    def model(self) -> PeftModel:
        """The model with its adapter."""
        return self._seen[0]

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, without its adapter and without gradients."""
        with self.model.disable_adapter():
            return self.model(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's."""
        return self.model.state_dict(*args, **kwargs)

    def get_output_embeddings(self) -> nn.Module:
        """The model's."""
        return self.model.get_output_embeddings()


def reference_of(model: nn.Module) -> nn.Module:
    """The reference of ``model`` where the user gave none: itself without its adapter, or else a frozen copy."""
    if isinstance(model, PeftModel):
        trained = [name for name, p in model.named_parameters() if "lora_B" in name and p.requires_grad and p.any()]
        if trained:
            logger.info(
                "the adapter was trained before: the reference is the model without it. To keep it in the reference, "
                "merge it first (save_pretrained_merged) and add a new one"
            )
        return AdapterFree(model)
    logger.info("a copy of the model is kept as the reference; an adapter would need none")
    return copy.deepcopy(model).requires_grad_(False).eval()
