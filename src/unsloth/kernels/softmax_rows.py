"""Statistics and gradients of rows of logits: the vocabulary half of the linear cross-entropy and log-probability ops.

Shapes: R rows (tokens of one chunk), V vocabulary entries. A row of raw logits ``r`` becomes::

    z = softcap * tanh(scale * r / softcap) / temperature        (no softcap: z = scale * r / temperature)
    lse = log sum_v exp(z_v)          p_v = exp(z_v - lse)          entropy = lse - sum_v p_v z_v
    loss = lse - (1 - smoothing) z_y - smoothing / V * sum_v z_v + z_weight * lse^2

with y the row's label, and

    d loss / d z_v    = p_v (1 + 2 z_weight lse) - (1 - smoothing) [v = y] - smoothing / V
    d log p_y / d z_v = [v = y] - p_v
    d entropy / d z_v = -p_v (z_v - lse + entropy)
    d z_v / d r_v     = scale / temperature * (1 - tanh(scale * r_v / softcap)^2)

Rows whose label is ``ignore_index`` give zeros everywhere. A label outside [0, V) that is not ``ignore_index`` gives
NaN (checking it on the host would stop the GPU's queue). The label smoothing term is that of Szegedy et al. 2016
(arXiv:1512.00567), the z-loss that of Chowdhery et al. 2022 (arXiv:2204.02311), the running maximum that of Milakov
and Gimelshein 2018 (arXiv:1805.02867).

Bytes: the row is read twice and its gradient written once; with one row a multiprocessor the second read comes from L2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from unsloth.core.errors import ConfigError
from unsloth.kernels import dispatch

IGNORE_INDEX = -100


@dataclass(frozen=True)
class HeadOptions:
    """What happens between the head's product and the loss.

    Attributes:
        logit_scale: Multiplies the raw logits (Cohere; Granite's divisor is its inverse).
        softcap: Bound of ``softcap * tanh(logits / softcap)``, after the scale (Gemma); 0 for none.
        temperature: Divides the logits, last.
        label_smoothing: Share of the target spread over the whole vocabulary.
        z_loss: Weight of ``logsumexp ** 2``.
        ignore_index: The label of rows that do not count.
    """

    logit_scale: float = 1.0
    softcap: float = 0.0
    temperature: float = 1.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    ignore_index: int = IGNORE_INDEX

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ConfigError("temperature must be positive", got=self.temperature, do="Use 1.0 for plain logits.")
        if not self.softcap >= 0:
            raise ConfigError("softcap must not be negative", got=self.softcap, do="Use 0 for no soft cap.")
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError("label_smoothing must be in [0, 1)", got=self.label_smoothing, do="Use 0 for none.")
        if not self.z_loss >= 0:
            raise ConfigError("z_loss must not be negative", got=self.z_loss, do="Use 0 for none.")

    @property
    def factors(self) -> tuple[float, float, float]:
        """What the kernels transform raw logits with: scale, soft cap, 1 / temperature."""
        return self.logit_scale, self.softcap, 1.0 / self.temperature

    @property
    def can_wait(self) -> bool:
        """Whether a row's gradient follows from its log-sum-exp and its label alone."""
        return not self.label_smoothing and not self.z_loss

    def plain(self) -> HeadOptions:
        """These options without label smoothing and z-loss, which are parts of a loss, not of a probability."""
        return replace(self, label_smoothing=0.0, z_loss=0.0)


@dataclass
class RowStatistics:
    """One value a row, float32 (``top1`` bool): loss, log-sum-exp, entropy (None unless asked), label is the argmax."""

    loss: torch.Tensor
    lse: torch.Tensor
    entropy: torch.Tensor | None
    top1: torch.Tensor


def transform_logits(logits: torch.Tensor, options: HeadOptions) -> torch.Tensor:
    """Scale, soft cap and temperature, differentiable, at the dtype of ``logits``."""
    z = logits if options.logit_scale == 1 else logits * options.logit_scale
    if options.softcap:
        z = options.softcap * torch.tanh(z / options.softcap)
    return z if options.temperature == 1 else z / options.temperature


def softmax_rows_reference(
    logits: torch.Tensor, labels: torch.Tensor, options: HeadOptions, entropy: bool = False
) -> RowStatistics:
    """The formulas above in plain torch, differentiable; (R, V) any float dtype, computed in float32 at least."""
    z = transform_logits(logits.to(dispatch.compute_dtype(logits.dtype)), options)
    counts = labels != options.ignore_index
    index = torch.where(counts, labels, 0)
    invalid = (index < 0) | (index >= z.shape[1])
    z_label = z.gather(1, torch.where(invalid, 0, index)[:, None])[:, 0]
    z_label = torch.where(invalid, torch.nan, z_label)
    lse = torch.logsumexp(z, dim=1)
    loss = lse - (1 - options.label_smoothing) * z_label
    if options.label_smoothing:
        loss = loss - options.label_smoothing * z.mean(dim=1)
    if options.z_loss:
        loss = loss + options.z_loss * lse**2
    expected = lse - (torch.exp(z - lse[:, None]) * z).sum(dim=1) if entropy else None
    zero = torch.zeros_like(loss)
    return RowStatistics(
        torch.where(counts, loss, zero),
        torch.where(counts, lse, zero),
        None if expected is None else torch.where(counts, expected, zero),
        counts & (z_label >= z.amax(dim=1)),
    )


@triton.jit
def _transform(raw, scale, softcap, inv_temperature, CAP: tl.constexpr):
    """(z, slope of the soft cap) of raw logits; the slope is 1 without one."""
    z = raw * scale
    slope = z * 0.0 + 1.0
    if CAP:
        e = tl.exp(-2.0 * tl.abs(z) / softcap)  # 1 - tanh^2 as 4 e / (1 + e)^2: no difference of nearly equal numbers
        slope = 4.0 * e / ((1.0 + e) * (1.0 + e))
        t = (1.0 - e) / (1.0 + e)
        z = softcap * tl.where(z < 0.0, -t, t)
    return z * inv_temperature, slope


@triton.jit
def softmax_rows_kernel(  # noqa: C901  its switches are compile-time constants
    logits_ptr,
    grad_ptr,
    labels_ptr,
    loss_ptr,
    lse_ptr,
    entropy_ptr,
    top1_ptr,
    V,
    logits_stride,
    grad_stride,
    scale,
    softcap,
    inv_temperature,
    smoothing,
    z_weight,
    ignore_index,
    CAP: tl.constexpr,
    SMOOTH: tl.constexpr,
    ENTROPY: tl.constexpr,
    GRAD: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row: statistics in one pass, then the gradient of the loss in a second one (may be in place)."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    logits_row = logits_ptr + row * logits_stride
    grad_row = grad_ptr + row * grad_stride
    lanes = tl.arange(0, BLOCK)
    if label == ignore_index:
        tl.store(loss_ptr + row, 0.0)
        tl.store(lse_ptr + row, 0.0)
        tl.store(top1_ptr + row, 0)
        if ENTROPY:
            tl.store(entropy_ptr + row, 0.0)
        if GRAD:
            for start in range(0, V, BLOCK):
                tl.store(grad_row + start + lanes, tl.zeros([BLOCK], tl.float32), mask=start + lanes < V)
    else:
        m = tl.full([BLOCK], -1.0e30, tl.float32)
        s = tl.zeros([BLOCK], tl.float32)
        weighted = tl.zeros([BLOCK], tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, V, BLOCK):
            inside = start + lanes < V
            raw = tl.load(logits_row + start + lanes, mask=inside, other=0.0).to(tl.float32)
            z, _ = _transform(raw, scale, softcap, inv_temperature, CAP)
            if SMOOTH:
                total += tl.where(inside, z, 0.0)
            z = tl.where(inside, z, float("-inf"))
            new_m = tl.maximum(m, z)
            shrink = tl.exp(m - new_m)
            e = tl.exp(z - new_m)
            s = s * shrink + e
            if ENTROPY:
                weighted = weighted * shrink + tl.where(e > 0.0, e * z, 0.0)
            m = new_m
        top = tl.max(m, axis=0)
        rescale = tl.exp(m - top)
        denominator = tl.sum(s * rescale, axis=0)
        lse = top + tl.log(denominator)
        valid = (label >= 0) & (label < V)
        raw_label = tl.load(logits_row + label, mask=valid, other=float("nan")).to(tl.float32)
        z_label, _ = _transform(raw_label, scale, softcap, inv_temperature, CAP)
        loss = lse - (1.0 - smoothing) * z_label + z_weight * lse * lse
        if SMOOTH:
            loss -= smoothing / V * tl.sum(total, axis=0)
        tl.store(loss_ptr + row, loss)
        tl.store(lse_ptr + row, lse)
        tl.store(top1_ptr + row, (z_label >= top).to(tl.int8))
        if ENTROPY:
            tl.store(entropy_ptr + row, lse - tl.sum(weighted * rescale, axis=0) / denominator)
        if GRAD:
            # The gradient overwrites logits that other threads of this program still read (the label's).
            tl.debug_barrier()
            # exp(z - top) / denominator, not exp(z - lse): lse carries a rounding that all of the row would share.
            of_p = tl.where(valid, (1.0 + 2.0 * z_weight * lse) / denominator, float("nan"))
            chain = scale * inv_temperature
            for start in range(0, V, BLOCK):
                inside = start + lanes < V
                raw = tl.load(logits_row + start + lanes, mask=inside, other=0.0).to(tl.float32)
                z, slope = _transform(raw, scale, softcap, inv_temperature, CAP)
                g = tl.exp(z - top) * of_p
                g -= tl.where(start + lanes == label, 1.0 - smoothing, 0.0)
                if SMOOTH:
                    g -= smoothing / V
                g *= chain
                if CAP:
                    g *= slope
                if NARROW:  # the 16-bit gradient lies in the first half of the row's float32 logits
                    tl.debug_barrier()
                tl.store(grad_row + start + lanes, g, mask=inside)


@triton.jit
def softmax_rows_backward_kernel(
    logits_ptr,
    grad_ptr,
    labels_ptr,
    lse_ptr,
    entropy_ptr,
    up_logprob_ptr,
    up_entropy_ptr,
    V,
    first,
    logits_stride,
    grad_stride,
    scale,
    softcap,
    inv_temperature,
    ignore_index,
    CAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradient of log p_y and of the entropy for given upstream gradients, one program a (row, tile).

    The V logits of a row are those from number ``first`` on.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < V
    label = tl.load(labels_ptr + row)
    lse = tl.load(lse_ptr + row)
    up = tl.load(up_logprob_ptr + row)
    raw = tl.load(logits_ptr + row * logits_stride + columns, mask=inside, other=0.0).to(tl.float32)
    z, slope = _transform(raw, scale, softcap, inv_temperature, CAP)
    p = tl.exp(z - lse)
    g = up * (tl.where(columns + first == label, 1.0, 0.0) - p)
    if ENTROPY:
        spread = tl.load(entropy_ptr + row)
        g -= tl.load(up_entropy_ptr + row) * tl.where(p > 0.0, p * (z - lse + spread), 0.0)
    g *= scale * inv_temperature
    if CAP:
        g *= slope
    g = tl.where(label == ignore_index, 0.0, g)
    tl.store(grad_ptr + row * grad_stride + columns, g, mask=inside)


def softmax_rows(
    logits: torch.Tensor,
    labels: torch.Tensor,
    options: HeadOptions,
    *,
    grad: torch.Tensor | None = None,
    entropy: bool = False,
) -> RowStatistics:
    """Statistics of every row, and the gradient of its loss with respect to the raw logits.

    Args:
        logits: (R, V) raw logits, float32, bfloat16 or float16, unit stride along V.
        labels: (R,) int64.
        options: Scale, cap, temperature, smoothing, z-loss, ignored label.
        grad: (R, V) that receives the gradient; ``logits`` itself for in place; 16-bit over the first half of each
            row of float32 ``logits`` likewise; None for no gradient.
        entropy: Whether to compute the entropy.
    """
    if not dispatch.can_launch(logits):
        return _softmax_rows_torch(logits, labels, options, grad, entropy)
    rows, vocabulary = logits.shape
    loss, lse = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(2))
    spread = torch.empty_like(loss) if entropy else None
    top1 = torch.empty(rows, dtype=torch.int8, device=logits.device)
    if rows:
        with dispatch.launch_on(logits):
            softmax_rows_kernel[(rows,)](
                logits,
                logits if grad is None else grad,
                labels,
                loss,
                lse,
                loss if spread is None else spread,
                top1,
                vocabulary,
                logits.stride(0),
                0 if grad is None else grad.stride(0),
                *options.factors,
                options.label_smoothing,
                options.z_loss,
                options.ignore_index,
                CAP=options.softcap > 0,
                SMOOTH=options.label_smoothing > 0,
                ENTROPY=entropy,
                GRAD=grad is not None,
                NARROW=grad is not None and grad.dtype != logits.dtype,
                **_row_shape(vocabulary),
            )
    return RowStatistics(loss, lse, spread, top1.bool())


def softmax_rows_backward(
    logits: torch.Tensor,
    labels: torch.Tensor,
    statistics: RowStatistics,
    options: HeadOptions,
    up_logprob: torch.Tensor,
    up_entropy: torch.Tensor | None,
    grad: torch.Tensor,
    *,
    first: int = 0,
) -> None:
    """Write d(up_logprob . log p_y + up_entropy . entropy) / d raw logits into ``grad`` (may be ``logits``).

    Args:
        logits: (R, V) raw logits.
        labels: (R,) int64.
        statistics: What :func:`softmax_rows` returned for these rows (``lse``, and ``entropy`` with ``up_entropy``).
        options: As for :func:`softmax_rows`; smoothing and z-loss play no part.
        up_logprob: (R,) float32.
        up_entropy: (R,) float32, or None where the entropy has no gradient.
        grad: (R, V) of any float dtype.
        first: Number of the first entry, of logits that are a slice of the vocabulary; only where the kernel runs.
    """
    if not dispatch.can_launch(logits):
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            again = softmax_rows_reference(leaf, labels, options.plain(), entropy=up_entropy is not None)
            objective = -(up_logprob * again.loss).sum()
            if up_entropy is not None:
                objective = objective + (up_entropy * again.entropy).sum()
            grad.copy_(torch.autograd.grad(objective, leaf)[0])
        return
    rows, vocabulary = logits.shape
    if not rows:
        return
    block = min(4096, triton.next_power_of_2(vocabulary))
    with dispatch.launch_on(logits):
        softmax_rows_backward_kernel[(rows, triton.cdiv(vocabulary, block))](
            logits,
            grad,
            labels,
            statistics.lse,
            statistics.lse if statistics.entropy is None else statistics.entropy,
            up_logprob,
            up_logprob if up_entropy is None else up_entropy,
            vocabulary,
            first,
            logits.stride(0),
            grad.stride(0),
            *options.factors,
            options.ignore_index,
            CAP=options.softcap > 0,
            ENTROPY=up_entropy is not None,
            BLOCK=block,
            num_warps=8,
        )


def softmax_columns_gradient(
    logits: torch.Tensor,
    labels: torch.Tensor,
    lse: torch.Tensor,
    options: HeadOptions,
    up_logprob: torch.Tensor,
    first: int,
    grad: torch.Tensor,
) -> None:
    """Write d(up_logprob . log p_y) / d raw logits of a slice of the vocabulary into ``grad`` (may be ``logits``).

    Args:
        logits: (R, C) raw logits of the entries from ``first`` on.
        labels: (R,) int64, of the whole vocabulary.
        lse: (R,) of the whole rows; NaN makes a row's gradient NaN.
        options: As for :func:`softmax_rows`; smoothing and z-loss play no part.
        up_logprob: (R,) float32.
        first: Number of the slice's first entry.
        grad: (R, C) of any float dtype.
    """
    if dispatch.can_launch(logits):
        rows = RowStatistics(lse, lse, None, lse)
        softmax_rows_backward(logits, labels, rows, options, up_logprob, None, grad, first=first)
        return
    z = transform_logits(logits.to(dispatch.compute_dtype(logits.dtype)), options)
    own = labels[:, None] == torch.arange(first, first + logits.shape[1], device=logits.device)
    slope = own.to(z.dtype) - torch.exp(z - lse[:, None])
    if options.softcap:
        slope *= 1 - (z * (options.temperature / options.softcap)) ** 2
    slope *= up_logprob[:, None] * (options.logit_scale / options.temperature)
    grad.copy_(slope.masked_fill_((labels == options.ignore_index)[:, None], 0))


def _row_shape(vocabulary: int) -> dict[str, int]:
    """Tile width and warps of a row's program."""
    block = min(8192, triton.next_power_of_2(vocabulary))
    return {"BLOCK": block, "num_warps": max(1, min(16, block // 256))}


def _softmax_rows_torch(
    logits: torch.Tensor, labels: torch.Tensor, options: HeadOptions, grad: torch.Tensor | None, entropy: bool
) -> RowStatistics:
    """The kernel's steps in torch: one exponential a logit, its gradient from the formulas above."""
    with torch.no_grad():
        z = transform_logits(logits.to(dispatch.compute_dtype(logits.dtype)), options)
        counts = labels != options.ignore_index
        index = torch.where(counts, labels, 0)
        invalid = (index < 0) | (index >= z.shape[1])
        index = torch.where(invalid, 0, index)[:, None]
        top = z.amax(dim=1, keepdim=True)
        e = torch.exp(z - top)
        denominator = e.sum(dim=1, keepdim=True)
        lse = (top + denominator.log())[:, 0]
        z_label = torch.where(invalid, torch.nan, z.gather(1, index)[:, 0])
        loss = lse - (1 - options.label_smoothing) * z_label + options.z_loss * lse**2
        if options.label_smoothing:
            loss -= options.label_smoothing * z.mean(dim=1)
        zero = torch.zeros_like(loss)
        spread = torch.where(counts, lse - (e * z).sum(dim=1) / denominator[:, 0], zero) if entropy else None
        top1 = counts & (z_label >= top[:, 0])
        if grad is not None:
            e *= torch.where(invalid, torch.nan, 1 + 2 * options.z_loss * lse)[:, None] / denominator
            if options.label_smoothing:
                e -= options.label_smoothing / z.shape[1]
            e.scatter_add_(1, index, torch.full_like(lse, options.label_smoothing - 1)[:, None])
            if options.softcap:
                e *= 1 - (z * (options.temperature / options.softcap)) ** 2  # the slope of tanh, from its value
            e *= counts[:, None] * (options.logit_scale / options.temperature)
            grad.copy_(e)
        return RowStatistics(torch.where(counts, loss, zero), torch.where(counts, lse, zero), spread, top1)


def compile_examples(float_dtype: str) -> list[tuple]:
    """Signatures for the cross-compilation test: plain bf16 rows, and float32 rows with everything switched on."""
    floats = dict.fromkeys(("scale", "softcap", "inv_temperature", "smoothing", "z_weight"), "fp32")
    integers = {"V": "i32", "first": "i32", "logits_stride": "i64", "grad_stride": "i64", "ignore_index": "i32"}
    pointers = {"labels_ptr": "*i64", "loss_ptr": "*fp32", "lse_ptr": "*fp32", "entropy_ptr": "*fp32"}
    pointers |= {"top1_ptr": "*i8", "up_logprob_ptr": "*fp32", "up_entropy_ptr": "*fp32"}
    examples: list[tuple] = []
    for dtype, on in ((float_dtype, False), ("fp32", True)):
        signature = floats | integers | pointers | {"logits_ptr": f"*{dtype}", "grad_ptr": f"*{float_dtype}"}
        row = {"CAP": on, "SMOOTH": on, "ENTROPY": on, "GRAD": True, "NARROW": on, "BLOCK": 8192}
        examples.append((softmax_rows_kernel, signature, row, {"num_warps": 16}))
        tile = {"CAP": on, "ENTROPY": on, "BLOCK": 4096}
        examples.append((softmax_rows_backward_kernel, signature, tile, {"num_warps": 8}))
    return examples
