"""How much a model's predictions suffer from an error in each of its tensors, measured on text.

To second order, the Kullback-Leibler divergence between a model and itself with weights off by D is
``1/2 D' F D``, where F is the Fisher information: the mean of ``g g'`` over tokens drawn from the model's own
predictions, g being the gradient of the log probability of what was drawn (Amari, "Natural gradient works efficiently
in learning", 1998). For a matrix W with inputs x and gradients g of its outputs, the diagonal of F in factored form
(Martens and Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature", 2015) is
``F[r, c] = k mean(g_r^2) mean(x_c^2)``. The product of the means takes the tokens of a text for independent, which they
are not where attention averages over them; ``k`` makes the sum over the matrix what it is, the mean squared norm of
the whole gradient of W. One run forwards and backwards gives all of it, after which the divergence that any
quantization of a tensor causes can be told from its rounding errors alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize

from unsloth.core.errors import ExportError
from unsloth.export import imatrix
from unsloth.export.calibration import Text
from unsloth.export.gguf import methods, quantize
from unsloth.export.gguf.convert import Conversion
from unsloth.export.gguf.file import Reader
from unsloth.export.imatrix import ImportanceMatrix, See
from unsloth.models.gguf_header import TensorInfo
from unsloth.models.record import transformers_model

_BACKWARD_TOKENS = 4096  # of the text are also run backwards
_SAMPLED_ROWS = 192  # of a tensor are quantized to measure a type's error
_HEAD = "head"


@dataclass(frozen=True)
class Term:
    """A factored diagonal of the Fisher information of a tensor: ``F[r, c] = rows[r] columns[c]``.

    Attributes:
        rows: Float64 [rows].
        columns: Float32 [columns].
    """

    rows: np.ndarray
    columns: np.ndarray


Terms = Mapping[str, Sequence[Term]]
"""By the tensor's name in the file. A token embedding that is also the output head has two."""


