"""The methods of a model that write GGUF files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MethodType
from typing import Any

from transformers import PreTrainedTokenizerBase

from unsloth.core.errors import ConfigError
from unsloth.export import calibration, imatrix, merge, upload
from unsloth.export.calibration import Source
from unsloth.export.gguf import convert, save


def attach(model: Any) -> None:
    """Give this one model the methods; no class is changed."""
    model.save_pretrained_gguf = MethodType(save_pretrained_gguf, model)
    model.push_to_hub_gguf = MethodType(push_to_hub_gguf, model)
    model.save_imatrix = MethodType(save_imatrix, model)


def save_pretrained_gguf(
    self: Any,
    save_directory: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    quantization_method: str | Sequence[str] = "fast_quantized",
    *,
    first_conversion: str | None = None,
    imatrix_file: str | os.PathLike[str] | None = None,
    calibration_data: Source | None = None,
    calibration_tokens: int = 16_384,
    pre_tokenizer: str | None = None,
    max_shard_size: int | str | None = None,
    maximum_memory_usage: float = 0.75,
    verify: bool = True,
    save_method: str = "merged",
    adapters: str | Sequence[str] | Mapping[str, float] | None = None,
    adapter_scale: float = 1.0,
    base_weight: float = 0.0,
    push_to_hub: bool = False,
    token: str | bool | None = None,
    private: bool | None = None,
) -> str:
    """Save the model as GGUF, for llama.cpp, Ollama and what is built on them, with the adapter merged in.

    The weights are merged and converted once; every method is quantized from that. Each file is reopened, its
    tensors and tokenizer are compared with the model's, and where llama.cpp is installed (extra ``gguf-run``) it
    loads the file and its tokens and logits are compared, before the folder gets its name. What was found is logged
    and stands in ``manifest.json``. Other files in the folder are kept.

    Args:
        self: The model.
        save_directory: Folder to write.
        tokenizer: Of the model.
        quantization_method: A name or several: ``"q4_k_m"``, ``"q8_0"``, ``"f16"``, ``"not_quantized"`` and so on;
            ``"dynamic_q4_k_xl"`` (or ``"UD-Q4_K_XL"``) chooses each tensor's type by measurement.
        first_conversion: Type of the weights before they are quantized: ``"bf16"``, ``"f16"`` or ``"f32"``; None
            takes the model's own.
        imatrix_file: An importance matrix in one of llama.cpp's formats, made from this model.
        calibration_data: Rows like those the model was trained on, or a file of them, from which an importance matrix
            is made. Without either, methods that need one get one made from the rows that the model was trained on in
            this process, or else from conversations that ship with the library.
        calibration_tokens: The most tokens to take of them.
        pre_tokenizer: llama.cpp's name of the way in which the tokenizer cuts words, where it is not found.
        max_shard_size: Largest file, such as ``"4GB"``; None writes one file a method.
        maximum_memory_usage: Share of the free memory that llama.cpp may take.
        verify: Whether llama.cpp runs the files, where it is installed.
        save_method: ``"merged"``, or ``"lora"`` for the adapter alone, to be loaded beside a file of the base model;
            ``quantization_method`` is then ``"f16"``, ``"f32"`` or ``"bf16"``, and several adapters become one.
        adapters: Names of the adapters to merge, or their weights by name; None takes the active ones.
        adapter_scale: Factor on ``lora_alpha``; 0.5 halves what the adapter changes.
        base_weight: Share of the base model in an average of the weights; 0.5 is the mean of base and trained model.
        push_to_hub: Whether to upload the folder afterwards, to the repository of the folder's name.
        token: Hub token; None takes the one of ``hf auth login``.
        private: Visibility of a repository that is made by this; None makes it private.

    Returns:
        The text of the Modelfile, which also stands in the folder and on ``tokenizer._ollama_modelfile``; empty for
        an adapter.

    Raises:
        ConfigError: An unknown method, or a value out of range.
        AdapterError: The model has no such adapter.
        ExportError: Something that llama.cpp cannot read, or a file that is not the model.
        TokenizerError: A tokenizer that llama.cpp does not have, or that cuts texts differently there.
        StorageError: The disk is full.
    """
    if tokenizer is None:
        raise ConfigError(
            "a GGUF file holds the tokenizer", got=None, do="Pass it: save_pretrained_gguf(folder, tokenizer, ...)."
        )
    options = save.Options(
        methods=[quantization_method] if isinstance(quantization_method, str) else list(quantization_method),
        first_conversion=first_conversion,
        imatrix_file=imatrix_file,
        calibration_data=calibration_data,
        calibration_tokens=calibration_tokens,
        pre_tokenizer=pre_tokenizer,
        max_shard_size=max_shard_size,
        maximum_memory_usage=maximum_memory_usage,
        verify=verify,
        merge=merge.MergeOptions(merge.weights(adapters), adapter_scale, base_weight),
    )
    if save_method not in ("merged", "lora"):
        raise ConfigError('save_method is "merged" or "lora"', got=save_method)
    repository = upload.prepare(Path(save_directory).name, token, private) if push_to_hub else None
    text = ""
    if save_method == "lora":
        save.save_adapter(self, save_directory, tokenizer, options)
    else:
        text = save.save(self, save_directory, tokenizer, options)[1]
    if repository is not None:
        upload.upload(Path(save_directory), repository)
    return text


def push_to_hub_gguf(
    self: Any,
    repo_id: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    quantization_method: str | Sequence[str] = "fast_quantized",
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    commit_message: str | None = None,
    save_directory: str | os.PathLike[str] | None = None,
    **options: Any,
) -> str:
    """Save as :func:`save_pretrained_gguf` does, and upload the folder.

    The token is tried before anything is computed. An upload that was cut goes on where it was when the same call is
    made again.

    Args:
        self: The model.
        repo_id: ``"name"`` or ``"owner/name"``; made if there is no such repository.
        tokenizer: Of the model.
        quantization_method: A name or several.
        token: Hub token; None takes the one of ``hf auth login``.
        private: Visibility of a repository that is made by this; None makes it private.
        commit_message: Of the one commit that adds all files.
        save_directory: Folder for the local copy; None takes the repository's name, in the current folder.
        **options: As in :func:`save_pretrained_gguf`.

    Returns:
        The repository's address.

    Raises:
        UploadError: The hub refused it or could not be reached; the message says where the local copy is.
        UnslothError: As :func:`save_pretrained_gguf`.
    """
    repository = upload.prepare(repo_id, token, private)
    folder = Path(save_directory or upload.folder_name(repo_id))
    save_pretrained_gguf(self, folder, tokenizer, quantization_method, **options)
    return upload.upload(folder, repository, commit_message)


def save_imatrix(
    self: Any,
    path: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase,
    data: Source | None = None,
    *,
    tokens: int = 16_384,
) -> None:
    """Measure which inputs of the model's matrices are large, for quantizers that ask for an importance matrix.

    May be called in the middle of a training run, which goes on as if nothing had been.

    Args:
        self: The model.
        path: The file to write: ``.gguf``, or ``.dat`` for llama.cpp's older format.
        tokenizer: Of the model.
        data: Rows in any layout that can be trained on, such as ``trainer.train_dataset``, or a file of them; None
            takes the rows that the model was trained on in this process, or else conversations that ship with the
            library.
        tokens: The most tokens to take of them.

    Raises:
        ConfigError: Another suffix.
        DataError: No rows, or rows that cannot be used.
        ExportError: An architecture that llama.cpp does not have, or a layer that was never called.
        StorageError: The disk is full, or the folder cannot be written.
    """
    imatrix.check_suffix(path)
    conversion = convert.plan(self, tokenizer)
    text = calibration.of_model(self, data, tokenizer, tokens=tokens)
    imatrix.write(imatrix.measure(self, conversion, text), path)
