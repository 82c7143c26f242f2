"""The input embedding of a model that computes in float16: its rows in float32, and with them the residual stream.

Float16 ends at 65,504, and families differ in how large their residual stream grows: some reach millions. Everything
that is added to float32 is float32, so one conversion is enough; norms take it, and the products under autocast are
float16 as before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from unsloth.layers.fast import Fast


@dataclass(frozen=True)
class WideEmbedding:
    """Nothing to be known."""


def forward(self: Any, ids: torch.Tensor) -> torch.Tensor:
    """(...) integers to (..., K): in float32 where autocast brings float16 back, else as the module computes it."""
    fast: Fast = self.unsloth_fast
    fast.took()
    rows = type(self).forward(self, ids)
    return rows.float() if torch.is_autocast_enabled(rows.device.type) and rows.dtype == torch.float16 else rows