class _Gradients:
    """Adds up squared gradients of outputs, and of matrices."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.tokens = 0
        self._norms: dict[str, torch.Tensor] = {}
        self._independent: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def add_matrix(self, name: str, inputs: torch.Tensor, gradient: torch.Tensor) -> None:
        """Add the gradient of the outputs [1, T, rows] of a matrix with inputs [1, T, columns]."""
        self.add(name, gradient)
        g, x = gradient.detach()[0].float(), inputs.detach()[0].float()
        scale = g.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)  # squares of small gradients are smaller
        norm = ((g / scale).T @ x).square().sum().double()
        independent = (g / scale).square().sum().double() * x.square().sum().double() / len(x)
        weight = scale.double() ** 2
        zero = torch.zeros_like(norm)
        self._norms[name] = self._norms.get(name, zero) + weight * norm
        self._independent[name] = self._independent.get(name, zero) + weight * independent

    def coherence(self, name: str) -> float:
        """What the product of the means has to be multiplied by; 1 if the tokens were independent."""
        independent = float(self._independent[name])
        return float(self._norms[name]) / independent if independent > 0 else 1.0

    @torch.no_grad()
    def add(self, name: str, gradient: torch.Tensor) -> None:
        squares = gradient.detach().reshape(-1, gradient.shape[-1]).float().square().sum(0)
        self.sums[name] = self.sums[name] + squares if name in self.sums else squares

    def mean(self, name: str) -> torch.Tensor:
        """Mean per token, float64 on the CPU."""
        if name not in self.sums or not bool(torch.isfinite(self.sums[name]).all()):
            raise ExportError(
                f"the gradients of {name} are missing or not finite, so its sensitivity is unknown",
                do="Load the model in bfloat16 or float32 and try again.",
            )
        return self.sums[name].double().cpu() / self.tokens


def measure(
    model: torch.nn.Module, conversion: Conversion, text: Text, seed: int = 0
) -> tuple[ImportanceMatrix, Terms]:
    """Run a model over a text, forwards and for the first 4,096 tokens also backwards.

    No gradient of a parameter is touched, so that this may happen in the middle of a training run.

    Args:
        model: With or without adapters.
        conversion: Of the model.
        text: To run it on.
        seed: Of the tokens that are drawn from the model's predictions.

    Returns:
        The importance matrix, and the sensitivity of every tensor that can be quantized.

    Raises:
        ExportError: A layer was not called, or has inputs or gradients that are not finite.
    """
    inner, layers = transformers_model(model), imatrix.targets(conversion)
    sums, heads, gradients = imatrix.Sums(), imatrix.Sums(), _Gradients()
    generator = torch.Generator().manual_seed(seed)
    with imatrix.watched(model, layers, sums.add), _watched_head(inner, heads.add):
        for chunk in text.chunks:
            ids = chunk[None].to(inner.device)
            if gradients.tokens < _BACKWARD_TOKENS:
                _backward(inner, ids, layers, gradients, generator)
            else:
                with torch.no_grad():
                    inner(input_ids=ids, use_cache=False)
    return imatrix.matrix(sums, conversion, text), _terms(conversion, layers, sums, heads, gradients)


@contextmanager
def _watched_head(inner: torch.nn.Module, see: See) -> Iterator[None]:
    head = inner.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, args: see(_HEAD, args[0]))
    try:
        yield
    finally:
        handle.remove()


def _backward(
    inner: torch.nn.Module,
    ids: torch.Tensor,
    layers: Mapping[str, str],
    gradients: _Gradients,
    generator: torch.Generator,
) -> None:
    """Add the squared gradients of one chunk [1, T]."""
    started: list[torch.Tensor] = []
    heads: list[torch.Tensor] = []

    def start(_: torch.nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        started.append(output.detach().requires_grad_(True))
        return started[-1]

    def observe(name: str) -> Callable[..., None]:
        def register(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> None:
            inputs = args[0] if args else next(iter(kwargs.values()))
            output.register_hook(lambda gradient: gradients.add_matrix(name, inputs, gradient))

        return register

    def observe_head(_: torch.nn.Module, args: object, output: torch.Tensor) -> None:
        output.register_hook(heads.append)

    handles = [inner.get_input_embeddings().register_forward_hook(start)]
    try:
        for path, name in layers.items():
            handles.append(inner.get_submodule(path).register_forward_hook(observe(name), with_kwargs=True))
        handles.append(inner.get_output_embeddings().register_forward_hook(observe_head))
        with torch.enable_grad():
            logits = inner(input_ids=ids, use_cache=False).logits[0].float()
            log_p = logits.log_softmax(-1)
            drawn = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator).to(log_p.device)
            (embedded,) = torch.autograd.grad(log_p.gather(1, drawn).sum(), started)
    finally:
        for handle in handles:
            handle.remove()
    gradients.add("embedding", embedded)
    _add_head(gradients, log_p.detach(), drawn, heads[0])
    gradients.tokens += ids.shape[1]


@torch.no_grad()
def _add_head(gradients: _Gradients, log_p: torch.Tensor, drawn: torch.Tensor, found: torch.Tensor) -> None:
    """The head's, for which the mean over all tokens that could be drawn is known: p (1 - p).

    Where logits are scaled or capped after the head, the gradient that came back says by how much.
    """
    p = log_p.exp()
    expected = p.square().sum() - 2 * p.gather(1, drawn).sum() + len(p)  # of (one at the drawn token - p)^2
    ratio = found.float().square().sum() / expected
    squares = (p * (1 - p)).sum(0) * ratio
    gradients.sums[_HEAD] = gradients.sums[_HEAD] + squares if _HEAD in gradients.sums else squares


def _terms(
    conversion: Conversion,
    layers: Mapping[str, str],
    sums: imatrix.Sums,
    heads: imatrix.Sums,
    gradients: _Gradients,
) -> Terms:
    by_slot = {rule.name: rule for rule in conversion.rules.values()}
    found: dict[str, list[Term]] = {}
    for name in layers.values():
        rule, squares = by_slot[name], gradients.mean(name) * gradients.coherence(name)
        if rule.heads:
            squares = rule.reorder(squares)
        found[name] = [Term((squares / rule.factor**2).numpy(), _mean(sums, name))]
    sizes = {tensor.name: tensor.shape for tensor in conversion.planned}
    inputs = transformers_model(conversion.model).get_input_embeddings()
    scale = float(getattr(inputs, "embed_scale", 1.0))
    rows = sizes["token_embd.weight"][0]
    columns = (gradients.mean("embedding") * scale**2).float().numpy()
    found["token_embd.weight"] = [Term(np.full(rows, 1.0 / rows), columns)]
    head = "output.weight" if "output.weight" in sizes else "token_embd.weight"
    found.setdefault(head, []).append(Term(gradients.mean(_HEAD).numpy(), _mean(heads, _HEAD)))
    return found


def _mean(sums: imatrix.Sums, name: str) -> np.ndarray:
    total, count = sums.collected(name)
    return (total[0] / count[0]).astype(np.float32)


def divergences(
    source: Reader, tensor: TensorInfo, terms: Sequence[Term], kinds: Sequence[Type], importance: np.ndarray | None
) -> dict[Type, float]:
    """The divergence in nats per token that storing a tensor in each of several types would cause.

    A type's error is measured on rows drawn in proportion to their sensitivity, all rows of a small tensor.

    Args:
        source: The unquantized file.
        tensor: In it.
        terms: Its sensitivity.
        kinds: The types.
        importance: Of its columns, with which it would be quantized.
    """
    found = dict.fromkeys(kinds, 0.0)
    for term in terms:
        chosen, weights = _sample(term.rows)
        exact = _rows(source, tensor, chosen)
        for kind in kinds:
            errors = ((_rounded(exact, kind, importance) - exact) ** 2) @ term.columns
            found[kind] += 0.5 * float(errors.astype(np.float64) @ weights)
    return found


def _sample(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of rows and their weights, so that a weighted sum over them estimates the one over all."""
    total = float(rows.sum())
    if len(rows) <= _SAMPLED_ROWS or total <= 0:
        return np.arange(len(rows))[:_SAMPLED_ROWS], rows[:_SAMPLED_ROWS]
    places = (np.arange(_SAMPLED_ROWS) + 0.5) / _SAMPLED_ROWS
    chosen = np.searchsorted(np.cumsum(rows) / total, places).clip(max=len(rows) - 1)
    return chosen, np.full(_SAMPLED_ROWS, total / _SAMPLED_ROWS)


def _rows(source: Reader, tensor: TensorInfo, chosen: np.ndarray) -> np.ndarray:
    """Some rows of a matrix in float32."""
    raw = source.raw(tensor).reshape(int(np.prod(tensor.shape[:-1])), -1)[chosen]
    return dequantize(raw, Type(tensor.type)).astype(np.float32)


def _rounded(exact: np.ndarray, kind: Type, importance: np.ndarray | None) -> np.ndarray:
    """Float32 rows after a round trip through a type."""
    rows, columns = exact.shape
    raw = quantize.encode(exact, kind, importance)
    if kind in methods.PLAIN:
        return dequantize(raw.reshape(rows, -1), kind).astype(np.float32)
    back = quantize.library().dequantize_rows_raw(kind, raw, rows, columns)
    return np.frombuffer(back, dtype=np.float32).reshape(rows, columns)
