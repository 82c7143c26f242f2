"""The product half of the head ops: logits of a few rows of hidden states at a time, in one reused buffer.

Shapes: N tokens, H hidden, V vocabulary, R rows of a chunk. On CUDA devices 16-bit inputs give float32 logits straight
from the matrix product's accumulator, so a loss or a log-probability carries no 16-bit rounding of the logits; their
gradient is written as 16-bit values over the first half of each row (the next product wants 16-bit operands).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from unsloth.core.errors import ConfigError
from unsloth.kernels import dispatch

# Bytes of logits held at a time. 1,024 rows of a vocabulary of 151,936 take 622 MB; fewer rows leave processors idle.
CHUNK_BYTES = 640 * 2**20
# With a trained head every chunk reads and writes the whole float32 weight gradient, so fewer, larger ones.
TRAINED_CHUNK_BYTES = 4 * CHUNK_BYTES
_ROW_STEP = 128


class HeadChunks:
    """Chunks of ``hidden @ weight.T + bias`` in a buffer of at most ``chunk_bytes``.

    Args:
        hidden: (N, H), unit stride along H.
        weight: (V, H) of the same dtype.
        bias: (V,) or None.
        chunk_bytes: Bound on the buffer; at least one step of rows is taken.
    """

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, chunk_bytes: int) -> None:
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.vocabulary = weight.shape[0]
        narrow = hidden.dtype in (torch.float16, torch.bfloat16)
        self.dtype = torch.float32 if narrow else hidden.dtype
        width = -(-self.vocabulary // 16) * 16  # rows start on 32-byte boundaries
        rows = max(_ROW_STEP, chunk_bytes // (width * self.dtype.itemsize) // _ROW_STEP * _ROW_STEP)
        self.rows = min(rows, hidden.shape[0])
        self._buffer = torch.empty(self.rows, width, dtype=self.dtype, device=hidden.device)

    def slices(self) -> Iterator[slice]:
        """Row ranges that cover all tokens."""
        total = self.hidden.shape[0]
        return (slice(start, min(start + self.rows, total)) for start in range(0, total, max(1, self.rows)))

    def logits(self, rows: slice) -> torch.Tensor:
        """Raw logits (R, V) of some rows; valid until the next call."""
        hidden = self.hidden[rows]
        out = self._buffer[: hidden.shape[0], : self.vocabulary]
        matmul_into(out, hidden, self.weight.t())
        return out if self.bias is None else out.add_(self.bias)

    def gradient(self, logits: torch.Tensor) -> torch.Tensor:
        """Where the gradient of ``logits`` goes, at the dtype of ``hidden``: over ``logits`` themselves."""
        if self.dtype == self.hidden.dtype:
            return logits
        return self._buffer.view(self.hidden.dtype)[: logits.shape[0], : self.vocabulary]


def matmul_into(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, accumulate: bool = False) -> None:
    """``out = a @ b``, or ``out += a @ b``, where ``out`` may be float32 for 16-bit ``a`` and ``b``."""
    if out.dtype == a.dtype:
        if accumulate:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)
    elif out.is_cuda:
        if accumulate:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        else:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
    elif accumulate:
        out.addmm_(a.to(out.dtype), b.to(out.dtype))
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def flatten_head_inputs(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Check the inputs of a head op; returns hidden states (N, H) and labels (N,), contiguous."""
    if not hidden.is_floating_point() or not weight.is_floating_point():
        raise ConfigError(
            "The head needs floating-point hidden states and weight",
            got=(hidden.dtype, weight.dtype),
            do="Dequantize the weight first.",
        )
    if hidden.dim() < 1 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ConfigError(
            "Hidden states and head weight do not fit",
            got=(tuple(hidden.shape), tuple(weight.shape)),
            do="Pass hidden states (..., H) and a weight (V, H).",
        )
    if labels.shape != hidden.shape[:-1] or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ConfigError(
            "One integer label a token is needed",
            got=(labels.dtype, tuple(labels.shape)),
            do=f"Pass labels of shape {tuple(hidden.shape[:-1])}, already shifted.",
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ConfigError(
            "The head's bias does not fit", got=tuple(bias.shape), do="Pass one value a vocabulary entry."
        )
    devices = {t.device for t in (hidden, weight, labels, bias) if t is not None}
    if len(devices) > 1:
        raise ConfigError("The head's inputs lie on several devices", got=devices, do="Move them to one device.")
    return hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1).long().contiguous()


def product_dtype(hidden: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """The dtype of the head's product: autocast's where it is on, else the wider of the two inputs'."""
    if torch.is_autocast_enabled(hidden.device.type):
        return torch.get_autocast_dtype(hidden.device.type)
    return torch.promote_types(hidden.dtype, weight.dtype)


def statistics_dtype(hidden: torch.Tensor) -> torch.dtype:
    """The dtype of losses and log-probabilities: float32, and float64 for float64."""
    return dispatch.compute_dtype(hidden.dtype)
