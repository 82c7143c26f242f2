"""Which layers of a model are swapped for faster ones: a list made from its structure, before anything is changed.

:func:`plan` only looks. The result can be printed, applied and undone; it belongs to this one model. Where the
model's family has a spec (:mod:`unsloth.models.families`), blocks, attention, MLPs and norms are swapped. Linear
layers with an adapter do not depend on the family and are swapped in any model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from unsloth.core.errors import PlanError
from unsloth.layers import attention as attention_layer
from unsloth.layers import block, embedding, linear, mlp, norm
from unsloth.layers.fast import Fast, has_foreign_forward, is_swapped
from unsloth.memory.keeper import Keeper
from unsloth.models import families, record, spec
from unsloth.models.patch import AttentionSwap, ForwardSwap, LeftAlone, PatchPlan, Replacement

_ATTRIBUTE = "unsloth_plan"
_REMEDY = "Load it with fast_layers=False, or correct the spec in models/families."


def plan(
    model: torch.nn.Module,
    *,
    family: spec.ModelSpec | None = None,
    attention: bool | None = None,
    whole: bool | None = None,
    graphs: bool | None = None,
    also: Sequence[Replacement] = (),
) -> PatchPlan:
    """Make a plan for ``model``, which is not changed.

    Args:
        model: A transformers model, or one with an adapter of PEFT.
        family: Its spec; None looks it up.
        attention: Whether to compute scores by :mod:`unsloth.layers.packed_attention` where the model is set to
            ``sdpa``; None means: on a GPU, where that has kernels.
        whole: Whether blocks train as one function each (:mod:`unsloth.layers.whole_block`), in calls that allow it;
            None means: on a GPU, but not with float32 weights that are trained and bfloat16 products.
        graphs: Whether such blocks are recorded as CUDA graphs (:mod:`unsloth.layers.block_graphs`), for batches of
            shapes that come again; None means: on a GPU, but not where the blocks' own weights are trained.
        also: Further replacements, such as of the output head.

    Raises:
        PlanError: The model lacks a part that its family's spec names, two replacements want the same part, or a plan
            is applied to it already.
    """
    inner = record.transformers_model(model)
    swapped = next((path for path, module in inner.named_modules() if is_swapped(module)), None)
    if swapped is not None:
        raise PlanError("the model has a plan applied to it already", got=swapped, do="Call model.unsloth_plan.undo().")
    family = family or families.find(inner)
    draft = _Draft(inner)
    if family is None:
        draft.leave(
            "", inner, f"no spec for {inner.config.model_type} in this form: blocks run as transformers wrote them"
        )
    else:
        on_gpu = inner.device.type == "cuda"
        keeps = _keeper(draft.module(family.layers), whole, graphs, on_gpu)
        _Family(draft, family, keeps).add()
        if attention or (attention is None and on_gpu):
            _add_scores(draft, family)
    _add_linears(draft)
    draft.replacements += also
    _leave_head(draft)
    return PatchPlan(
        model=type(inner).__name__,
        family=family.name if family else None,
        replacements=tuple(draft.replacements),
        left_alone=tuple(draft.left_alone),
    )


def install(model: torch.nn.Module, *, also: Sequence[Replacement] = ()) -> PatchPlan:
    """Plan, apply, and keep the plan as ``model.unsloth_plan``; takes the place of a plan that is there."""
    remove(model)
    made = plan(model, also=also)
    made.apply()
    setattr(record.transformers_model(model), _ATTRIBUTE, made)
    return made


def installed(model: torch.nn.Module) -> PatchPlan | None:
    """The plan that :func:`install` keeps on ``model``, or None."""
    return record.transformers_model(model).__dict__.get(_ATTRIBUTE)


def remove(model: torch.nn.Module) -> None:
    """Undo the plan that :func:`install` applied, if there is one, and forget it."""
    found = installed(model)
    if found is not None:
        found.undo()
        delattr(record.transformers_model(model), _ATTRIBUTE)


@contextmanager
def suspended(model: torch.nn.Module) -> Iterator[None]:
    """``model`` without its plan, if it has one, for the length of a block."""
    found = installed(model)
    if found is None:
        yield
    else:
        with found.suspended():
            yield


@dataclass
class _Draft:
    """A plan that is being made.

    Attributes:
        model: For which.
        replacements: So far.
        left_alone: So far.
        covered: Modules that a replacement of a larger part reads itself.
    """

    model: PreTrainedModel
    replacements: list[Replacement] = field(default_factory=list)
    left_alone: list[LeftAlone] = field(default_factory=list)
    covered: set[torch.nn.Module] = field(default_factory=set)

    def swap(
        self, path: str, function: Any, options: Any, new: str, reason: str, covers: Sequence[torch.nn.Module] = ()
    ) -> bool:
        """Add a replacement of the module at ``path``, unless its forward is someone else's."""
        module = self.module(path)
        if has_foreign_forward(module):
            self.leave(path, module, "its forward was replaced by something else")
            return False
        self.covered.update(covers)
        self.replacements.append(ForwardSwap(path, module, function, Fast(options), new, reason))
        return True

    def leave(self, path: str, module: torch.nn.Module, why: str) -> None:
        """Add a part that stays."""
        self.left_alone.append(LeftAlone(path, type(module).__name__, why))

    def module(self, path: str) -> torch.nn.Module:
        """The module at ``path``; raise :class:`PlanError` if there is none."""
        try:
            return self.model.get_submodule(path)
        except AttributeError as error:
            raise PlanError(
                f"{type(self.model).__name__} lacks a module that its family's spec names",
                got=path,
                do=_REMEDY,
            ) from error

    def attribute(self, path: str, name: str) -> Any:
        """An attribute of the module at ``path``; raise :class:`PlanError` if it has none."""
        module = self.module(path)
        if not hasattr(module, name):
            raise PlanError(
                f"{path} lacks an attribute that its family's spec names",
                got=name,
                do=_REMEDY,
            )
        return getattr(module, name)


