"""Turn pickled PyTorch weights into safetensors without running code: ``python -m unsloth.models.unpickle``.

torch's restricted unpickler builds tensors and plain containers only, and refuses everything else.
"""

from __future__ import annotations

import pickle
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from unsloth.core import artifact
from unsloth.core.errors import CheckpointError, UnslothError
from unsloth.core.log import get_logger
from unsloth.models import weight_files

_NEVER_COPIED = (".bin", ".pt", ".pth", ".pkl", ".py", ".index.json")

logger = get_logger(__name__)


def convert(source: str | Path, target: str | Path) -> Path:
    """Write the folder ``source``, with its pickled weights as one safetensors file, to ``target``.

    Works for model folders (``pytorch_model*.bin``) and adapters (``adapter_model.bin``). Code in the folder and
    files of a training run are left out.

    Raises:
        CheckpointError: No weights, or a file that holds anything but tensors.
        StorageError: The target cannot be written.
    """
    folder = Path(source).expanduser()
    adapter = folder / "adapter_model.bin"
    files = [adapter] if adapter.is_file() else sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise CheckpointError("no pytorch_model.bin or adapter_model.bin", got=folder)
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        tensors.update(_read(file))
    name = "adapter_model.safetensors" if adapter.is_file() else weight_files.SINGLE
    with artifact.stage(target, kind="unpickled", details={"source": folder.name}) as staging:
        for path in sorted(folder.iterdir()):
            if path.is_file() and not path.name.endswith(_NEVER_COPIED):
                shutil.copyfile(path, staging / path.name)
        save_file(tensors, staging / name, metadata={"format": "pt"})
    logger.info("converted %d tensors of %s into %s", len(tensors), folder, target)
    return Path(target)


def _read(file: Path) -> dict[str, torch.Tensor]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError) as error:
        raise CheckpointError(
            f"{file} holds more than tensors, or is damaged; nothing in it was run",
            do="Get the weights as safetensors from whoever published them.",
        ) from error
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise CheckpointError(f"{file} is not a table of tensors", got=type(content).__name__)
    # Copies: tied weights share memory, which safetensors does not allow.
    return {str(name): value.clone().contiguous() for name, value in content.items()}


def main(arguments: list[str]) -> int:
    """Convert ``arguments[0]`` into ``arguments[1]``; the exit code is 0 on success, else 1 or 2."""
    if len(arguments) != 2:
        logger.error("usage: python -m unsloth.models.unpickle FOLDER NEW_FOLDER")
        return 2
    try:
        convert(arguments[0], arguments[1])
    except UnslothError as error:
        logger.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
