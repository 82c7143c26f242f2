"""Where a model's weights go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from transformers import PreTrainedModel

from unsloth.core import device
from unsloth.core.errors import ConfigError
from unsloth.core.log import get_logger
from unsloth.layers import host_embedding

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


def offload_embedding(model: PreTrainedModel) -> None:
    """Put the input embedding of ``model`` into host memory, if it is not there and can be; say what was done."""
    if model.device.type == "cpu":
        logger.info("offload_embedding: the whole model is in host memory", extra={"once": True})
        return
    reason = host_embedding.move(model)
    if reason is None:
        size = model.get_input_embeddings().weight.nbytes / 2**30
        logger.info("offload_embedding: %.2f GiB of the input embedding are in host memory", size)
    else:
        logger.warning("offload_embedding: the input embedding stays on the GPU: %s", reason)
