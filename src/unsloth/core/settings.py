"""The only reader of the environment.

Settings are read when they are used, never at import, because users set some of them after importing us.
"""

from __future__ import annotations

import os
from pathlib import Path

_FALSE = {"", "0", "false", "no", "off"}


def flag(name: str, default: bool = False) -> bool:
    """Whether the environment variable ``name`` is switched on (anything but empty, 0, false, no, off)."""
    value = os.environ.get(name)
    return default if value is None else value.strip().lower() not in _FALSE


def allow_uninitialized_weights() -> bool:
    """``UNSLOTH_WARN_UNINITIALIZED=0`` lets a model load although its files lack some of its tensors."""
    return not flag("UNSLOTH_WARN_UNINITIALIZED", default=True)


def read_ahead() -> bool:
    """``UNSLOTH_READ_AHEAD=0`` leaves reading weights for a GPU to transformers."""
    return flag("UNSLOTH_READ_AHEAD", default=True)


def trl_compatibility() -> bool:
    """``UNSLOTH_TRL_COMPAT=0`` leaves the names of ``trl`` and ``transformers`` alone (see ``unsloth.compat``)."""
    return flag("UNSLOTH_TRL_COMPAT", default=True)


def force_float32() -> bool:
    """``UNSLOTH_FORCE_FLOAT32=1`` computes in float32 where float16 would be chosen, for lack of bfloat16."""
    return flag("UNSLOTH_FORCE_FLOAT32")


def verbose_logging() -> bool:
    """``UNSLOTH_ENABLE_LOGGING=1`` also logs what is normally too detailed to show."""
    return flag("UNSLOTH_ENABLE_LOGGING")


def disable_fast_generation() -> bool:
    """``UNSLOTH_DISABLE_FAST_GENERATION=1`` leaves ``model.generate`` to transformers."""
    return flag("UNSLOTH_DISABLE_FAST_GENERATION")


def standby() -> bool:
    """``UNSLOTH_VLLM_STANDBY=1`` gives the memory of the engine's cache back while nothing is generated."""
    return flag("UNSLOTH_VLLM_STANDBY")


def return_logits() -> bool:
    """``UNSLOTH_RETURN_LOGITS=1`` makes a forward with labels compute the logits beside the loss."""
    return flag("UNSLOTH_RETURN_LOGITS")


def api_key() -> str | None:
    """``UNSLOTH_API_KEY`` is what requests to ``unsloth serve`` must carry."""
    return os.environ.get("UNSLOTH_API_KEY") or None


def cache_folder() -> Path:
    """Where converted models are kept: ``UNSLOTH_CACHE``, else the user's cache folder."""
    explicit = os.environ.get("UNSLOTH_CACHE")
    if explicit:
        return Path(explicit).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "unsloth"


def offline() -> bool:
    """Whether the Hugging Face libraries were told to stay off the network."""
    return flag("HF_HUB_OFFLINE") or flag("TRANSFORMERS_OFFLINE")


def loader_environment() -> dict[str, str]:
    """The one variable that some installations of Python need to start at all: where their shared libraries are."""
    value = os.environ.get("LD_LIBRARY_PATH")
    return {"LD_LIBRARY_PATH": value} if value else {}


def prefer_stable_downloads() -> None:
    """With ``UNSLOTH_STABLE_DOWNLOADS=1``, tell huggingface_hub to download without parallel transfers.

    It reads its own switch once, when it is imported; so this is called before anything of ours imports it.
    """
    if flag("UNSLOTH_STABLE_DOWNLOADS"):
        os.environ["HF_HUB_DISABLE_XET"] = "1"


def share_processors_politely() -> None:
    """Let OpenMP's idle threads sleep instead of spin, unless the user chose otherwise.

    For programs of our own, before torch is loaded. Spinning threads slow a training step several times over as
    soon as another process wants the same processors.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
