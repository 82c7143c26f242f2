"""Time and peak memory of merging a LoRA adapter into a random NF4 model of Llama 3.1 8B's shape, and of proving it.

``python bench/merge.py [--shape 8b|tiny] [--folder DIR] [--out FILE]``. Weights are made layer by layer, so that the
16-bit model is never whole in the device's memory. Prints the time of each part, and the memory above what the model
itself takes: on the device, and anonymous memory on the host (files that are read are not counted). Appends to
results/merge.csv: what, seconds, device GiB, host GiB.
"""

import argparse
import csv
import datetime
import gc
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from unsloth.core import artifact
from unsloth.export import merge, save, shards, verify
from unsloth.quant import nf4

GIB = 2**30
SHAPES = {
    "8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "tiny": {
        "vocab_size": 1000,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
RESULTS = Path(__file__).with_name("results") / "merge.csv"


class Meter:
    """Highest memory since the last reset, sampled on the host and as the allocator counts it on the device."""

    def __init__(self, device):
        self.device, self.highest = device, 0
        threading.Thread(target=self._watch, daemon=True).start()
        self.reset()

    def _watch(self):
        while True:
            self.highest = max(self.highest, anonymous())
            time.sleep(0.02)

    def reset(self):
        gc.collect()
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self.base_host = self.highest = anonymous()
        self.base_device = torch.cuda.memory_allocated() if self.device == "cuda" else 0

    def peaks(self):
        """GiB above the last reset: device, host."""
        device = torch.cuda.max_memory_allocated() - self.base_device if self.device == "cuda" else 0
        return device / GIB, (self.highest - self.base_host) / GIB


def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) * 1024


def build(shape, device):
    """The model in NF4 with a trained adapter of rank 16 on all linear layers."""
    config = LlamaConfig(**SHAPES[shape], bos_token_id=None, eos_token_id=None)
    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    for path, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and path != "lm_head":
            value = torch.randn(module.weight.shape, device=device, dtype=torch.bfloat16) * module.in_features**-0.5
            layer = Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16, device="meta"
            )
            layer.weight = Params4bit(value, requires_grad=False, quant_type="nf4", compress_statistics=True).to(device)
            replace(model, path, layer)
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            value = torch.randn(parameter.shape, device=device, dtype=torch.bfloat16) * 0.02
            value = torch.ones_like(value) if parameter.ndim == 1 else value
            replace(model, name, torch.nn.Parameter(value, requires_grad=False))
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    nf4.keep_layout(model)
    return model.eval()


def replace(model, path, value):
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, value)


@contextmanager
def timed(report, module, name, what):
    """Time a function of a module while the block runs."""
    original = getattr(module, name)

    def run(*args, **options):
        start = time.perf_counter()
        result = original(*args, **options)
        report(what, time.perf_counter() - start)
        return result

    setattr(module, name, run)
    try:
        yield
    finally:
        setattr(module, name, original)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--folder", default=None, help="where the model is written; 32 GB are needed")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    model = build(arguments.shape, device)
    meter, rows = Meter(device), []

    def report(what, seconds):
        on_device, on_host = meter.peaks()
        rows.append((what, f"{seconds:.2f}", f"{on_device:.3f}", f"{on_host:.3f}"))
        print(f"{what:45} {seconds:7.1f} s   device + {on_device:.2f} GiB   host + {on_host:.2f} GiB", flush=True)

    save.attach_methods(model)
    with (
        tempfile.TemporaryDirectory(dir=arguments.folder) as folder,
        timed(report, shards, "write", "- merged, checked layer by layer, written"),
        timed(report, verify, "compare_reloaded", "- reloaded and compared"),
        timed(report, artifact, "write_manifest", "- checksums"),
        timed(report, artifact, "_sync_tree", "- flushed to the disk"),
    ):
        for way, share in (("layer by layer", 1e-3), ("whole", 0.75)):
            meter.reset()
            start = time.perf_counter()
            comparison = model.save_pretrained_merged(Path(folder) / "merged", maximum_memory_usage=share)
            report(f"save_pretrained_merged, reloaded {way}", time.perf_counter() - start)
            print(comparison, flush=True)
    meter.reset()
    start = time.perf_counter()
    for _ in merge.merged_tensors(model):
        pass
    report("merged tensors, one after another", time.perf_counter() - start)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    arguments.out.parent.mkdir(exist_ok=True)
    with arguments.out.open("a", newline="") as file:
        for row in rows:
            csv.writer(file).writerow([datetime.date.today(), name, versions, arguments.shape, *row])


if __name__ == "__main__":
    main()
