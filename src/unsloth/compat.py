"""The one place that changes names of other packages: documented scripts import trainers from ``trl``.

``from trl import SFTTrainer`` after ``from unsloth import FastLanguageModel`` gives this library's subclass, which
takes the arguments of such scripts; so does ``from transformers import TrainingArguments``. Trainers that TRL no
longer has at that place (ORPO, CPO) are added. Nothing but these names is rebound: the classes themselves stay as they
are, in their own modules. ``UNSLOTH_TRL_COMPAT=0`` leaves all of it alone, and ``from unsloth import SFTTrainer``
never needs it.
"""

from __future__ import annotations

import importlib
import sys

from unsloth.core import settings
from unsloth.core.log import get_logger

# package: {name in it: the module of this library that has our class of that name}
_BOUND = {
    "trl": {
        "SFTConfig": "unsloth.train.config",
        "SFTTrainer": "unsloth.train.sft",
        "DPOConfig": "unsloth.train.dpo",
        "DPOTrainer": "unsloth.train.dpo",
        "GRPOConfig": "unsloth.train.grpo_config",
        "GRPOTrainer": "unsloth.train.grpo",
        "KTOConfig": "unsloth.train.kto",
        "KTOTrainer": "unsloth.train.kto",
        "ORPOConfig": "unsloth.train.orpo",
        "ORPOTrainer": "unsloth.train.orpo",
        "CPOConfig": "unsloth.train.cpo",
        "CPOTrainer": "unsloth.train.cpo",
        "RewardConfig": "unsloth.train.reward",
        "RewardTrainer": "unsloth.train.reward",
    },
    "transformers": {"TrainingArguments": "unsloth.train.config"},
}

logger = get_logger(__name__)


def bind() -> None:
    """Let the documented names in ``trl`` and ``transformers`` mean our subclasses; does nothing the second time.

    Logs what was bound. Warns if a trainer was imported from ``trl`` before, since that import still means TRL's own.
    """
    if not settings.trl_compatibility() or is_bound():
        return
    early = sorted(name for name in _BOUND["trl"] if name in vars(sys.modules.get("trl", object)))
    for package, names in _BOUND.items():
        for name, module in names.items():
            setattr(importlib.import_module(package), name, getattr(importlib.import_module(module), name))
    bound = " and ".join(f"{', '.join(names)} of {package}" for package, names in _BOUND.items())
    logger.info("%s now mean the classes of unsloth (UNSLOTH_TRL_COMPAT=0 leaves them alone)", bound)
    if early:
        logger.warning(
            "%s was imported from trl before unsloth, and is TRL's own there: import unsloth first, or import it "
            "from unsloth",
            " and ".join(early),
        )


def unbind() -> None:
    """Give the names back to the classes that they had before :func:`bind`; added ones are taken away again."""
    for package, names in _BOUND.items():
        target = importlib.import_module(package)
        for name, module in names.items():
            ours: type = getattr(importlib.import_module(module), name)
            if vars(target).get(name) is not ours:
                continue
            theirs = next((base for base in ours.__mro__[1:] if base.__name__ == name), None)
            if theirs is None:
                delattr(target, name)
            else:
                setattr(target, name, theirs)


def is_bound() -> bool:
    """Whether the names mean our classes at the moment."""
    module = sys.modules.get("unsloth.train.sft")
    return module is not None and vars(sys.modules.get("trl", object)).get("SFTTrainer") is module.SFTTrainer


def PatchDPOTrainer() -> None:  # noqa: N802
    """Accepted for scripts that call it before ``from trl import DPOTrainer``; all it does is :func:`bind`."""
    bind()
    logger.info("PatchDPOTrainer() is not needed any more")


def PatchFastRL(algorithm: str | None = None, FastLanguageModel: type | None = None) -> None:  # noqa: N802, N803
    """Accepted for scripts that call it before they import a trainer; all it does is :func:`bind`.

    Args:
        algorithm: Accepted, such as ``"GRPO"``.
        FastLanguageModel: Accepted.
    """
    bind()
    logger.info("PatchFastRL() is not needed any more")
