"""Saving a model as GGUF: one conversion, any number of files from it, each proven before the folder gets its name."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType as Type
from transformers import PreTrainedTokenizerBase

from unsloth.core import artifact, device
from unsloth.core.errors import ConfigError
from unsloth.core.log import get_logger
from unsloth.export import dynamic, ollama, verify
from unsloth.export.calibration import Source
from unsloth.export.card import public_name
from unsloth.export.gguf import card, check, convert, lora, methods, quantize, runtime
from unsloth.export.gguf.check import Proof, Reference
from unsloth.export.gguf.convert import Conversion
from unsloth.export.gguf.file import Planned, Reader
from unsloth.export.gguf.importance import Importance
from unsloth.export.gguf.metadata import Metadata
from unsloth.export.gguf.methods import Method
from unsloth.export.merge import UNCHANGED, MergeOptions
from unsloth.export.merged_folder import describe
from unsloth.models.record import transformers_model

KIND = "gguf"
"""What the manifest calls such a folder."""

_UNITS = {"KB": 1000, "MB": 1000**2, "GB": 1000**3, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}

logger = get_logger(__name__)


@dataclass(frozen=True)
class Options:
    """How a model is saved as GGUF.

    Attributes:
        methods: Names of quantization methods; a file each.
        first_conversion: ``"f32"``, ``"f16"`` or ``"bf16"``; None takes the model's own dtype.
        imatrix_file: An importance matrix, in one of llama.cpp's formats.
        calibration_data: Rows, or a file of them, on which an importance matrix is measured instead.
        calibration_tokens: The most tokens to measure on.
        pre_tokenizer: llama.cpp's name of the way in which the tokenizer cuts words, where it is not found.
        max_shard_size: Largest file in bytes or as ``"4GB"``; None for one file a method.
        maximum_memory_usage: Share of the free memory that llama.cpp may take for the comparison.
        verify: Whether llama.cpp runs the files, where it is installed; the files are reopened and compared anyway.
        types: Types of single tensors by their names in the file, before the method's own.
        merge: Which adapters are merged, and how much of them.
    """

    methods: Sequence[str]
    first_conversion: str | None = None
    imatrix_file: str | os.PathLike[str] | None = None
    calibration_data: Source | None = None
    calibration_tokens: int = 16_384
    pre_tokenizer: str | None = None
    max_shard_size: int | str | None = None
    maximum_memory_usage: float = 0.75
    verify: bool = True
    types: Mapping[str, Type] | None = None
    merge: MergeOptions = UNCHANGED

    def __post_init__(self) -> None:
        if not self.methods:
            raise ConfigError("no quantization_method", got=self.methods, do='Name one, such as "q4_k_m".')
        if not 0 < self.maximum_memory_usage <= 1:
            raise ConfigError("maximum_memory_usage is a share between 0 and 1", got=self.maximum_memory_usage)
        shard_bytes(self.max_shard_size)


@dataclass(frozen=True)
class Saved:
    """One quantization that was written.

    Attributes:
        method: Its name.
        files: In the folder; several if it was split.
        proof: What was checked.
    """

    method: str
    files: tuple[str, ...]
    proof: Proof


def save(
    model: Any, folder: str | os.PathLike[str], tokenizer: PreTrainedTokenizerBase, options: Options
) -> tuple[list[Saved], str]:
    """Write the files and the Modelfile of the first of them.

    Files of other methods that are in the folder already stay.

    Args:
        model: With or without adapters, which are merged.
        folder: To write.
        tokenizer: Of the model.
        options: What is wanted.

    Returns:
        What was written, and the text of the Modelfile.

    Raises:
        ConfigError: An unknown method.
        ExportError: Something that llama.cpp cannot read, or a file that is not the model. The folder is as it was.
        TokenizerError: Likewise, of the tokenizer.
        StorageError: The disk is full.
    """
    conversion = _conversion(model, tokenizer, options)
    wanted = wanted_methods(options.methods, conversion.dtype)
    importance = _importance(options, conversion, tokenizer, wanted)
    jobs = [replace(importance.job(method), types=options.types) for method in wanted]
    plans = [_plan(job, conversion, importance) for job in jobs]
    needed = conversion.size + sum(tensor.size for planned, _ in plans for tensor in planned)
    inner = transformers_model(model)
    name = _file_name(Path(inner.config._name_or_path or "model").name)
    ends = convert.ends_of(inner, tokenizer)
    base, is_public = public_name(inner.config._name_or_path or "model")
    made_of = describe(model, options.merge)
    details: dict[str, Any] = {"base": base, "files": _earlier(Path(folder))}
    if importance.source is not None:
        details["importance"] = importance.source
    saved = []
    with artifact.stage(folder, kind=KIND, details=details, existing="extend", needed_bytes=needed) as staging:
        judge = _Judge(conversion, tokenizer, ends, options)
        source_path = staging / ".conversion" / "model.gguf"
        source_path.parent.mkdir()
        conversion.write(source_path)
        judge.see_conversion(source_path)
        for job, (planned, replaced) in zip(jobs, plans, strict=True):
            if job.method.measured:
                job = importance.chosen(job, Reader(source_path))
                planned, replaced = _fixed(job, conversion)
            target = staging / f"{name}.{job.method.name.upper()}.gguf"
            paths = quantize.write(Reader(source_path), target, planned, job, shard_bytes(options.max_shard_size))
            proof = judge.prove(source_path, paths, job, planned, replaced)
            saved.append(Saved(job.method.name, tuple(path.name for path in paths), proof))
            report = {"method": job.method.name, **_merged(made_of), **proof.as_json()}
            details["files"] |= {path.name: report for path in paths}
        shutil.rmtree(source_path.parent)
        stops = [text for text in tokenizer.convert_ids_to_tokens(ends) if isinstance(text, str)]
        modelfile = ollama.modelfile(tokenizer, saved[0].files[0], stops)
        (staging / "Modelfile").write_text(modelfile, encoding="utf-8")
        _write_card(Path(folder), staging, is_public, model, made_of, details["files"])
    for each in saved:
        logger.info("saved %s: %s", Path(folder) / each.files[0], each.proof)
    return saved, modelfile


def save_adapter(
    model: Any, folder: str | os.PathLike[str], tokenizer: PreTrainedTokenizerBase, options: Options
) -> list[Saved]:
    """Write the adapter alone, to be loaded beside a file of the base model.

    Where llama.cpp is installed, it runs a file of the base model, made for the purpose, with the adapter.

    Raises:
        AdapterError: There is no adapter, or it holds something else than LoRA on linear layers.
        ExportError: The base model's family has no rule, or the adapter is not the model's.
        StorageError: The disk is full.
    """
    conversion = _conversion(model, tokenizer, options)
    inner = transformers_model(model)
    name = _file_name(Path(inner.config._name_or_path or "model").name)
    plans = [
        (method, *lora.plan(model, conversion, method)) for method in wanted_methods(options.methods, conversion.dtype)
    ]
    base, is_public = public_name(inner.config._name_or_path or "model")
    made_of = describe(model, options.merge)
    details: dict[str, Any] = {"base": base, "files": _earlier(Path(folder))}
    needed = conversion.size + sum(tensor.size for _, _, planned in plans for tensor in planned)
    saved = []
    with artifact.stage(folder, kind=KIND, details=details, existing="extend", needed_bytes=needed) as staging:
        judge = _Judge(conversion, tokenizer, convert.ends_of(inner, tokenizer), options)
        beside = staging / ".conversion" / "model.gguf"
        beside.parent.mkdir()
        if judge.runs:
            lora.base_of(conversion).write(beside)
        for method, made, planned in plans:
            path = staging / f"{name}.lora.{method.name.upper()}.gguf"
            lora.write(model, conversion, path, made, planned)
            proof = judge.prove_adapter(beside, path, made, planned)
            saved.append(Saved(method.name, (path.name,), proof))
            details["files"][path.name] = {"method": f"lora {method.name}", **_merged(made_of), **proof.as_json()}
        shutil.rmtree(beside.parent)
        _write_card(Path(folder), staging, is_public, model, made_of, details["files"])
    for each in saved:
        logger.info("saved %s: %s", Path(folder) / each.files[0], each.proof)
    return saved


def _conversion(model: Any, tokenizer: PreTrainedTokenizerBase, options: Options) -> Conversion:
    return convert.plan(
        model, tokenizer, options.first_conversion, pre_tokenizer=options.pre_tokenizer, options=options.merge
    )


def wanted_methods(names: Sequence[str], first_conversion: str) -> list[Method]:
    """The methods of some names, plain and dynamic; raises :class:`ConfigError` for a name that there is not."""
    found = [dynamic.find(name) or methods.find(name, first_conversion) for name in names]
    return list({method.name: method for method in found}.values())


def _importance(
    options: Options, conversion: Conversion, tokenizer: PreTrainedTokenizerBase, wanted: Sequence[Method]
) -> Importance:
    for method in wanted:  # what is missing is known before anything is measured or written
        quantize.check_possible(quantize.Job(method, types=options.types), shard_bytes(options.max_shard_size))
        if method.measured:
            quantize.library()
    return Importance(
        conversion,
        tokenizer,
        wanted,
        file=options.imatrix_file,
        data=options.calibration_data,
        tokens=options.calibration_tokens,
    )


def _by_name(planned: Sequence[Planned]) -> dict[str, tuple[tuple[int, ...], Type]]:
    return {tensor.name: (tensor.shape, tensor.type) for tensor in planned}


def _plan(
    job: quantize.Job, conversion: Conversion, importance: Importance
) -> tuple[list[Planned], list[quantize.Replaced]]:
    if job.method.measured:
        return importance.budget(job.method), []
    planned, replaced = _fixed(job, conversion)
    if job.method.type in methods.TERNARY:
        logger.warning("%s is of use only for models that were trained with weights of three values", job.method.name)
    if replaced:
        first = replaced[0]
        logger.warning(
            "%s: %d tensors have rows that its blocks do not divide, and another type instead (%s: %s instead of %s)",
            job.method.name,
            len(replaced),
            first.name,
            first.got.name,
            first.wanted.name,
        )
    return planned, replaced


def _fixed(job: quantize.Job, conversion: Conversion) -> tuple[list[Planned], list[quantize.Replaced]]:
    """The tensors of a file whose types are known."""
    shape = replace(conversion.shape, imatrix=job.imatrix is not None)
    return quantize.plan(_by_name(conversion.planned), shape, job)


def _merged(made_of: Mapping[str, Any]) -> dict[str, Any]:
    return {key: made_of[key] for key in ("base_held_in", "adapters", "adapter_scale", "base_weight")}


def _write_card(
    folder: Path, staging: Path, is_public: bool, model: Any, made_of: Mapping[str, Any], files: Mapping[str, Any]
) -> None:
    if card.may_be_written(folder):
        (staging / card.NAME).write_text(card.text(is_public, model, made_of, files), encoding="utf-8")


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.+-]", "_", name) or "model"


def _earlier(folder: Path) -> dict[str, Any]:
    """What the manifest says of the files that are in the folder already."""
    manifest = artifact.read_manifest(folder) if folder.is_dir() else None
    return dict(manifest["details"].get("files", {})) if manifest and manifest["kind"] == KIND else {}


def shard_bytes(size: int | str | None) -> int:
    """A size as a number of bytes; 0 for none."""
    if size is None:
        return 0
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?B)\s*", size.upper()) if isinstance(size, str) else None
    number = int(float(found[1]) * _UNITS[found[2]]) if found else size
    if not isinstance(number, int) or isinstance(number, bool) or number <= 0:
        raise ConfigError("max_shard_size is a number of bytes, or such as '4GB'", got=size)
    return number


class _Judge:
    """Checks every file; the model itself is run once."""

    def __init__(
        self, conversion: Conversion, tokenizer: PreTrainedTokenizerBase, ends: list[int], options: Options
    ) -> None:
        self._conversion = conversion
        self._notes = list(conversion.metadata.limits)
        self._engine = runtime.available()
        self._reference: Reference | None = None
        reason = self._reason(options)
        if reason is None:
            end = ends[0] if ends else None
            self._reference = check.reference(conversion, tokenizer, end)
            if not self._reference.same:
                self._notes.append("compared with the model as it was trained, which cannot compute what was merged")
        else:
            self._engine = None
            self._notes.append(reason)
            logger.warning("the files are reopened and compared, but %s", reason)

    def _reason(self, options: Options) -> str | None:
        """Why llama.cpp does not run the files, if it does not."""
        if not options.verify:
            return "not run by llama.cpp, as was asked"
        if self._engine is None:
            return 'not run by llama.cpp, which is not installed: pip install "unsloth[gguf-run]"'
        free = device.free_memory(torch.device("cpu"))
        if free is not None and self._conversion.size * 1.2 > free * options.maximum_memory_usage:
            return f"not run by llama.cpp, for which there is too little memory ({free:,} bytes free)"
        return None

    @property
    def runs(self) -> bool:
        """Whether llama.cpp runs the files."""
        return self._reference is not None

    def see_conversion(self, path: Path) -> None:
        """Check the unquantized file, from which all others are made."""
        check.structure([path], self._conversion.planned, self._conversion.metadata)
        if self._reference is not None:
            method = methods.find(self._conversion.dtype, self._conversion.dtype)
            check.running(path, self._reference, check.limit_of(method))

    def prove(
        self,
        source: Path,
        paths: Sequence[Path],
        job: quantize.Job,
        planned: Sequence[Planned],
        replaced: Sequence[quantize.Replaced],
    ) -> Proof:
        """Check one file, or its shards."""
        check.structure(paths, planned, self._conversion.metadata)
        error = check.values(Reader(source), paths)
        comparison = None
        if self._reference is not None:
            comparison = check.running(paths[0], self._reference, check.limit_of(job.method))
        return Proof(
            tensors=len(planned),
            types=check.count(planned),
            replaced=[(each.name, each.wanted.name, each.got.name) for each in replaced],
            largest_error=error,
            engine=self._engine,
            comparison=comparison,
            not_checked=self._notes,
        )

    def prove_adapter(self, base: Path, path: Path, made: Metadata, planned: Sequence[Planned]) -> Proof:
        """Check an adapter's file, beside a file of the base model."""
        check.structure([path], planned, made)
        comparison = None
        if self._reference is not None:
            comparison = check.running(base, self._reference, verify.MEDIAN_KL_LIMIT, adapter=path)
        return Proof(len(planned), check.count(planned), [], 0.0, self._engine, comparison, self._notes)
