"""Divergence of plain and dynamic GGUF types at equal size, computed by llama.cpp on text that was not calibrated on.

    python bench/dynamic_types.py smollm2 widened --out bench/results/dynamic_types.json --page docs/quantization.md

Two models: ``smollm2`` is SmolLM2-135M-Instruct as it ships in its package. ``widened`` computes the same, but its
widths are multiples of 256, which K- and i-quants ask for: hidden states of 576 are filled up to 768 with zeros, 9
heads to 12, and dimensions are shuffled within the symmetries of the model, because the package holds the weights in
Q4_1, whose grid Q4_1 (and nothing else) would find again. Every file is run by llama.cpp on the held-out text; the
divergence is that of its next-token distributions from those of the float32 model in transformers.
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from unsloth import FastLanguageModel
from unsloth.data import demo
from unsloth.export import calibration, dynamic, kld, predict, sensitivity, verify
from unsloth.export.gguf import convert, methods, quantize
from unsloth.export.gguf.convert import Conversion
from unsloth.export.gguf.file import Reader

NAMES = ("q5_k_m", "q4_k_m", "q3_k_m", "q2_k", "iq2_xxs", "iq1_m")
MARK = "<!-- measured by bench/dynamic_types.py -->"


@dataclass(frozen=True)
class Row:
    """One file: which model and method, whether with an importance matrix, its size, and how far it is off."""

    model: str
    method: str
    kind: str
    bytes: int
    mean_kl: float
    median_kl: float
    flips: float
    predicted: float | None
    types: dict[str, int]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", choices=("smollm2", "widened"))
    parser.add_argument("--methods", nargs="+", default=list(NAMES))
    parser.add_argument("--tokens", type=int, default=1536, help="held-out tokens")
    parser.add_argument("--calibration", type=int, default=16_384, help="most calibration tokens")
    parser.add_argument("--out", type=Path, default=Path("bench/results/dynamic_types.json"))
    parser.add_argument("--page", type=Path, help="page whose table is replaced")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.models:
        for row in measure(name, arguments.methods, arguments.tokens, arguments.calibration):
            print(row, flush=True)
            rows.append(row)
            arguments.out.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if arguments.page:
        before, _, after = arguments.page.read_text().split(MARK)
        arguments.page.write_text(f"{before}{MARK}\n{table(rows)}\n{MARK}{after}")
    print(table(rows))


def measure(name: str, wanted: Sequence[str], tokens: int, calibration_tokens: int) -> Iterator[Row]:
    """All rows of one model."""
    model, tokenizer = FastLanguageModel.from_pretrained(
        "embedded:SmolLM2-135M-Instruct", load_in_16bit=True, max_seq_length=1024, dtype=torch.float32
    )
    if name == "widened":
        model = widened(model)
    held_out = held_out_text(tokenizer, tokens)
    base = predict.ModelPredictor(model, name, 0)
    conversion = convert.plan(model, tokenizer, "f16")
    started = time.perf_counter()
    matrix, terms = sensitivity.measure(model, conversion, calibration.read(None, tokenizer, tokens=calibration_tokens))
    print(f"{name}: measured in {time.perf_counter() - started:.0f} s", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source.gguf"
        conversion.write(source)
        for method in wanted:
            for kind, job, predicted in jobs(method, conversion, Reader(source), matrix.means(), terms):
                row = tried(Path(folder) / "tried.gguf", source, conversion, job, held_out, base)
                yield replace(row, model=name, method=method, kind=kind, predicted=predicted)


def jobs(method: str, conversion: Conversion, source: Reader, means: quantize.Imatrix, terms: sensitivity.Terms):
    """The plain type, the plain type with the importance matrix, and the dynamic type of the same budget."""
    plain = methods.find(method, "f16")
    chosen = dynamic.find(f"ud-{method}")
    assert chosen is not None
    found = dynamic.choose(chosen, conversion, source, terms, means)
    if not method.startswith("iq"):
        yield "plain", quantize.Job(plain), None
    yield "plain, imatrix", quantize.Job(plain, means), found.plain_divergence
    yield "dynamic", quantize.Job(chosen, means, found.types), found.divergence


def tried(
    path: Path,
    source: Path,
    conversion: Conversion,
    job: quantize.Job,
    held_out: Sequence[Sequence[int]],
    base: predict.Predictor,
) -> Row:
    """Write one file, run it, and delete it."""
    shape = replace(conversion.shape, imatrix=job.imatrix is not None)
    planned, _ = quantize.plan({t.name: (t.shape, t.type) for t in conversion.planned}, shape, job)
    quantize.write(Reader(source), path, planned, job)
    found = kld.divergence(base, predict.GgufPredictor(path), held_out)
    types: dict[str, int] = {}
    for tensor in planned:
        types[tensor.type.name] = types.get(tensor.type.name, 0) + 1
    size = path.stat().st_size
    path.unlink()
    return Row("", "", "", size, found.mean, found.median, found.flips, None, types)


def held_out_text(tokenizer: PreTrainedTokenizerBase, tokens: int) -> list[list[int]]:
    """Half café orders with their tickets, half reference documentation of Python, in chunks of 256 tokens."""
    chats = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in demo.heldout_rows()]
    topics = pydoc_data.topics.topics
    prose = "\n\n".join(topics[name] for name in ("for", "try", "with", "strings", "exceptions", "naming"))
    found = []
    for text in ("".join(chats), prose):
        ids = tokenizer(text, add_special_tokens=False).input_ids[: tokens // 2]
        found += [ids[start : start + 256] for start in range(0, len(ids), 256)]
    return found


@torch.no_grad()
def widened(model: PreTrainedModel) -> PreTrainedModel:
    """A model that computes the same logits with a hidden size of 768 and 12 heads."""
    config = type(model.config)(
        **{**model.config.to_dict(), "hidden_size": 768, "num_attention_heads": 12, "num_key_value_heads": 4}
    )
    narrow = model.config.hidden_size
    config.head_dim = narrow // model.config.num_attention_heads
    config.rms_norm_eps = model.config.rms_norm_eps * narrow / 768
    config._name_or_path = "SmolLM2-widened"
    wide = LlamaForCausalLM(config).float().eval()
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randperm(narrow, generator=generator)
    inner = torch.randperm(config.intermediate_size, generator=generator)
    value = torch.randperm(config.head_dim, generator=generator)
    values = torch.cat([head * config.head_dim + value for head in range(3)])
    outputs = torch.cat([head * config.head_dim + value for head in range(9)])
    sources = model.state_dict()
    for name, target in wide.state_dict().items():
        given = sources[name].float()
        if "norm" in name:
            given = given[hidden] * (narrow / 768) ** 0.5
        elif "o_proj" in name:
            given = given[hidden][:, outputs]
        elif "down_proj" in name:
            given = given[hidden][:, inner]
        else:
            given = given[:, hidden]
            given = given[inner] if "mlp" in name else given[values] if "v_proj" in name else given
        target.zero_()
        target[tuple(slice(size) for size in given.shape)] = given
    wide.tie_weights()
    ids = torch.arange(100, 164)[None]
    comparison = verify.compare(model(input_ids=ids).logits[0], wide(input_ids=ids).logits[0])
    assert comparison.max_kl < 1e-6, comparison
    return wide


def table(rows: Sequence[Row]) -> str:
    """As Markdown."""
    lines = ["| model | as large as | type | bytes | mean KL | median | other first token |", "|" + "---|" * 7]
    for row in rows:
        numbers = f"{row.bytes:,} | {row.mean_kl:.4f} | {row.median_kl:.4f} | {row.flips:.1%}"
        lines.append(f"| {row.model} | {row.method} | {row.kind} | {numbers} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
