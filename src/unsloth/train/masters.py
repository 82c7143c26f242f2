"""Adapters stay float32: the master weights of the run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def preserved(model: torch.nn.Module) -> Iterator[None]:
    """Give every trainable parameter its own tensor back, bit for bit, when the block ends.

    TRL converts the adapters of quantized models to bfloat16 while it builds a trainer. A bfloat16 weight of size
    1 does not change by an update below 0.004, so small updates would vanish, and the run would no longer equal
    one of plain PEFT.
    """
    masters = {parameter: parameter.data for parameter in model.parameters() if parameter.requires_grad}
    try:
        yield
    finally:
        for parameter, data in masters.items():
            parameter.data = data
