"""GGUF files as a training base: converted once into an ordinary model folder."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unsloth.core import artifact, settings
from unsloth.core.errors import CheckpointError, ConfigError, ModelError, ModelNotFoundError
from unsloth.core.log import get_logger
from unsloth.models import gguf_header

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MAGIC = gguf_header.MAGIC
_PATIENCE = 10  # seconds for the child process, which may compute for half of them
_SPECIAL = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token"}
_UNREADABLE = (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, OSError, EOFError)

logger = get_logger(__name__)


def converted(folder: Path, gguf_file: str) -> Path:
    """The model in ``folder / gguf_file`` as a folder of the cache, in bfloat16; converted if it is not there.

    The cache knows a file by its path, size and time of change.

    Raises:
        ModelNotFoundError: No such file.
        ConfigError: ``gguf_file`` is not a name below the folder.
        CheckpointError: Not a GGUF file, or a damaged one.
        ModelError: A model architecture that transformers does not read from GGUF.
    """
    if not isinstance(gguf_file, str) or Path(gguf_file).is_absolute() or ".." in Path(gguf_file).parts:
        raise ConfigError("gguf_file must be the name of a file in the model's folder", got=gguf_file)
    file = folder / gguf_file
    if not file.is_file():
        there = sorted(path.name for path in folder.glob("*.gguf"))
        raise ModelNotFoundError(
            "no such GGUF file",
            got=file,
            do=f"There are: {', '.join(there[:5])}." if there else "The folder holds no GGUF file.",
        )
    with file.open("rb") as opened:
        magic = opened.read(len(_MAGIC))
    if magic != _MAGIC:
        raise CheckpointError(f"{file} is not a GGUF file ({file.stat().st_size:,} bytes)", do="Copy it again.")
    inspect(file)
    state = file.stat()
    key = hashlib.sha256(f"{file.resolve()}|{state.st_size}|{state.st_mtime_ns}".encode()).hexdigest()[:16]
    target = settings.cache_folder() / "gguf" / f"{file.stem}-{key}"
    if not (target / artifact.MANIFEST).is_file():
        logger.info("converting %s once into %s", file, target)
        convert(file, target, kind="gguf_model")
    return target


def inspect(file: Path) -> dict[str, Any]:
    """Read the header of a file from anywhere, in a child process with limits on time and memory.

    Returns:
        ``architecture``, number of ``tensors``, and their ``types``.

    Raises:
        CheckpointError: The header cannot be true, or the file is cut short.
    """
    # Isolated from everything installed: the script needs the standard library alone.
    command = [sys.executable, "-I", "-S", str(Path(gguf_header.__file__)), str(file)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=False)
        found: dict[str, Any] = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        found = {"wrong": f"reading its header takes more than {_PATIENCE} seconds"}
    except json.JSONDecodeError:
        found = {"wrong": "reading its header takes too much time or memory"}
    if "wrong" in found:
        raise CheckpointError(f"{file.name} is damaged, or not a true GGUF file: {found['wrong']}", do="Copy it again.")
    return found


def convert(file: Path, target: Path, *, kind: str) -> None:
    """Write the model and tokenizer of a GGUF file to ``target``, dequantized to bfloat16.

    Args:
        file: The GGUF file.
        target: Folder to write.
        kind: For the manifest.

    Raises:
        CheckpointError: The file is damaged.
        ModelError: Its architecture, or a tensor type in it, is not readable.
        StorageError: The disk is full.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # Loaded from a folder that holds this file alone, so that nothing beside it is picked up.
    with artifact.stage(target, kind=kind, details={"source": file.name}) as staging:
        alone = staging / "gguf"
        alone.mkdir()
        (alone / file.name).symlink_to(file.resolve())
        try:
            model = AutoModelForCausalLM.from_pretrained(
                alone, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
            )
            tokenizer = AutoTokenizer.from_pretrained(alone, gguf_file=file.name)
            _take_special_tokens(tokenizer, file)
        except _UNREADABLE as error:
            raise _explained(file, error) from error
        model.config._name_or_path = ""
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        (alone / file.name).unlink()
        alone.rmdir()


def _take_special_tokens(tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    """Set the special tokens and the chat template that the file names; not every version of transformers does."""
    metadata = gguf_header.read(file).metadata
    for key, attribute in _SPECIAL.items():
        number = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(number, int):
            setattr(tokenizer, attribute, tokenizer.convert_ids_to_tokens(number))
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str) and not tokenizer.chat_template:
        tokenizer.chat_template = template


def _explained(file: Path, error: Exception) -> ModelError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "architecture" in reason or isinstance(error, NotImplementedError):
        return ModelError(
            f"{file.name} cannot be trained from GGUF: {reason}",
            do="Name the original model (safetensors) instead.",
        )
    return CheckpointError(f"{file} cannot be read: {reason}", do="Copy or download it again.")
