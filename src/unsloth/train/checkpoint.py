"""Writing one checkpoint: the model, the states of the run, and a manifest, as a folder that is whole or absent."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft import PeftModel
from transformers import PreTrainedModel, TrainerState

from unsloth.core import artifact
from unsloth.core.errors import TrainingError
from unsloth.models import adapter_base
from unsloth.train import discovery, states
from unsloth.train.differences import Identity

_SLACK = 2**20  # bytes for configurations, the manifest and the tokenizer


def path_of(output_dir: Path, step: int) -> Path:
    """The folder of the checkpoint made after ``step`` steps."""
    return output_dir / f"{discovery.PREFIX}{step}"


def commit(
    output_dir: Path,
    model: torch.nn.Module,
    companions: Iterable[Any],
    progress: TrainerState,
    run_states: Mapping[str, Any],
    identity: Identity,
) -> Path:
    """Write ``checkpoint-STEP`` in one step: stage, sync, hash, rename.

    A folder of that name is replaced, whatever is in it: it was left by a run that this one supersedes, or was
    found damaged.

    Args:
        output_dir: The run's folder.
        model: With an adapter, only the adapter is written; the manifest says on which base it belongs.
        companions: Things with a ``save_pretrained`` of their own: tokenizer or processor.
        progress: The trainer's state, which names the step.
        run_states: The states of optimizer, schedule, random generators and so on, by name.
        identity: What a resuming run is compared with.

    Returns:
        The folder.

    Raises:
        TrainingError: A weight is not finite. Nothing was written.
        StorageError: The disk is full or cannot be written to. Nothing was changed.
    """
    path = path_of(output_dir, progress.global_step)
    if path.is_symlink():
        path.unlink()
    details = {
        "step": progress.global_step,
        "epoch": progress.epoch,
        "serial": discovery.next_serial(output_dir),
        "states": sorted(run_states),
        **identity.details(),
    }
    needed = weight_bytes(model) + states.size(run_states) + _SLACK
    with (
        artifact.stage(
            path, kind=discovery.KIND, details=details, existing="overwrite", needed_bytes=needed
        ) as staging,
        artifact.utf8_path(staging) as folder,
    ):
        write_model(model, companions, folder)
        for name, state in run_states.items():
            states.write(state, folder, name)
        progress.save_to_json(os.fspath(folder / discovery.TRAINER_STATE))
    return path


def write_model(model: torch.nn.Module, companions: Iterable[Any], folder: Path) -> None:
    """Write the weights that PEFT or transformers would save, as they would, and never a pickle file.

    Raises:
        TrainingError: A trainable weight is not finite.
    """
    broken = first_not_finite(model)
    if broken is not None:
        raise TrainingError(f"the weights are not finite any more ({broken}), and were not saved")
    if isinstance(model, PreTrainedModel | PeftModel):
        # The class's own method: the model's may stage a folder itself.
        type(model).save_pretrained(model, os.fspath(folder))
        if isinstance(model, PeftModel):
            adapter_base.write(folder, model)
    else:
        tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for companion in companions:
        companion.save_pretrained(os.fspath(folder))


@torch.no_grad()
def first_not_finite(model: torch.nn.Module) -> str | None:
    """The name of a trainable weight with NaN or infinity in it, if there is one."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trained:
        return None
    finite = torch.stack([torch.isfinite(parameter).all().cpu() for _, parameter in trained])
    return None if finite.all() else trained[int(finite.int().argmin())][0]


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of the weights that a checkpoint of this model holds."""
    whole = not isinstance(model, PeftModel)
    return sum(p.numel() * p.element_size() for p in model.parameters() if whole or p.requires_grad)


def estimated_bytes(model: torch.nn.Module, with_states: bool) -> int:
    """Size of a checkpoint before there is an optimizer: its weights, and two moments of them in float32."""
    moments = sum(p.numel() * 8 for p in model.parameters() if p.requires_grad) if with_states else 0
    return weight_bytes(model) + moments + _SLACK
