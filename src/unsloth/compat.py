"""The one place that changes names of other packages: documented scripts import trainers from ``trl``.

``from trl import SFTTrainer`` after ``from unsloth import FastLanguageModel`` gives this library's subclass, which
takes the arguments of such scripts; so does ``from transformers import TrainingArguments``. Nothing but these names
is rebound: the classes themselves stay as they are, in their own modules. ``UNSLOTH_TRL_COMPAT=0`` leaves all of it
alone, and ``from unsloth import SFTTrainer`` never needs it.
"""

from __future__ import annotations

import importlib
import sys

from unsloth.core import settings
from unsloth.core.log import get_logger

# package: {name in it: the module of this library that has our class of that name}
_BOUND = {
    "trl": {"SFTConfig": "unsloth.train.config", "SFTTrainer": "unsloth.train.sft"},
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
    bound = ", ".join(f"{package}.{name}" for package, names in _BOUND.items() for name in names)
    logger.info("%s now mean the classes of unsloth (UNSLOTH_TRL_COMPAT=0 leaves them alone)", bound)
    if early:
        logger.warning(
            "%s was imported from trl before unsloth, and is TRL's own there: import unsloth first, or import it "
            "from unsloth",
            " and ".join(early),
        )


def unbind() -> None:
    """Give the names back to the classes that they had before :func:`bind`."""
    for package, names in _BOUND.items():
        target = importlib.import_module(package)
        for name, module in names.items():
            ours: type = getattr(importlib.import_module(module), name)
            if vars(target).get(name) is ours:
                setattr(target, name, next(base for base in ours.__mro__[1:] if base.__name__ == name))


def is_bound() -> bool:
    """Whether the names mean our classes at the moment."""
    module = sys.modules.get("unsloth.train.sft")
    return module is not None and vars(sys.modules.get("trl", object)).get("SFTTrainer") is module.SFTTrainer
