"""The importance matrix: what is added up, the files, and matrices that do not fit."""

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from torch.nn import functional

from unsloth import FastLanguageModel
from unsloth.core.errors import ConfigError, ExportError
from unsloth.export import calibration, imatrix
from unsloth.export.gguf import convert, methods, quantize, runtime
from unsloth.export.gguf.file import Reader
from unsloth.models import plan

MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


@pytest.fixture
def loaded(tiny):
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(tiny()), max_seq_length=128, dtype=torch.float32, load_in_16bit=True
    )
    model = FastLanguageModel.get_peft_model(model, r=4)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model, tokenizer


@pytest.fixture
def text(tokenizer, conversations):
    return calibration.read(conversations, tokenizer, tokens=300, length=100)


@torch.no_grad()
def by_hand(model, text):
    """Inputs of the first block's matrices, computed from the merged weights alone."""
    inner = model.merge_and_unload()
    block, ids = inner.model.layers[0], torch.stack(text.chunks)
    hidden = inner.model.embed_tokens(ids)
    normed = block.input_layernorm(hidden)
    rotary = inner.model.rotary_emb(hidden, torch.arange(ids.shape[1])[None])
    after = hidden + block.self_attn(normed, position_embeddings=rotary, attention_mask=None)[0]
    gated = block.post_attention_layernorm(after)
    down = functional.silu(block.mlp.gate_proj(gated)) * block.mlp.up_proj(gated)
    return {"attn_q": normed, "attn_v": normed, "ffn_up": gated, "ffn_down": down}


def test_it_is_the_mean_square_of_each_input_of_the_merged_model(loaded, text):
    model, tokenizer = loaded
    found = imatrix.measure(model, convert.plan(model, tokenizer), text)
    assert set(found.sums) == {f"blk.{block}.{name}.weight" for block in (0, 1) for name in MATRICES}
    for name, inputs in by_hand(model, text).items():
        mean = inputs.square().mean((0, 1)).numpy()
        np.testing.assert_allclose(found.means()[f"blk.0.{name}.weight"], mean, rtol=1e-4, err_msg=name)
    assert {int(counts[0]) for counts in found.counts.values()} == {300}


def test_a_training_run_goes_on_as_if_nothing_had_been(loaded, text):
    model, tokenizer = loaded
    assert plan.installed(model).applied
    model.train()
    batch = torch.arange(4, 36)[None]
    model(input_ids=batch, labels=batch).loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    state, modes = torch.get_rng_state(), [module.training for module in model.modules()]
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    imatrix.measure(model, convert.plan(model, tokenizer), text)
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [module.training for module in model.modules()]
    assert hooks == [len(module._forward_pre_hooks) for module in model.modules()]
    assert plan.installed(model).applied
    assert gradients and all(torch.equal(p.grad, gradients[n]) for n, p in model.named_parameters() if n in gradients)


def test_a_layer_that_is_never_called_is_an_error(tiny, text):
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(tiny()), max_seq_length=128, dtype=torch.float32, load_in_16bit=True
    )
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: functional.linear(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x), mlp.down_proj.weight)
    with pytest.raises(ExportError, match="blk.1.ffn_down.weight was never called"):
        imatrix.measure(model, convert.plan(model, tokenizer), text)


@pytest.mark.parametrize("suffix", [".gguf", ".dat"])
def test_both_formats_say_the_same(suffix, loaded, conversations, tmp_path):
    model, tokenizer = loaded
    path = tmp_path / "new" / f"matrix{suffix}"
    model.save_imatrix(path, tokenizer, conversations, tokens=300)
    found = quantize.read_imatrix(path)
    means = imatrix.measure(
        model, convert.plan(model, tokenizer), calibration.read(conversations, tokenizer, tokens=300)
    ).means()
    assert found.keys() == means.keys()
    for name, values in found.items():
        np.testing.assert_allclose(values, means[name], rtol=1e-6)
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_the_file_is_what_llama_cpp_writes(loaded, text, tmp_path):
    model, tokenizer = loaded
    imatrix.write(imatrix.measure(model, convert.plan(model, tokenizer), text), tmp_path / "a.gguf")
    reader = GGUFReader(tmp_path / "a.gguf")
    keys = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert keys == {
        "general.type": "imatrix",
        "imatrix.datasets": ["list"],
        "imatrix.chunk_count": 3,
        "imatrix.chunk_size": 100,
    }
    shapes = {tensor.name: (tensor.tensor_type.name, tensor.shape.tolist()) for tensor in reader.tensors}
    assert shapes["blk.0.ffn_down.weight.in_sum2"] == ("F32", [128, 1])
    assert shapes["blk.0.ffn_down.weight.counts"] == ("F32", [1, 1])
    assert len(shapes) == 28