class _Family:
    """Adds the parts of a family's blocks to a draft."""

    def __init__(self, draft: _Draft, family: spec.ModelSpec, keeper: Keeper | None) -> None:
        self.draft, self.family, self.config, self.keeper = draft, family, draft.model.config, keeper

    def add(self) -> None:
        """Every block, then what surrounds them."""
        family = self.family
        blocks = self.draft.module(family.layers)
        for i, _ in enumerate(blocks.children()):
            path = f"{family.layers}.{i}"
            self._add_attention(f"{path}.{family.attention.path}", i)
            self._add_mlp(f"{path}.{family.mlp.path}")
            self._add_block(path, i)
        self._add_norm(family.final_norm)
        self._add_embedding()
        self.draft.leave(family.rotary, self.draft.module(family.rotary), "makes its tables once for all blocks")

    def _add_embedding(self) -> None:
        path = self.family.embedding
        module = self.draft.module(path)
        if module.weight.dtype == torch.float16:
            options, reason = embedding.WideEmbedding(), "the residual stream exceeds float16's range"
            self.draft.swap(path, embedding.forward, options, "rows in float32", reason)
        else:
            self.draft.leave(path, module, "a look-up")

    def _norm_options(self, path: str) -> norm.NormOptions:
        parts = self.family.norm
        eps = float(self.draft.attribute(path, parts.eps))
        return norm.NormOptions(parts.kind, eps, parts.offset, parts.weight_last)

    def _add_norm(self, path: str) -> None:
        options = self._norm_options(path)
        self.draft.swap(path, norm.forward, options, f"{options.kind} norm", "one pass over memory")

    def _add_block(self, path: str, number: int) -> None:
        family, parts = self.family, self.family.block
        for name in (parts.input_norm, parts.attention_norm, parts.mlp_norm):
            if name is not None:
                self._add_norm(f"{path}.{name}")
        second = None if parts.mlp_input_norm is None else f"{path}.{parts.mlp_input_norm}"
        for name in (parts.attention_dropout, parts.mlp_dropout):
            if name is not None:
                self.draft.module(f"{path}.{name}")
        options = block.BlockOptions(
            attention=family.attention.path,
            mlp=family.mlp.path,
            norm=None if second is None else self._norm_options(second),
            input_norm=parts.input_norm,
            attention_norm=parts.attention_norm,
            mlp_input_norm=parts.mlp_input_norm,
            mlp_norm=parts.mlp_norm,
            parallel=parts.parallel,
            residual_scale=spec.factor(self.config, parts.residual_scale),
            attention_dropout=parts.attention_dropout,
            mlp_dropout=parts.mlp_dropout,
            keeper=self.keeper,
            number=number,
        )
        covers = [] if second is None else [self.draft.module(second)]
        new = "block" if second is None else f"block, addition with {parts.mlp_input_norm}"
        if not self.draft.swap(path, block.forward, options, new, "one pass instead of two", covers) and second:
            self._add_norm(second)

    def _add_attention(self, path: str, layer: int) -> None:
        config, parts = self.config, self.family.attention
        modules = self._linears(path, parts.projections, parts.bias)
        self._linears(path, (parts.output,), parts.output_bias)
        head_norm = parts.head_norm
        if head_norm is not None and head_norm.switch and not self.draft.attribute(path, head_norm.switch):
            head_norm = None
        names, options, norms = None, None, []
        if head_norm is not None:
            names = (head_norm.query, head_norm.key)
            norms = [self.draft.module(f"{path}.{name}") for name in names]
            options = self._norm_options(f"{path}.{names[0]}")
            if options.kind != "rms" or any(module.weight.dim() > 1 for module in norms):
                options = None  # no kernel computes these with the rotary embedding
        if parts.rotary_switch is not None:
            self.draft.attribute(path, parts.rotary_switch)
        new = f"{_and(parts.projections)} {_how(modules)}, rotary embedding"
        if options is not None:
            new += f" with {_and(names or ())}"
        self.draft.swap(
            path,
            attention_layer.forward,
            attention_layer.AttentionOptions(
                projections=parts.projections,
                output=parts.output,
                heads=config.num_attention_heads,
                key_heads=config.num_key_value_heads,
                head_dim=spec.head_dim(config),
                scale=spec.factor(config, parts.scale),
                window=spec.window(config, parts, layer),
                softcap=spec.optional(config, parts.softcap),
                head_norms=names,
                head_norm=options,
                interleaved=parts.rotary != "halves",
                tables_in_halves=parts.rotary != "neighbours",
                rotary_switch=parts.rotary_switch,
            ),
            new,
            "fewer passes over memory",
            [*modules, *(norms if options is not None else [])],
        )

    def _add_mlp(self, path: str) -> None:
        parts = self.family.mlp
        modules = self._linears(path, (*parts.gate_up, parts.down), parts.bias)
        activation = spec.activation(self.config, parts)
        if activation is None:
            named = spec.read(self.config, parts.activation)
            self.draft.leave(path, self.draft.module(path), f"no formula for the activation {named}")
            return
        new = f"{_and((*parts.gate_up, parts.down))} {_how(modules)}, {activation} recomputed"
        options = mlp.MlpOptions(parts.gate_up, parts.down, activation)
        self.draft.swap(path, mlp.forward, options, new, "fewer passes over memory, less kept", modules)

    def _linears(self, path: str, names: Sequence[str], bias: bool | str) -> list[torch.nn.Module]:
        """The linear layers of a part; raise :class:`PlanError` where their biases are not as the spec says."""
        modules = [self.draft.module(f"{path}.{name}") for name in names]
        expected = spec.is_set(self.config, bias)
        for name, module in zip(names, modules, strict=True):
            base = module.get_base_layer() if isinstance(module, LoraLayer) else module
            if (getattr(base, "bias", None) is not None) != expected:
                raise PlanError(
                    f"{path}.{name} {'lacks a' if expected else 'has a'} bias, against its family's spec",
                    do=_REMEDY,
                )
        return modules


