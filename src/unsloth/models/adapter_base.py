"""What an adapter folder says of the model it was trained on, beside PEFT's own file: ``unsloth_base.json``."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from unsloth.core.errors import CheckpointError
from unsloth.models import record, weight_files
from unsloth.models.identity import Identity
from unsloth.models.rope import Scaling

NAME = "unsloth_base.json"
_FORMAT = 1


@dataclass(frozen=True)
class AdapterBase:
    """The base of a saved adapter.

    Attributes:
        base_revision: The hub revision of the base that was asked for, if any.
        rope: The scaling of the positions that it was trained with, where it is not the base's own.
        identity: What the base is recognized by.
    """

    base_revision: str | None
    rope: Scaling | None
    identity: Identity | None


def write(folder: Path, model: torch.nn.Module) -> None:
    """Write the file for an adapter on ``model``; nothing for a model that this library did not load."""
    loaded = record.find(model)
    if loaded is None:
        return
    content = {
        "format": _FORMAT,
        "base": loaded.base_name,
        "base_revision": loaded.base_revision,
        "max_seq_length": loaded.max_seq_length,
        "rope": None if loaded.rope is None else asdict(loaded.rope),
        "identity": None if loaded.identity is None else asdict(loaded.identity),
    }
    (folder / NAME).write_text(json.dumps(content) + "\n")


def read(folder: Path) -> AdapterBase | None:
    """Read the file; None if the adapter has none, as one that plain PEFT wrote.

    Raises:
        CheckpointError: The file is damaged.
    """
    path = folder / NAME
    if not path.is_file():
        return None
    content = weight_files.read_json(path)
    try:
        rope, weights = content["rope"], content["identity"]
        return AdapterBase(
            base_revision=content["base_revision"],
            rope=None if rope is None else Scaling(**rope),
            identity=None if weights is None else Identity.from_json(weights),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged", do="Copy the adapter again; without that file, only shapes are checked."
        ) from error
