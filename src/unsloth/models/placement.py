"""Where a model's weights go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch

from unsloth.core import device
from unsloth.core.errors import ConfigError
from unsloth.core.log import get_logger

DeviceMap: TypeAlias = str | Mapping[str, Any] | torch.device | int | None
_STRATEGIES = ("sequential", "auto", "balanced", "balanced_low_0")

logger = get_logger(__name__)


def validate(device_map: DeviceMap) -> None:
    """Raise :class:`ConfigError` unless ``device_map`` is a strategy, a device, or a mapping to devices."""
    if device_map is None or isinstance(device_map, torch.device | int):
        return
    if isinstance(device_map, Mapping) and device_map:
        return
    if isinstance(device_map, str):
        if device_map in _STRATEGIES or device_map.split(":")[0] in ("cpu", "cuda"):
            return
    raise ConfigError(
        "unknown device_map",
        got=device_map,
        do='Use "sequential" (the default), "balanced", "auto", a device such as "cuda:0", or a mapping.',
    )


def target_device(device_map: DeviceMap) -> torch.device:
    """The device that most of the model's work will be done on."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if isinstance(device_map, torch.device):
        return device_map
    if isinstance(device_map, int):
        return torch.device("cuda", device_map)
    if isinstance(device_map, str) and device_map.split(":")[0] in ("cpu", "cuda"):
        return torch.device(device_map)
    return device.default_device()


def resolved(device_map: DeviceMap) -> Any:
    """``device_map`` for transformers; one device for ``"sequential"``, and the CPU without a GPU."""
    target = target_device(device_map)
    if target.type == "cpu":
        return {"": "cpu"}
    return device_map if isinstance(device_map, Mapping) or device_map in _STRATEGIES[1:] else {"": target}


def check_offloaded_embedding(device_map: DeviceMap) -> None:
    """Say that an embedding asked to be in host memory is there; refuse where it would not be."""
    if target_device(device_map).type == "cpu":
        logger.info("offload_embedding: the whole model is in host memory", extra={"once": True})
        return
    raise ConfigError(
        "offload_embedding is not available on a GPU in this version",
        got=True,
        do="Leave it out. The embedding takes rows * width * 2 bytes, about 1 GB for a model of 8 billion weights.",
    )
