"""Code that a repository brings along: never run unless ``trust_remote_code=True`` is passed."""

from __future__ import annotations

from pathlib import Path

from transformers import PretrainedConfig

from unsloth.core.errors import CheckpointError, ConfigError, ModelError, UnslothError
from unsloth.core.log import get_logger
from unsloth.models import weight_files

logger = get_logger(__name__)


def explain(name: str, folder: str, error: Exception) -> UnslothError:
    """Why a model could not be read: it needs code of its own, transformers does not know it, or it is damaged."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "trust_remote_code" in str(error):
        return ConfigError(
            f"'{name}' needs code of its own, which is not run ({', '.join(_files(folder)) or folder})",
            do="Read those files; if you trust whoever wrote them, pass trust_remote_code=True.",
        )
    if "does not recognize this architecture" in str(error):
        return ModelError(f"'{name}': {reason}", do="Upgrade transformers, or choose another model.")
    return CheckpointError(f"'{name}' cannot be read: {reason}", do="Check that folder; copy or download it again.")


def check_implementations(config: PretrainedConfig, attn_implementation: str | None, trust_remote_code: bool) -> None:
    """Refuse, or forget, an attention or expert implementation that would be downloaded as a kernel.

    Raises:
        ConfigError: The argument names one, without ``trust_remote_code=True``.
    """
    if trust_remote_code:
        return
    if attn_implementation is not None and "/" in attn_implementation:
        raise ConfigError(
            "attn_implementation names a repository, whose code would be run",
            got=attn_implementation,
            do='Use "sdpa", "eager" or "flash_attention_2"; or pass trust_remote_code=True if you trust it.',
        )
    for part in (config, *(getattr(config, key) for key in config.sub_configs)):
        for key in ("_attn_implementation", "_experts_implementation"):
            value = getattr(part, f"{key}_internal", None)
            if value is not None:
                logger.warning("config.json asks for %s=%r, which is ignored", key, value)
                setattr(part, f"{key}_internal", None)


def _files(folder: str) -> list[str]:
    """The Python files that the configurations in ``folder`` refer to."""
    found: set[str] = set()
    for name in ("config.json", "tokenizer_config.json"):
        path = Path(folder) / name
        auto_map = weight_files.read_json(path).get("auto_map") if path.is_file() else None
        for value in auto_map.values() if isinstance(auto_map, dict) else ():
            for reference in value if isinstance(value, list) else [value]:
                if isinstance(reference, str):
                    found.add(f"{reference.rpartition('.')[0]}.py")
    return sorted(found)