def test_experts_have_their_own_sums(tmp_path):
    sums, name = imatrix.Sums(), "blk.0.ffn_down_exps.weight"
    sums.add(name, torch.tensor([[1.0, 2.0], [3.0, 0.0]]), expert=2)
    sums.add(name, torch.tensor([[[2.0, 2.0]]]), expert=0)
    added, counts = sums.collected(name, experts=3)
    found = imatrix.ImportanceMatrix({name: added}, {name: counts}, "rows", 1, 3)
    assert counts.tolist() == [1, 0, 2]
    assert found.means()[name].tolist() == [4.0, 4.0, 1.0, 1.0, 5.0, 2.0]  # an expert without input counts as one
    imatrix.write(found, tmp_path / "a.gguf")
    tensors = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "a.gguf").tensors}
    assert tensors[f"{name}.in_sum2"].data.tolist() == [[4.0, 4.0], [0.0, 0.0], [10.0, 4.0]]
    assert tensors[f"{name}.counts"].data.tolist() == [[1.0], [0.0], [2.0]]


def test_another_suffix_is_refused_before_anything_is_measured(loaded, tmp_path):
    model, tokenizer = loaded
    with pytest.raises(ConfigError, match=r"\.gguf file, or a \.dat"):
        model.save_imatrix(tmp_path / "matrix.bin", tokenizer, [{"nothing": "here"}])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("blk.1.ffn_up.weight"), "nothing for blk.1.ffn_up.weight"),
        (lambda m: m.update({"blk.2.ffn_up.weight": m["blk.1.ffn_up.weight"]}), "has no blk.2.ffn_up.weight"),
        (lambda m: m.update({"blk.0.ffn_up.weight": np.ones((1, 65), np.float32)}), "65 numbers for 64"),
        (lambda m: m["blk.0.ffn_up.weight"].fill(np.nan), "does not fit"),
    ],
)
def test_a_matrix_of_another_model_is_an_error(change, message, loaded, text, tmp_path):
    model, tokenizer = loaded
    found = imatrix.measure(model, convert.plan(model, tokenizer), text)
    sums = dict(found.sums)
    change(sums)
    other = imatrix.ImportanceMatrix(sums, dict.fromkeys(sums, np.array([1])), found.source, 1, 100)
    imatrix.write(other, tmp_path / "other.gguf")
    with pytest.raises(ExportError, match=message):
        model.save_pretrained_gguf(tmp_path / "out", tokenizer, "q4_0", imatrix_file=tmp_path / "other.gguf")
    assert not (tmp_path / "out").exists()


def test_methods_that_need_one_get_one_and_the_bits_are_llama_cpps(wide, tmp_path):
    if runtime.available() is None:
        pytest.skip("llama.cpp is not installed (extra gguf-run)")
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(wide), max_seq_length=128, dtype=torch.float32, load_in_16bit=True
    )
    model.save_pretrained_gguf(tmp_path / "out", tokenizer, ["iq2_xxs", "q3_k_s"], calibration_tokens=600, verify=False)
    conversion = convert.plan(model, tokenizer)
    conversion.write(tmp_path / "source.gguf")
    matrix = imatrix.measure(model, conversion, calibration.read(None, tokenizer, tokens=600)).means()
    for name, values in (("iq2_xxs", matrix), ("q3_k_s", None)):
        runtime.quantize(tmp_path / "source.gguf", tmp_path / "theirs.gguf", methods.find(name, "f32"), values)
        theirs = Reader(tmp_path / "theirs.gguf")
        ours = Reader(next((tmp_path / "out").glob(f"*.{name.upper()}.gguf")))
        raw = {tensor.name: (tensor.type, theirs.raw(tensor).tobytes()) for tensor in theirs}
        assert {tensor.name: (tensor.type, ours.raw(tensor).tobytes()) for tensor in ours} == raw
