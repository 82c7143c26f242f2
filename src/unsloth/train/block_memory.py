"""How much memory blocks that train as one function take, by the rules that their memory policy goes by."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from unsloth.kernels.head_chunks import CHUNK_BYTES, TRAINED_CHUNK_BYTES
from unsloth.kernels.linear_cross_entropy import late_bytes
from unsloth.layers import linear
from unsloth.layers.attention import AttentionOptions
from unsloth.layers.block import BlockOptions
from unsloth.layers.block_sizes import block_sizes
from unsloth.layers.fused_head import LEAN_CHUNK_BYTES
from unsloth.layers.linear import Frozen
from unsloth.layers.mlp import MlpOptions
from unsloth.memory.budget import STAGING, Assignment, Budget, LayerSizes, Place, assign, fixed_assignment
from unsloth.memory.checkpointing import Policy
from unsloth.models.patch import ForwardSwap, PatchPlan

_UNLIMITED = 2**62


@dataclass(frozen=True)
class Blocks:
    """The blocks of a model, all alike.

    Attributes:
        layers: How many.
        width: Features of the residual stream.
        heads: Query heads, key heads, and the dimension of one.
        linears: Of one block: projections, output, gate, up and down.
        head: Numbers of the output head's weight, if that is trained; else 0.
    """

    layers: int
    width: int
    heads: tuple[int, int, int]
    linears: tuple[Frozen, ...]
    head: int = 0

    def sizes(self, rows: int, itemsize: int) -> LayerSizes:
        """Bytes of one block for ``rows`` tokens of ``itemsize`` bytes a value."""
        return block_sizes(rows, self.width, self.heads, self.linears, itemsize)


@dataclass(frozen=True)
class BlockMemory:
    """Bytes on the device when most are, weights and gradients apart.

    Attributes:
        activations: What layers keep, and what one of them or the head holds at once.
        logits: Beside them, the logits.
        host: Bytes in host memory.
        late: What there is of activations when the backward of the first layers runs, and all gradients exist.
    """

    activations: int
    logits: int
    host: int
    late: int

    def peak(self, gradients: int, *, accumulated: bool) -> tuple[int, int, int]:
        """(gradients, activations, logits) when they are most together.

        Args:
            gradients: Bytes of those of all trained weights.
            accumulated: Whether they exist from an earlier micro-batch on.
        """
        if accumulated:
            return gradients, self.activations, self.logits
        return max((0, self.activations, self.logits), (gradients, self.late, 0), key=sum)


def find(plan: PatchPlan, model: torch.nn.Module) -> Blocks | None:
    """The blocks that ``plan``, made with ``whole=True``, would train as one function; None if it would none.

    Args:
        plan: Of the model, not applied.
        model: The transformers model.
    """
    swaps = {r.path: r for r in plan.replacements if isinstance(r, ForwardSwap)}
    found = [(path, r.fast.options) for path, r in swaps.items() if isinstance(r.fast.options, BlockOptions)]
    if not found:
        return None
    path, options = found[0]
    attention, mlp = (swaps.get(f"{path}.{name}") for name in (options.attention, options.mlp))
    if options.peculiarity() is not None or attention is None or mlp is None:
        return None
    of_attention: AttentionOptions = attention.fast.options
    of_mlp: MlpOptions = mlp.fast.options
    names = [f"{attention.path}.{name}" for name in (*of_attention.projections, of_attention.output)]
    names += [f"{mlp.path}.{name}" for name in (*of_mlp.gate_up, of_mlp.down)]
    read = [linear.read(model.get_submodule(name), trained=True) for name in names]
    linears = tuple(item for item in read if isinstance(item, Frozen))
    if any(item.trained and item.base.weight.dtype == torch.float32 for item in linears):
        return None  # products are narrower
    if len(linears) < len(read) or len(of_mlp.gate_up) != 2 or of_attention.softcap is not None:
        return None
    if any(linear.bias is not None for linear in linears[-3:]):
        return None
    heads = (of_attention.heads, of_attention.key_heads, of_attention.head_dim)
    head = getattr(model.get_output_embeddings(), "weight", None)
    trained = head.numel() if isinstance(head, torch.Tensor) and head.requires_grad else 0
    return Blocks(len(found), linears[-1].base.out_features, heads, linears, trained)


def measure(
    blocks: Blocks, policy: Policy, rows: int, itemsize: int, vocabulary: int, *, recorded: bool = True
) -> BlockMemory:
    """The memory of forward and backward of a batch of ``rows`` tokens, with the head's product made in chunks.

    ``"unsloth"`` takes what is free; counted is the least that it can do with. What recorded blocks work with is theirs
    for good, so that the head has its memory beside it; ``recorded`` says whether blocks that can be recorded are.
    """
    sizes = blocks.sizes(rows, itemsize)
    chosen = _assignment(blocks.layers, sizes, policy)
    hidden = rows * blocks.width * itemsize
    logits = _logits(blocks.head, policy, chosen, rows, itemsize, vocabulary)
    # the head's input as it was normalized, the rows of it that are trained on, their gradient, and that of all rows
    head = chosen.waiting_bytes(sizes) + 4 * hidden
    host = chosen.places.count(Place.OFFLOAD) * sizes.least
    layers = chosen.device_bytes(sizes) + hidden
    staged = min(STAGING, blocks.layers) * sizes.least + sizes.buffers
    late = staged + sizes.working + (0 if chosen.lean else sizes.quick) + hidden
    if recorded and sizes.buffers:
        inside = layers - chosen.waiting_bytes(sizes)
        # the head's memory is free again by then, that of recorded blocks which keep their values is not
        return BlockMemory(head + inside, logits, host, layers if Place.KEEP in chosen.places else late)
    first, second = (layers, 0) if layers > head + logits else (head, logits)
    return BlockMemory(first, second, host, min(late, layers))


def _logits(head: int, policy: Policy, chosen: Assignment, rows: int, itemsize: int, vocabulary: int) -> int:
    """Bytes of logits, with those of a trained head's gradient."""
    whole = rows * vocabulary * 4
    if not head:
        return min(LEAN_CHUNK_BYTES if chosen.tight else CHUNK_BYTES, whole)
    if policy is False:
        return 4 * head + max(min(TRAINED_CHUNK_BYTES, whole), itemsize * head)
    return max(min(LEAN_CHUNK_BYTES, whole), late_bytes(rows, itemsize, LEAN_CHUNK_BYTES) + itemsize * head)


def fits(blocks: Blocks, policy: Policy, rows: int, itemsize: int, vocabulary: int, free: int) -> bool:
    """Whether forward and backward of ``rows`` tokens take at most ``free`` bytes, and no more than a budget allows."""
    sizes = blocks.sizes(rows, itemsize)
    if isinstance(policy, Budget) and policy.device is not None:
        if _assignment(blocks.layers, sizes, policy).device_bytes(sizes) > policy.device:
            return False
    found = measure(blocks, policy, rows, itemsize, vocabulary)
    return found.activations + found.logits <= free


def _assignment(layers: int, sizes: LayerSizes, policy: Policy) -> Assignment:
    if policy is False:
        return fixed_assignment(layers, Place.KEEP)
    if policy is True:
        return fixed_assignment(layers, Place.RECOMPUTE)
    budget = policy if isinstance(policy, Budget) else Budget(device=0)
    limits = (0 if budget.device is None else budget.device), (_UNLIMITED if budget.host is None else budget.host)
    return assign(layers, sizes, *limits)
