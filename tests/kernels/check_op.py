"""The rule every kernel is held to, for its output and for every gradient.

Three computations on the same stored inputs: ``truth`` is the reference in float64, ``torch`` the reference at the
inputs' own dtypes, ``ours`` the kernel. Then, elementwise maxima over each tensor::

    |ours - truth| <= 2 * |torch - truth| + eps(dtype) * max|truth|

where dtype is that of the tensor compared. A NaN anywhere in ``ours`` fails. Torch's float32 products may be more exact
than a plain sum (a library that splits the sum, or carries it wider); where a kernel adds ``terms`` products one after
another, ``sqrt(terms) / 2 * eps(float32) * max|truth|`` is allowed besides: each addition rounds by at most half a last
place, to either side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Op = Callable[..., torch.Tensor | Sequence[torch.Tensor]]

# Rows x columns that hit the edges: one element, one short, one over, primes, a masked tail of a power of two.
ODD_SHAPES = [(1, 1), (3, 7), (2, 33), (5, 127), (3, 129), (4, 500)]


def check_op(op: Op, reference: Op, *inputs: object, names: Sequence[str] = (), scale: float = 1.0) -> None:
    """Compare ``op`` with ``reference`` on ``inputs``, and the gradients of every input that requires one.

    Args:
        op: The public function under test; called with ``inputs`` as given, strides included.
        reference: The same computation in plain torch. Where it computes in float32 it must do so by
            ``x.to(dispatch.compute_dtype(x.dtype))``, which keeps float64, never by ``x.float()``.
        inputs: Tensors, or anything else that both functions take. Gradients are checked for the tensors with
            ``requires_grad``.
        names: Names of the inputs for messages.
        scale: Multiplies the incoming gradients, to reach overflow or underflow.
    """
    truth_in, torch_in, ours_in = ([_leaf(x, double) for x in inputs] for double in (True, False, False))
    truth, torch_out, ours = (
        _outputs(reference(*truth_in)),
        _outputs(reference(*torch_in)),
        _outputs(op(*ours_in)),
    )
    assert len(truth) == len(ours), f"{len(ours)} outputs, the reference has {len(truth)}"
    for i, (t, p, o) in enumerate(zip(truth, torch_out, ours, strict=True)):
        assert_close(o, p, t, f"output {i}")

    leaves = [i for i, x in enumerate(inputs) if isinstance(x, torch.Tensor) and x.requires_grad]
    if not leaves:
        return
    seen = [i for i, t in enumerate(truth) if t.requires_grad]
    assert [i for i, o in enumerate(ours) if o.requires_grad] == seen, "outputs differ in requires_grad"
    upstream = [torch.randn(ours[i].shape, device=ours[i].device).to(ours[i].dtype) * scale for i in seen]
    grads = [
        torch.autograd.grad(
            [outs[i] for i in seen],
            [ins[i] for i in leaves],
            [g.to(outs[i].dtype) for i, g in zip(seen, upstream, strict=True)],
            allow_unused=True,
        )
        for outs, ins in ((truth, truth_in), (torch_out, torch_in), (ours, ours_in))
    ]
    for i, t, p, o in zip(leaves, *grads, strict=True):
        name = f"gradient of {names[i] if i < len(names) else f'input {i}'}"
        assert (t is None) == (o is None), f"{name}: ours {'missing' if o is None else 'present'}"
        if t is not None:
            assert_close(o, p, t, name)


def assert_close(ours: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor, name: str, *, terms: int = 0) -> None:
    """The rule above for one tensor; ``plain`` is torch's own result at the tensor's dtype."""
    assert ours.shape == truth.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(truth.shape)}"
    if truth.numel() == 0:
        return
    if not truth.dtype.is_floating_point:
        assert torch.equal(ours, truth), f"{name}: differs"
        return
    eps = torch.finfo(ours.dtype).eps
    error = (ours.double() - truth.double()).abs().max().item()
    torch_error = (plain.double() - truth.double()).abs().max().item()
    eps += terms**0.5 / 2 * torch.finfo(torch.float32).eps
    bound = 2 * torch_error + eps * truth.double().abs().max().item()
    assert error <= bound, f"{name}: error {error:.3e} over the bound {bound:.3e} (torch {torch_error:.3e})"


def layouts(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same values under other strides: columns of a wider buffer, a transposed one, every second element."""
    wide = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 3), float("nan"))
    wide[..., : tensor.shape[-1]] = tensor
    gaps = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), float("nan"))
    gaps[..., ::2] = tensor
    variants = {"columns of a wider buffer": wide[..., : tensor.shape[-1]], "every second": gaps[..., ::2]}
    if tensor.dim() > 1:
        variants["transposed"] = tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    return {k: v.requires_grad_(tensor.requires_grad) for k, v in ((k, v.detach()) for k, v in variants.items())}


def _leaf(x: object, double: bool) -> object:
    if not isinstance(x, torch.Tensor):
        return x
    leaf = x.detach()  # shares storage, keeps strides: in-place ops must be wrapped in a clone by the test
    if double and leaf.dtype.is_floating_point:
        leaf = leaf.double()
    return leaf.requires_grad_(x.requires_grad)


def _outputs(result: torch.Tensor | Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)
