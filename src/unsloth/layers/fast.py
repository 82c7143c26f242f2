"""What a module with a swapped forward carries: the options of its fast path, and which path its calls took.

A swapped forward is a function of a module of this package, bound to one instance. It takes the fast path where it
can, and otherwise hands the call to the forward of the instance's class, which nothing has changed. Such functions
are all named ``forward``: pickling a bound method keeps its name only, so a pickled model comes back with the forward
of its classes and without the fast paths.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

ATTRIBUTE = "unsloth_fast"


@dataclass
class Fast:
    """State of one swapped forward.

    Attributes:
        options: A frozen dataclass, what the fast path must know about its module.
        calls: Calls that took the fast path.
        declined: Calls that went to the original forward as a whole, by reason.
        partly: Calls on the fast path some part of which was left to the original modules, by reason.
    """

    options: Any
    calls: int = 0
    declined: dict[str, int] = field(default_factory=dict)
    partly: dict[str, int] = field(default_factory=dict)

    def took(self, but: str | None = None) -> None:
        """Count a call on the fast path; ``but`` says which part of it was left to the original, and why."""
        self.calls += 1
        if but is not None:
            self.partly[but] = self.partly.get(but, 0) + 1

    def decline(self, module: torch.nn.Module, reason: str, *args: Any, **kwargs: Any) -> Any:
        """Count and make a call of the original forward."""
        self.declined[reason] = self.declined.get(reason, 0) + 1
        return type(module).forward(module, *args, **kwargs)


def is_untouched(module: torch.nn.Module) -> bool:
    """Whether a call of ``module`` runs its class's forward, or one of ours, and no hook: then it may be bypassed."""
    state = module.__dict__
    hooked = state["_forward_hooks"] or state["_forward_pre_hooks"]
    hooked = hooked or state["_backward_hooks"] or state["_backward_pre_hooks"]
    return not hooked and not has_foreign_forward(module)


def has_foreign_forward(module: torch.nn.Module) -> bool:
    """Whether someone other than this package gave this very instance another forward than its class has."""
    own = module.__dict__.get("forward")
    function = getattr(own, "__func__", own)
    return own is not None and function is not type(module).forward and not is_swapped(module)


def is_swapped(module: torch.nn.Module) -> bool:
    """Whether ``module`` has the forward of a plan, with the state that it needs."""
    own = module.__dict__.get("forward")
    return ATTRIBUTE in module.__dict__ and getattr(getattr(own, "__func__", None), "__module__", "").startswith(
        "unsloth.layers."
    )
