"""From what a user passes as ``resume_from_checkpoint`` to a checkpoint that is whole and fits the model."""

from __future__ import annotations

import pickle
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import peft
import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open

from unsloth.core.errors import CheckpointError
from unsloth.core.log import get_logger
from unsloth.train import discovery
from unsloth.train.differences import STATES

_NEEDED = ("optimizer", "scheduler", "rng")
_FOREIGN = {
    "optimizer": "optimizer.pt",
    "scheduler": "scheduler.pt",
    "rng": "rng_state.pth",
    "scaler": "scaler.pt",
}
_ADAPTER = "adapter_model.safetensors"
_WEIGHTS = ("adapter_model.*", "*/adapter_model.*", "model*.safetensors", "pytorch_model*.bin")

logger = get_logger(__name__)


@dataclass(frozen=True)
class Source:
    """Where a run goes on from.

    Attributes:
        folder: The checkpoint.
        details: What its manifest says; None for a folder that this library did not make.
        states: The states in it that can be used, of ``optimizer``, ``scheduler``, ``rng``, ``scaler``.
        is_run: Whether it knows its step; else it holds weights to start from, and nothing more.
    """

    folder: Path
    details: dict[str, Any] | None
    states: frozenset[str]
    is_run: bool = True


def locate(resume: Literal[True] | str | Path, output_dir: Path, allow: Collection[str]) -> Source | None:
    """Find and verify the checkpoint to resume from.

    Args:
        resume: A folder; or True, for the newest whole checkpoint in ``output_dir``.
        output_dir: The run's folder.
        allow: Names of states that may be missing or damaged.

    Returns:
        The checkpoint; None if there is none to be found, and the run starts at its beginning.

    Raises:
        CheckpointError: The folder named is damaged or lacks a state; or there are checkpoints, all damaged.
    """
    files = {f"{name}{suffix}" for name in STATES if name in allow for suffix in (".json", ".safetensors")}
    if resume is True:
        found = discovery.newest_whole(output_dir, files)
        if found.skipped:
            logger.warning("resuming in %s, ignoring %s", output_dir, "; ".join(found.skipped))
        if found.checkpoint is None:
            if not found.damaged:
                logger.info("no checkpoint in %s yet: starting at the beginning", output_dir)
                return None
            raise CheckpointError(
                f"no checkpoint in {output_dir} is whole: {'; '.join(found.skipped)}",
                do="Name one made by other programs explicitly, or start anew: resume_from_checkpoint=False.",
            )
        folder, details = found.checkpoint.path, found.checkpoint.details
    else:
        folder = Path(resume)
        details = discovery.require_whole(folder, files)
    source = _foreign(folder) if details is None else _own(folder, details)
    missing = [name for name in _NEEDED if source.is_run and name not in source.states and name not in allow]
    if missing:
        names = ", ".join(f'"{name}"' for name in missing)
        raise CheckpointError(
            f"the checkpoint {folder} holds no state of: {', '.join(missing)}",
            do=f"Resume from another one, or start these anew: resume_allow=[{names}].",
        )
    return source


def _own(folder: Path, details: Mapping[str, Any]) -> Source:
    damaged = {problem.split(" ", 1)[0].split(".")[0] for problem in discovery.problems(folder)}
    return Source(folder, dict(details), frozenset(set(details.get("states", ())) - damaged))


def _foreign(folder: Path) -> Source:
    weights = [path for pattern in _WEIGHTS for path in folder.glob(pattern)]
    if all(path.parent.name.startswith(discovery.PREFIX) and path.parent != folder for path in weights):
        raise CheckpointError(
            "there are no weights in this folder",
            got=folder,
            do="Name one of its checkpoint-... folders, or pass resume_from_checkpoint=True for the newest.",
        )
    states = frozenset(name for name, file in _FOREIGN.items() if (folder / file).is_file())
    is_run = (folder / discovery.TRAINER_STATE).is_file()
    what = "" if is_run else "; it knows no step, so training starts at step 0 from its weights"
    logger.warning("%s has no manifest of this library: its files and its run cannot be checked%s", folder, what)
    return Source(folder, None, states, is_run)


def check_fit(folder: Path, model: torch.nn.Module) -> None:
    """Compare the weights in a checkpoint with the trainable weights of the model, by name and shape.

    Raises:
        CheckpointError: They do not fit; names the first that differ.
    """
    saved = _saved_shapes(folder)
    if not saved:
        return  # other formats are checked as they are loaded
    expected = _expected_shapes(model)
    wrong = [
        f"{name} is {_x(saved[name])}, not {_x(shape)}"
        for name, shape in expected.items()
        if saved.get(name, shape) != shape
    ]
    wrong += [f"{name} is missing" for name in expected if name not in saved]
    if isinstance(model, PeftModel):
        wrong += [f"{name} has no place in this model" for name in saved if name not in expected]
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} tensors of {folder} do not fit the model: {'; '.join(wrong[:2])}",
            do="Build the model as in the run that made it (rank r, target_modules, base model).",
        )


def _saved_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    files = [folder / _ADAPTER] if (folder / _ADAPTER).is_file() else sorted(folder.glob("model*.safetensors"))
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise CheckpointError(f"{file} is damaged ({error})") from error
    return shapes


def _expected_shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    if isinstance(model, PeftModel):
        state = peft.get_peft_model_state_dict(model, adapter_name=model.active_adapters[0])
        return {name: tuple(tensor.shape) for name, tensor in state.items()}
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters() if parameter.requires_grad}


def _x(shape: tuple[int, ...]) -> str:
    return "x".join(str(size) for size in shape)


def read_foreign(folder: Path, name: str) -> Any:
    """A state from a pickle file of transformers' own trainer, on the CPU; only plain data is read.

    Raises:
        CheckpointError: The file holds anything else, or is damaged.
    """
    path = folder / _FOREIGN[name]
    plain = [np._core.multiarray._reconstruct, np.ndarray, np.dtype, type(np.dtype(np.uint32))]  # type: ignore[attr-defined]
    try:
        with torch.serialization.safe_globals(plain):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise pickle_refused(path) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({str(error).splitlines()[0]})") from error


def pickle_refused(path: Path) -> CheckpointError:
    """The error for a pickle file that holds more than plain data."""
    return CheckpointError(
        f"{path} is a pickle file that holds more than plain data, and was not opened: it could run any code",
        do="Resume from a folder that holds only the weights, as adapter_model.safetensors or model.safetensors.",
    )
