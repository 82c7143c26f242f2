"""The reference of preference training: what the policy is compared with."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
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
        with adapters_off(self.model):
            return self.model(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's."""
        return self.model.state_dict(*args, **kwargs)

    def get_output_embeddings(self) -> nn.Module:
        """The model's."""
        return self.model.get_output_embeddings()


@contextlib.contextmanager
def adapters_off(model: PeftModel) -> Iterator[None]:
    """``model`` without its adapters, for passes without gradients; then as it was.

    PEFT's ``disable_adapter`` first collects the state of every layer and changes what requires a gradient, twice: for
    30 ms of an 8B model's step a GPU waits for it. Here only the switch of every layer is turned. Where more is to be
    turned off (prompts, biases that PEFT warns of), it is PEFT's.
    """
    configs = model.peft_config.values()
    if any(c.is_prompt_learning or c.is_adaption_prompt or getattr(c, "bias", "none") != "none" for c in configs):
        with model.disable_adapter():
            yield
        return
    layers = [module for module in model.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    before = [layer.disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer._disable_adapters = was


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
