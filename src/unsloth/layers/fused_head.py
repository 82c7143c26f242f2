"""Output head and loss in one, on one model object: the logits of a training step never exist as a whole.

Most causal language models of transformers end in the same way: ``logits = self.lm_head(hidden)``, in some of them
scaled or soft-capped, then ``self.loss_function(logits, labels, ...)``. Here the head of one model answers with
:class:`unsloth.layers.lazy_logits.LazyLogits` while that model's forward runs with labels, and the model's own
``loss_function`` slot gets :meth:`FusedHead.loss`, which computes head, scale, cap and loss in chunks
(:func:`unsloth.losses.sft.causal_lm_loss`). Whatever else is done with the logits computes them.

Only models whose loss is transformers' plain shifted cross-entropy and whose head is a plain linear layer are
changed; :func:`describe` says why another is left alone. No class is touched, and :func:`remove` undoes everything.

What is put into the model are bound methods of a :class:`FusedHead`. ``copy.deepcopy`` and ``pickle`` therefore carry
the change over to the copy, bound to the copy's own head; a closure would go on using the old one's.

While ``torch.compile`` traces the model, the head is the plain one: the compiler sees the code that it knows.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_layers import GradientCheckpointingLayer

from unsloth.core import settings
from unsloth.core.errors import ModelError
from unsloth.kernels.head_chunks import TRAINED_CHUNK_BYTES
from unsloth.kernels.softmax_rows import HeadOptions
from unsloth.layers.lazy_logits import LazyLogits, Origin
from unsloth.losses import sft
from unsloth.memory import checkpointing, gauge
from unsloth.memory.budget import Budget
from unsloth.memory.keeper import Keeper

LEAN_CHUNK_BYTES = 256 * 2**20
"""Bytes of logits that exist at a time where memory is short."""

_ATTRIBUTE = "unsloth_fused_head"
_FORWARD_ARGUMENT = "return_logits"


@dataclass(frozen=True)
class Finding:
    """Whether a model's head and loss can be computed together.

    Attributes:
        applies: Whether they can.
        text: What is there, or why the model is left alone.
        path: Of the head within the model; None if it has none.
    """

    applies: bool
    text: str
    path: str | None = None


class FusedHead:
    """The state behind the methods that replace a head's forward and a model's loss.

    Args:
        head: The output head: ``nn.Linear``, or PEFT's wrapper of one that is trained in full.
        label_position: Of ``labels`` among the positional arguments of the model's forward.
    """

    def __init__(self, head: nn.Module, label_position: int) -> None:
        self.head = head
        self.label_position = label_position
        self.is_open = False
        self.keeper: Keeper | None = None
        self.policy: checkpointing.Policy = False

    def enter(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Before the model's forward: open if there are labels, and nobody asked for the logits.

        The state is set anew at every entry, so that a forward that failed leaves nothing behind.
        """
        asked = kwargs.get(_FORWARD_ARGUMENT)
        kwargs = {name: value for name, value in kwargs.items() if name != _FORWARD_ARGUMENT}
        self.is_open = False
        if torch.compiler.is_compiling():
            return args, kwargs
        labels = kwargs.get("labels")
        if labels is None and len(args) > self.label_position:
            labels = args[self.label_position]
        if asked is None:
            asked = settings.return_logits()
        self.is_open = labels is not None and not asked
        if self.is_open:
            self.keeper, self.policy = keeper_of(model), checkpointing.policy_in(model)
        return args, kwargs

    def leave(self, model: nn.Module, args: tuple, output: Any) -> None:
        """After the model's forward, also after one that failed: the head is the plain one again."""
        self.is_open = False

    def project(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """In the place of the head's forward: lazy logits (B, T, V) while open, else the head's own result."""
        linear = _linear(self.head) if self.is_open and not args and not kwargs else None
        if linear is None:
            return type(self.head).forward(self.head, hidden, *args, **kwargs)
        return LazyLogits(Origin(hidden, linear, self.compute))

    def compute(self, hidden: torch.Tensor) -> torch.Tensor:
        """The head's own result, whether open or not."""
        return type(self.head).forward(self.head, hidden)

    def loss(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        vocab_size: int,
        num_items_in_batch: torch.Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """In the place of ``ForCausalLMLoss``, with its arguments; the loss of lazy logits is computed in chunks."""
        form = _form(logits, labels if shift_labels is None else shift_labels, vocab_size)
        if form is None:
            if isinstance(logits, LazyLogits):
                logits = logits.materialize()
            return ForCausalLMLoss(
                logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels=shift_labels, **kwargs
            )
        origin, (scale, cap) = logits.origin, form  # type: ignore[attr-defined]
        late = weight_is_late(self.policy, origin.hidden, origin.linear.weight)
        counted = sft.causal_lm_loss(
            origin.hidden,
            origin.linear.weight,
            labels if shift_labels is None else shift_labels,
            origin.linear.bias,
            options=HeadOptions(logit_scale=scale, softcap=cap, ignore_index=ignore_index),
            num_items=num_items_in_batch,
            shifted=shift_labels is not None,
            chunk_bytes=LEAN_CHUNK_BYTES if late else chunk_bytes(self.keeper, origin.hidden, origin.linear.weight),
            late_weight=late,
        )
        logits.correct = counted.correct  # type: ignore[attr-defined]
        return counted.loss


@dataclass(frozen=True)
class _Installed:
    """What a model with a fused head keeps.

    The hooks are not part of the state, which the head refers to: copying the head alone, as PEFT does, must not copy
    everything else that is hooked into the model.
    """

    state: FusedHead
    hooks: tuple[torch.utils.hooks.RemovableHandle, ...]


def describe(model: PreTrainedModel) -> Finding:
    """Whether head and loss of ``model`` (a transformers model, without PEFT's outer wrapper) can be fused, or why not.

    Looks only; changes nothing. A model that is fused already is described as if it were not.
    """
    installed = find(model)
    own_loss = model.loss_function if installed is None else ForCausalLMLoss
    if own_loss is not ForCausalLMLoss:
        return Finding(False, f"its loss is {_name(own_loss)}, not the plain shifted cross-entropy")
    if _label_position(model) is None:
        return Finding(False, "its forward takes no labels")
    head = model.get_output_embeddings()
    path = next((name for name, module in model.named_modules() if module is head), None)
    if head is None or path is None:
        return Finding(False, "it has no output head")
    linear = _linear(head)
    if linear is None:
        return Finding(False, f"its head is a {type(head).__name__}, not a plain linear layer", path)
    swapped = head.__dict__.get("forward")
    if swapped is not None and (installed is None or installed.head is not head):
        return Finding(False, "the forward of its head was replaced by someone else", path)
    trained = "trained" if linear.weight.requires_grad else "frozen"
    return Finding(
        True, f"{trained} linear head of {linear.out_features:,} entries, then the plain shifted cross-entropy", path
    )


def install(model: PreTrainedModel) -> Finding:
    """Let ``model`` compute head and loss together, if :func:`describe` finds that it can.

    Installing again follows a head that was exchanged in the meantime, such as one that PEFT wrapped.

    Args:
        model: A transformers model, without PEFT's outer wrapper. Changed in place.

    Returns:
        What was found; its ``applies`` says whether the model was changed.

    Raises:
        ModelError: Somebody replaced our methods since an earlier call.
    """
    remove(model)
    finding = describe(model)
    position = _label_position(model)
    if not finding.applies or position is None:
        return finding
    head = model.get_output_embeddings()
    state = FusedHead(head, position)
    head.forward = state.project
    model.loss_function = state.loss
    hooks = (
        model.register_forward_pre_hook(state.enter, with_kwargs=True),
        model.register_forward_hook(state.leave, always_call=True),
    )
    setattr(model, _ATTRIBUTE, _Installed(state, hooks))
    return finding


def remove(model: PreTrainedModel) -> None:
    """Give ``model`` back its own head and loss; does nothing if they were not changed.

    Raises:
        ModelError: Somebody replaced our methods since; undoing would take their change away too.
    """
    installed: _Installed | None = getattr(model, _ATTRIBUTE, None)
    if installed is None:
        return
    state = installed.state
    for owner, name, ours in ((state.head, "forward", FusedHead.project), (model, "_loss_function", FusedHead.loss)):
        if getattr(owner.__dict__.get(name), "__func__", None) is not ours:
            raise ModelError(
                f"the fused head cannot be removed: {name.lstrip('_')} of {type(owner).__name__} was replaced since",
                got=owner.__dict__.get(name),
                do="Undo that replacement first.",
            )
    del state.head.forward
    del model._loss_function
    for hook in installed.hooks:
        hook.remove()
    delattr(model, _ATTRIBUTE)


def find(model: nn.Module) -> FusedHead | None:
    """The fused head of ``model``, or None."""
    installed: _Installed | None = getattr(model, _ATTRIBUTE, None)
    return None if installed is None else installed.state


def correct_predictions(logits: Any) -> torch.Tensor | None:
    """How many trained positions of a forward with a fused loss were predicted right; None for other logits."""
    return logits.correct if isinstance(logits, LazyLogits) else None


def chunk_bytes(keeper: Keeper | None, hidden: torch.Tensor, weight: torch.Tensor) -> int | None:
    """Of logits at a time: few where layers spend time to save memory, and so does a frozen head; None says nothing."""
    tight = keeper is not None and keeper.assignment.tight
    return LEAN_CHUNK_BYTES if tight and hidden.is_cuda and not weight.requires_grad else None


def weight_is_late(policy: checkpointing.Policy, hidden: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the gradient of a trained head waits for the backward, which takes more time and less memory.

    Not where layers keep everything, nor where they keep what fits and the head's fits several times.
    """
    if policy is False or not (weight.requires_grad and hidden.is_cuda):
        return False
    if policy is True or isinstance(policy, Budget):
        return True
    now = gauge.read(hidden.device)
    rows = hidden.numel() // hidden.shape[-1]
    needed = min(TRAINED_CHUNK_BYTES, 4 * rows * weight.shape[0]) + 6 * weight.numel()
    return now.total - now.allocated < 4 * needed


def keeper_of(model: nn.Module) -> Keeper | None:
    """What decides on the memory of the model's blocks, or None."""
    for module in model.modules():
        fast = module.__dict__.get("unsloth_fast")
        keeper = None if fast is None else getattr(fast.options, "keeper", None)
        if keeper is not None:
            return keeper
        if isinstance(module, GradientCheckpointingLayer):
            return None  # the first block says it for all
    return None


def _form(logits: torch.Tensor, targets: torch.Tensor, vocab_size: int) -> tuple[float, float] | None:
    """Scale and cap of logits that nobody has asked for yet; None if the plain loss has to compute them."""
    if not isinstance(logits, LazyLogits) or not logits.is_pending:
        return None
    if vocab_size != logits.shape[-1] or targets.shape != logits.shape[:-1]:
        return None
    return logits.scale_and_cap()


def _linear(head: Any) -> nn.Linear | None:
    """The plain linear layer that ``head`` runs, looking through PEFT's wrapper of modules that are trained in full."""
    if isinstance(head, ModulesToSaveWrapper):
        active = head.active_adapters
        off = head.disable_adapters or not active or any(name not in head._adapters for name in active)
        head = head.original_module if off else head.modules_to_save[active[0]]
    return head if type(head) is nn.Linear else None


def _label_position(model: PreTrainedModel) -> int | None:
    names = list(inspect.signature(type(model).forward).parameters)
    return names.index("labels") - 1 if "labels" in names else None


def _name(function: Any) -> str:
    return getattr(function, "__name__", type(function).__name__)
