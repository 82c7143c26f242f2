"""Every quantization method against llama.cpp's own quantizer, bit by bit."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from unsloth.core.errors import ConfigError, ExportError
from unsloth.export.gguf import convert, methods, quantize, runtime
from unsloth.export.gguf.file import Planned, Reader
from unsloth.export.gguf.methods import METHODS, Shape

QUICK = ("q8_0", "q4_0", "q4_k_m", "q3_k_m", "q2_k", "bf16")  # the i-quants take their time
SHARED = {"num_hidden_layers": 16, "hidden_size": 256, "intermediate_size": 256, "head_dim": 64}


@pytest.fixture(scope="module", params=[1, 2], ids=["grouped", "pairs"])
def source(request, family, tokenizer, tmp_path_factory, engine):
    """A model of 16 layers whose rows take every type, with few or many queries to a key; an untied head."""
    tied = request.param == 2
    model = family("llama", num_key_value_heads=request.param, tie_word_embeddings=tied, **SHARED)
    path = tmp_path_factory.mktemp("source") / "model.gguf"
    conversion = convert.plan(model, tokenizer, "f16")
    conversion.write(path)
    return conversion, Reader(path)


def importance(reader):
    generator = np.random.default_rng(0)
    return {
        tensor.name: generator.exponential(size=tensor.shape[-1]).astype(np.float32)
        for tensor in reader
        if methods.is_quantized(tensor.name, tensor.shape) and "embd" not in tensor.name
    }


def by_both(source, method, imatrix, folder):
    conversion, reader = source
    job = quantize.Job(method, imatrix)
    tensors = {tensor.name: (tensor.shape, tensor.type) for tensor in conversion.planned}
    shape = Shape(conversion.shape.layers, conversion.shape.grouping, imatrix=imatrix is not None)
    planned, _ = quantize.plan(tensors, shape, job)
    quantize.write(reader, folder / "ours.gguf", planned, job)
    runtime.quantize(reader.path, folder / "theirs.gguf", method, imatrix)
    return Reader(folder / "ours.gguf"), Reader(folder / "theirs.gguf")


def check(source, name, with_imatrix, folder):
    ours, theirs = by_both(source, methods.find(name, "f16"), importance(source[1]) if with_imatrix else None, folder)
    others = {tensor.name: tensor for tensor in theirs}
    assert {tensor.name: tensor.type for tensor in ours} == {name: tensor.type for name, tensor in others.items()}
    for tensor in ours:
        same = ours.raw(tensor) == theirs.raw(others[tensor.name])
        if tensor.type == Type.IQ1_M:  # two compilers round a few of its sums differently, and so choose other blocks
            assert same.reshape(-1, 56).all(axis=1).mean() > 0.99, tensor.name
        else:
            assert same.all(), tensor.name
    key = "general.file_type"
    assert ours.header.metadata[key] == theirs.header.metadata[key]


def needs(name):
    return name.startswith(("iq1", "iq2", "iq3_xxs", "iq3_xs", "q2_k_s"))


@pytest.mark.parametrize("name", QUICK)
def test_the_bits_are_llama_cpps(name, source, tmp_path):
    check(source, name, needs(name), tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("with_imatrix", [False, True])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_the_bits_of_every_method_are_llama_cpps(method, with_imatrix, source, tmp_path):
    if needs(method.name) and not with_imatrix:
        with pytest.raises(ExportError, match=r"useless without an importance matrix.*imatrix_file="):
            by_both(source, method, None, tmp_path)
        return
    check(source, method.name, with_imatrix, tmp_path)


def test_narrow_rows_get_another_type(family, tokenizer):
    conversion = convert.plan(family("llama"), tokenizer, "f16")  # rows of 64 and 96
    tensors = {tensor.name: (tensor.shape, tensor.type) for tensor in conversion.planned}
    planned, replaced = quantize.plan(tensors, conversion.shape, quantize.Job(methods.find("q4_k_m", "f16")))
    got = {tensor.name: tensor.type for tensor in planned}
    assert got["blk.0.attn_q.weight"] is Type.Q5_0 and got["output_norm.weight"] is Type.F32
    assert {each.name: (each.wanted, each.got, each.width) for each in replaced}["blk.0.attn_q.weight"] == (
        Type.Q4_K,
        Type.Q5_0,
        64,
    )
    assert methods.fitted(Type.Q4_0, 33) is Type.F16


def test_types_of_single_tensors_come_first(family, tokenizer):
    conversion = convert.plan(family("llama"), tokenizer, "f16")
    tensors = {tensor.name: (tensor.shape, tensor.type) for tensor in conversion.planned}
    method = methods.find("q4_0", "f16")
    chosen = {"blk.1.ffn_up.weight": Type.Q8_0, "blk.0.attn_k.weight": Type.IQ3_S}
    planned, replaced = quantize.plan(tensors, conversion.shape, quantize.Job(method, types=chosen))
    got = {tensor.name: tensor.type for tensor in planned}
    assert got["blk.1.ffn_up.weight"] is Type.Q8_0 and got["blk.0.ffn_up.weight"] is Type.Q4_0
    assert got["blk.0.attn_k.weight"] is Type.IQ4_NL and replaced[0].name == "blk.0.attn_k.weight"
    with pytest.raises(ConfigError, match="output_norm"):
        quantize.plan(tensors, conversion.shape, quantize.Job(method, types={"output_norm.weight": Type.Q8_0}))


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("quantized", "q4_k_m"),
        ("FAST_quantized", "q8_0"),
        ("not_quantized", "bf16"),
        ("Q4_K", "q4_k_m"),
        ("q5_k", "q5_k_m"),
        ("q3_k_xs", "iq3_xs"),
        ("UD-IQ1_M", "iq1_m"),
        ("IQ4_NL", "iq4_nl"),
    ],
)
def test_every_documented_name_is_known(name, method):
    assert methods.find(name, "bf16").name == method


@pytest.mark.parametrize("name", ["q9_k", "", 4])
def test_unknown_names_are_refused(name):
    with pytest.raises(ConfigError, match="quantization_method"):
        methods.find(name, "bf16")


def test_a_matrix_of_another_model_is_refused(family, tokenizer):
    tensors = {t.name: (t.shape, t.type) for t in convert.plan(family("llama"), tokenizer).planned}
    blocks = {n: s for n, (s, _) in tensors.items() if n.startswith("blk.") and methods.is_quantized(n, s)}
    whole = {name: np.ones(size[-1], dtype=np.float32) for name, size in blocks.items()}
    right = whole["blk.0.attn_q.weight"]
    quantize.check_imatrix(whole, tensors, "x.gguf")
    with pytest.raises(ExportError, match=r"nothing for blk\.0\.attn_k"):
        quantize.check_imatrix({"blk.0.attn_q.weight": right}, tensors, "x.gguf")
    for name, values in {
        "blk.9.attn_q.weight": right,
        "blk.0.attn_q.weight": np.ones(65),
        "blk.1.attn_q.weight": right * np.nan,
    }.items():
        with pytest.raises(ExportError, match=r"x\.gguf"):
            quantize.check_imatrix({**whole, name: values}, tensors, "x.gguf")


def test_experts_are_quantized_each_with_its_own_importance():
    values = np.random.default_rng(0).standard_normal((3, 4, 256)).astype(np.float32)
    weights = np.random.default_rng(1).exponential(size=(3, 256)).astype(np.float32)
    whole = quantize.encode(values, Type.Q4_K, weights)
    each = [quantize.encode(v, Type.Q4_K, w) for v, w in zip(values, weights, strict=True)]
    assert (whole == np.concatenate(each)).all()


def test_several_threads_give_the_same_bits(monkeypatch):
    values = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    once = quantize.encode(values, Type.Q4_K)
    monkeypatch.setattr(quantize, "_CHUNK", 1024)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert (quantize.encode(values, Type.Q4_K) == once).all()


def test_planned_sizes():
    assert Planned("x", (3, 256), Type.Q4_K).size == 3 * 144
    assert Planned("x", (7,), Type.F32).size == 28


def test_the_first_use_of_a_type_may_be_in_several_threads():
    """In a process of its own: the library builds its tables once, and a race ends the process."""
    code = (
        "import numpy as np, torch; torch.set_num_threads(4)\n"
        "from gguf import GGMLQuantizationType as T\n"
        "from unsloth.export.gguf import quantize\n"
        "quantize._CHUNK = 1024\n"
        "rows = np.random.default_rng(0).normal(size=(32, 256)).astype(np.float32)\n"
        "for kind in (T.IQ2_XXS, T.IQ2_XS, T.IQ1_M, T.IQ3_S): quantize.encode(rows, kind, np.ones(256, np.float32))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