def _keeper(blocks: torch.nn.Module, whole: bool | None, graphs: bool | None, on_gpu: bool) -> Keeper | None:
    if not (on_gpu if whole is None else whole):
        return None
    count = len(list(blocks.children()))
    return Keeper(count, graphs is not False, captures_own=graphs is True, mixes=whole is True)


def _add_scores(draft: _Draft, family: spec.ModelSpec) -> None:
    """The attention function, unless the family caps its scores, which no kernel behind it does."""
    model = draft.model
    if model.config._attn_implementation == "sdpa" and spec.optional(model.config, family.attention.softcap) is None:
        draft.replacements.append(AttentionSwap(model))


def _add_linears(draft: _Draft) -> None:
    """Every layer with an adapter that is not part of something larger."""
    for path, module in draft.model.named_modules():
        if not isinstance(module, LoraLayer) or module in draft.covered:
            continue
        found = linear.read_called(module)
        if isinstance(found, str):
            draft.leave(path, module, found)
        else:
            draft.swap(path, linear.forward, None, "base and adapter together", "fewer passes over memory")


def _leave_head(draft: _Draft) -> None:
    """Say of the output head, too, that it stays, unless something is in its place."""
    head = draft.model.get_output_embeddings()
    path = next((path for path, module in draft.model.named_modules() if module is head), None)
    if path is not None and path not in {replacement.path for replacement in draft.replacements}:
        draft.leave(path, head, "the loss decides how its logits are computed")


def _and(names: Sequence[str]) -> str:
    return ", ".join(names)


def _how(modules: Sequence[torch.nn.Module]) -> str:
    """How a swapped part gets the products of its linear layers, as they are now."""
    reasons = [found for found in map(linear.read, modules) if isinstance(found, str)]
    return f"one by one ({reasons[0]})" if reasons else "together"
