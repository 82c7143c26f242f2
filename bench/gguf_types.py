"""What every GGUF type costs in prediction: SmolLM2-135M quantized by each method, and run by llama.cpp.

Divergence is measured on conversations that the importance matrix was not made from. A file is judged against
transformers in bfloat16. Writes bench/results/gguf_types.csv and prints the table of docs/gguf.md.

    python bench/gguf_types.py [METHOD ...]
"""

from __future__ import annotations

import csv
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import unsloth.data.demo
from unsloth.core.errors import ExportError
from unsloth.export import verify
from unsloth.export.gguf import convert, methods, quantize, runtime
from unsloth.export.gguf.file import Planned, Reader
from unsloth.models import embedded

RESULTS = Path(__file__).parent / "results" / "gguf_types.csv"
DATA = Path(unsloth.data.demo.__file__).parent
FIELDS = ("method", "imatrix", "MB", "seconds", "mean_kl", "median_kl", "p999_kl", "top1", "other_types")
CALIBRATION, HELD_OUT, LONGEST = 24, 10, 128


def conversations(name: str, rows: int, tokenizer) -> list[list[int]]:
    """Tokens of the first rows of a demonstration file, chat-formatted and cut."""
    lines = (DATA / name).read_text(encoding="utf-8").splitlines()[:rows]
    texts = [tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=False) for line in lines]
    return [tokenizer(text, add_special_tokens=False).input_ids[:LONGEST] for text in texts]


@torch.no_grad()
def importance(model, conversion: convert.Conversion, batches: list[list[int]]) -> dict[str, np.ndarray]:
    """Mean square of every input of every linear layer, by the name of its weight in the file."""
    sums: dict[str, torch.Tensor] = {}
    count = sum(map(len, batches))

    def watch(name: str):
        def hook(module, inputs):
            sums[name] = sums.get(name, 0) + inputs[0].float().pow(2).sum(dim=(0, 1))

        return hook

    handles = [
        module.register_forward_pre_hook(watch(conversion.rules[f"{path}.weight"].name))
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and path != "lm_head"
    ]
    for ids in batches:
        model(input_ids=torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: (total / count).numpy() for name, total in sums.items()}


class Bench:
    """The model, its conversion, and what it predicts."""

    def __init__(self, folder: Path) -> None:
        source = embedded.folder()
        self.tokenizer = AutoTokenizer.from_pretrained(source)
        self.model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()
        self.folder = folder
        self.conversion = convert.plan(self.model, self.tokenizer)
        self.conversion.write(folder / "model.gguf")
        self.source = Reader(folder / "model.gguf")
        self.ids = conversations("heldout.jsonl", HELD_OUT, self.tokenizer)
        with torch.no_grad():
            logits = [self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float() for ids in self.ids]
        self.expected = torch.cat(logits)
        calibration = conversations("train.jsonl", CALIBRATION, self.tokenizer)
        self.imatrix = importance(self.model, self.conversion, calibration)

    def row(self, name: str, with_imatrix: bool) -> dict[str, object]:
        """Quantize, run and compare."""
        job = quantize.Job(methods.find(name, self.conversion.dtype), self.imatrix if with_imatrix else None)
        tensors = {tensor.name: (tensor.shape, tensor.type) for tensor in self.conversion.planned}
        planned, replaced = quantize.plan(tensors, replace(self.conversion.shape, imatrix=with_imatrix), job)
        path = self.folder / "quantized.gguf"
        began = time.process_time()
        quantize.write(self.source, path, planned, job)
        seconds = time.process_time() - began
        found = torch.cat(runtime.ask(runtime.Request(path, ids=self.ids)).logits)
        comparison = verify.compare(self.expected, found)
        log_p, log_q = self.expected.log_softmax(-1), found.log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        return {
            "method": name,
            "imatrix": "yes" if with_imatrix else "no",
            "MB": f"{path.stat().st_size / 1e6:.1f}",
            "seconds": f"{seconds:.1f}",
            "mean_kl": f"{comparison.mean_kl:.4f}",
            "median_kl": f"{comparison.median_kl:.4f}",
            "p999_kl": f"{kl.quantile(0.999).item():.3f}",
            "top1": f"{comparison.top1_agreement:.3f}",
            "other_types": f"{len(replaced)} of {quantized(planned)}",
        }


def quantized(planned: list[Planned]) -> int:
    """How many tensors the methods quantize."""
    return sum(methods.is_quantized(tensor.name, tensor.shape) for tensor in planned)


def main() -> None:
    """Measure the methods named on the command line, or all."""
    names = sys.argv[1:] or [method.name for method in methods.METHODS]
    with tempfile.TemporaryDirectory() as folder, RESULTS.open("a", newline="", encoding="utf-8") as file:
        bench = Bench(Path(folder))
        print(f"llama.cpp: {runtime.available()}; {len(bench.expected)} positions of {len(bench.ids)} conversations")
        writer = csv.DictWriter(file, FIELDS)
        if file.tell() == 0:
            writer.writeheader()
        for name in names:
            for with_imatrix in (False, True):
                if with_imatrix and methods.find(name, "bf16").type in methods.PLAIN:
                    continue
                try:
                    row = bench.row(name, with_imatrix)
                except ExportError as error:
                    print(f"{name}: {error}")
                    continue
                writer.writerow(row)
                file.flush()
                print("| " + " | ".join(str(row[field]) for field in FIELDS) + " |", flush=True)


if __name__ == "__main__":
    main()
