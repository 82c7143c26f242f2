"""Loading a folder of bfloat16 weights into NF4 on the GPU: ours, ours without reading ahead, plain transformers.

The folder is of a model with random weights, in files of 5 GB as they are published, made in ``--folder`` unless it is
there, and deleted again unless ``--keep``. Timed is from the call to a model whose last weight is on the device, in a
process that has imported everything and used the GPU before. ``cold`` means that the files were first taken out of the
system's page cache; the others find them there. Reported: seconds, GB of files a second, the highest memory on the
device; and whether the quantized weights are those of transformers, to the bit. Appends to bench/results/load.csv.

    python bench/load.py [--shape 8b] [--ways ours hf ours-plain ours+cold hf+cold] [--folder DIR] [--profile]
"""

from __future__ import annotations

import argparse
import cProfile
import datetime
import gc
import hashlib
import json
import os
import pstats
import shutil
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import random_llama
import results_file
import torch
import transformers
from safetensors.torch import save_file

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FILE_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Row:
    """One line of the results file."""

    shape: str
    way: str
    gb: float
    seconds: float
    gb_per_s: float
    peak_gib: float
    equal: str
    gpu: str = field(default_factory=lambda: torch.cuda.get_device_name() if DEVICE.type == "cuda" else "none")
    torch: str = torch.__version__
    transformers: str = transformers.__version__
    date: str = field(default_factory=lambda: datetime.date.today().isoformat())


def write(folder: Path, shape: random_llama.Shape) -> None:
    """A model folder with random weights, and a tokenizer of as many words."""
    config = random_llama.config(shape)
    config.dtype = "bfloat16"
    config.architectures = ["LlamaForCausalLM"]
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    write_tokenizer(folder, shape.vocabulary)
    with torch.device("meta"):
        names = {name: value.shape for name, value in transformers.LlamaForCausalLM(config).named_parameters()}
    generator = torch.Generator(DEVICE).manual_seed(0)
    weight_map: dict[str, str] = {}
    total, tensors = 0, dict[str, torch.Tensor]()
    with ThreadPoolExecutor() as pool:

        def save() -> None:
            file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
            weight_map.update(dict.fromkeys(tensors, file))
            saved.append(pool.submit(save_file, tensors, folder / file, {"format": "pt"}))

        saved: list[Future] = []
        for name, size in names.items():
            value = torch.empty(size, dtype=torch.bfloat16, device=DEVICE)
            value = value.fill_(1.0) if value.ndim == 1 else value.normal_(std=0.02, generator=generator)
            if sum(x.nbytes for x in tensors.values()) + value.nbytes > FILE_BYTES:
                save()
                tensors = {}
            tensors[name] = value.cpu()
            total += value.nbytes
        save()
        for future in saved:
            future.result()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """Words that are numbers."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, vocabulary)}}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<pad>")), pad_token="<pad>", eos_token="<eos>"
    ).save_pretrained(folder)


def make_cold(folder: Path) -> None:
    """Take the files out of the page cache."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def load(way: str, folder: Path) -> torch.nn.Module:
    """The model, in NF4."""
    os.environ["UNSLOTH_READ_AHEAD"] = "0" if way == "ours-plain" else "1"
    if way.startswith("ours"):
        from unsloth import FastLanguageModel

        model, _ = FastLanguageModel.from_pretrained(
            str(folder), dtype=torch.bfloat16, load_in_4bit=True, max_seq_length=4096
        )
        return model
    options = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=options, dtype=torch.bfloat16, device_map={"": DEVICE}
    )


def digest(model: torch.nn.Module) -> str:
    """Of the bytes of all weights that were quantized, and their scales' codes."""
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None and name.split(".")[2:3] in (["0"], ["1"]) or "norm" in name:
            found.update(parameter.detach().view(torch.uint8).cpu().numpy().tobytes())
        if state is not None:
            found.update(state.absmax.cpu().numpy().tobytes())
    return found.hexdigest()[:16]


def measure(way: str, folder: Path, size: float, options: argparse.Namespace, seen: dict[str, str]) -> Row:
    """Load once."""
    kind, _, cold = way.partition("+")
    if cold:
        make_cold(folder)
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    profiler = cProfile.Profile() if options.profile else None
    start = time.perf_counter()
    if profiler is not None:
        profiler.enable()
    model: Any = load(kind, folder)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    if profiler is not None:
        profiler.disable()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() / 2**30 if DEVICE.type == "cuda" else 0.0
    found = digest(model)
    equal = "first" if not seen else str(found == next(iter(seen.values())))
    seen[way] = found
    print(f"{way:12} {seconds:6.2f} s  {size / seconds:5.2f} GB/s  peak {peak:5.2f} GiB  equal: {equal}", flush=True)
    if profiler is not None:
        pstats.Stats(profiler).sort_stats("cumulative").print_stats(45)
        pstats.Stats(profiler).sort_stats("tottime").print_stats(14)
    return Row(options.shape, way, size, seconds, size / seconds, peak, equal)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="8b", choices=list(random_llama.SHAPES))
    parser.add_argument("--ways", nargs="+", default=["ours", "hf", "ours-plain", "ours+cold", "hf+cold"])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--profile", action="store_true", help="where each load's time went")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no further measurement after these")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model; writes no results")
    options = parser.parse_args()
    begin = time.perf_counter()
    if options.dry_run:
        options.shape = "tiny"
    folder = options.folder or Path(tempfile.mkdtemp(prefix="load-"))
    import bitsandbytes  # noqa: F401

    import unsloth  # noqa: F401

    torch.zeros(1, device=DEVICE)
    try:
        if not (folder / "config.json").exists():
            start = time.perf_counter()
            write(folder, random_llama.SHAPES[options.shape])
            print(f"written in {time.perf_counter() - start:.1f} s", flush=True)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e9
        seen: dict[str, str] = {}
        for way in options.ways:
            if time.perf_counter() - begin > options.seconds:
                print(f"{way}: left out, no time")
                continue
            row = measure(way, folder, size, options, seen)
            if not options.dry_run:
                results_file.append("load.csv", [row])
    finally:
        if not options.keep and options.folder is None:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
