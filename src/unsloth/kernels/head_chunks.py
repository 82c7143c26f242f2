"""The product half of the head ops: logits of a few rows of hidden states at a time, in one reused buffer.

Shapes: N tokens, H hidden, V vocabulary, R rows of a chunk. On CUDA devices 16-bit inputs give float32 logits straight
from the matrix product's accumulator, so a loss or a log-probability carries no 16-bit rounding of the logits; their
gradient is written as 16-bit values over the first half of each row (the next product wants 16-bit operands).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from unsloth.core.errors import ConfigError
from unsloth.kernels import dispatch

# Bytes of logits held at a time. 1,024 rows of a vocabulary of 151,936 take 622 MB; fewer rows leave processors idle.
CHUNK_BYTES = 640 * 2**20
# With a trained head every chunk reads and writes the whole float32 weight gradient, so fewer, larger ones.
TRAINED_CHUNK_BYTES = 4 * CHUNK_BYTES
_ROW_STEP = 128
COLUMN_STEP = 1024


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
        """Where the gradient of ``logits`` goes, at the dtype of ``hidden``: over ``logits`` themselves where it can.

        Not with 16 bits on a CPU: where the processor has AMX, oneDNN reads a row of a product's left side beyond its
        end and multiplies that by zero, and what is left there of the logits may read as NaN.
        """
        if self.dtype == self.hidden.dtype:
            return logits
        if not logits.is_cuda:
            return torch.empty_like(logits, dtype=self.hidden.dtype, memory_format=torch.contiguous_format)
        return self._buffer.view(self.hidden.dtype)[: logits.shape[0], : self.vocabulary]


class HeadColumns:
    """Slices of the vocabulary of ``hidden @ weight.T + bias``, every row of them, in buffers of ``chunk_bytes``.

    Args:
        hidden: (N, H).
        weight: (V, H), of which a slice at a time has the dtype of ``hidden``.
        bias: (V,) or None.
        chunk_bytes: Bound on the logits; at least one step of columns is taken.
    """

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, chunk_bytes: int) -> None:
        self.hidden, self.weight, self.bias = hidden, weight, bias
        narrow = hidden.dtype in (torch.float16, torch.bfloat16)
        self.dtype = torch.float32 if narrow else hidden.dtype
        fitting = chunk_bytes // (max(1, hidden.shape[0]) * self.dtype.itemsize)
        self.columns = min(weight.shape[0], max(COLUMN_STEP, fitting // COLUMN_STEP * COLUMN_STEP))
        numbers = hidden.shape[0] * self.columns
        self._logits = torch.empty(numbers, dtype=self.dtype, device=hidden.device)
        self._slope = torch.empty(numbers, dtype=hidden.dtype, device=hidden.device) if narrow else self._logits

    def slices(self) -> Iterator[slice]:
        """Ranges that cover the vocabulary."""
        total = self.weight.shape[0]
        return (slice(start, min(start + self.columns, total)) for start in range(0, total, max(1, self.columns)))

    def logits(self, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Raw logits (N, C) of a slice, and where their gradient goes; valid until the next call."""
        shape = self.hidden.shape[0], part.stop - part.start
        logits, slope = (x[: shape[0] * shape[1]].view(shape) for x in (self._logits, self._slope))
        matmul_into(logits, self.hidden, self.weight[part].to(self.hidden.dtype).t())
        return logits if self.bias is None else logits.add_(self.bias[part]), slope


class HeadGradients:
    """Gradients of hidden states (the product's dtype), weight and bias (float32), summed over chunks of rows.

    Args:
        chunks: The head.
        needs: Which of hidden states, weight and bias want one; the others stay None.
    """

    def __init__(self, chunks: HeadChunks, needs: Sequence[bool]) -> None:
        x, w, wide = chunks.hidden, chunks.weight, statistics_dtype(chunks.hidden)
        self._chunks = chunks
        self.hidden = torch.empty_like(x) if needs[0] else None
        self.weight = torch.empty(w.shape, dtype=wide, device=x.device) if needs[1] else None
        self.bias = torch.zeros(w.shape[:1], dtype=wide, device=x.device) if needs[2] else None
        if self.weight is not None and not x.shape[0]:
            self.weight.zero_()

    def add(self, rows: slice, grad: torch.Tensor) -> None:
        """Take in the gradient (R, V) of the raw logits of ``rows``; chunks come in their order."""
        if self.hidden is not None:
            matmul_into(self.hidden[rows], grad, self._chunks.weight)
        if self.weight is not None:
            matmul_into(self.weight, grad.t(), self._chunks.hidden[rows], accumulate=rows.start > 0)
        if self.bias is not None:
            self.bias += grad.sum(dim=0, dtype=self.bias.dtype)

    def parts(self) -> list[torch.Tensor | None]:
        """Of hidden states, weight, bias."""
        return [self.hidden, self.weight, self.bias]


def whole_logits(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """All raw logits (N, V) in plain torch, differentiable, and the labels (N,): what the references start from."""
    flat, flat_labels = flatten_head_inputs(hidden, weight, labels, bias)
    dtype = product_dtype(hidden, weight)
    bias = None if bias is None else bias.to(dtype)
    return torch.nn.functional.linear(flat.to(dtype), weight.to(dtype), bias), flat_labels


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
    """Check the inputs of a head op; returns hidden states (N, H), adjacent along H, and labels (N,)."""
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
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_floating_point()):
        do = "Pass one floating-point value a vocabulary entry."
        raise ConfigError("The head's bias does not fit", got=(bias.dtype, tuple(bias.shape)), do=do)
    devices = {t.device for t in (hidden, weight, labels, bias) if t is not None}
    if len(devices) > 1:
        raise ConfigError("The head's inputs lie on several devices", got=devices, do="Move them to one device.")
    flat = hidden.reshape(-1, hidden.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous(), labels.reshape(-1).long().contiguous()


def product_dtype(hidden: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """The dtype of the head's product: autocast's where it is on, else the wider of the two inputs'."""
    if torch.is_autocast_enabled(hidden.device.type):
        return torch.get_autocast_dtype(hidden.device.type)
    return torch.promote_types(hidden.dtype, weight.dtype)


def statistics_dtype(hidden: torch.Tensor) -> torch.dtype:
    """The dtype of losses and log-probabilities: float32, and float64 for float64."""
    return dispatch.compute_dtype(hidden.dtype)
