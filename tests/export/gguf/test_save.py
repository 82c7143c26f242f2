"""``save_pretrained_gguf``: files, proof, Modelfile, and what happens when something is wrong."""

import errno
import importlib.util
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from unsloth import FastLanguageModel
from unsloth.core import artifact
from unsloth.core.errors import ConfigError, ExportError, StorageError, TokenizerError
from unsloth.export import verify
from unsloth.export.gguf import file, quantize, runtime, save, tensors
from unsloth.models import gguf_header


def load(folder, precision="load_in_16bit", **options):
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=128, dtype=torch.float32, **{precision: True}
    )
    model = FastLanguageModel.get_peft_model(model, r=4, **options)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model, tokenizer


@pytest.fixture
def adapted(tiny):
    return load(tiny())


def report(folder):
    return json.loads((folder / "manifest.json").read_text())["details"]["files"]


@pytest.mark.parametrize(
    ("family", "tied", "precision"),
    [
        ("llama", True, "load_in_4bit"),
        ("llama", False, "load_in_16bit"),
        ("qwen2", True, "load_in_16bit"),
        ("qwen3", False, "load_in_8bit"),
    ],
)
def test_the_adapter_is_in_the_file(family, tied, precision, tiny, tmp_path, engine):
    model, tokenizer = load(tiny(family, tied), precision)
    model.save_pretrained_gguf(tmp_path / "out", tokenizer, "f32")
    ids = list(range(4, 60))
    (path,) = (tmp_path / "out").glob("*.gguf")
    found = runtime.ask(runtime.Request(path, ids=[ids])).logits[0]
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids])).logits[0].float()
    limit = 0.05 if precision == "load_in_8bit" else 1e-3  # int8 products also round the input
    assert verify.compare(expected, found).median_kl < limit
    assert report(tmp_path / "out")[path.name]["comparison"]["tokens"] > 100


@pytest.mark.parametrize(
    "options",
    [
        {"base_weight": 0.25, "adapters": "default"},
        {"adapters": {"default": -0.5, "style": 2.0}, "adapter_scale": 0.5},
    ],
)
@pytest.mark.parametrize("save_method", ["merged", "lora"])
def test_a_part_of_the_adapters(save_method, options, tiny, tmp_path, engine):
    model, tokenizer = load(tiny())
    model.add_adapter("style", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if "lora_" in name and "style" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    before = [dict(m.scaling) for m in model.modules() if hasattr(m, "lora_A")]
    model.save_pretrained_gguf(tmp_path / "out", tokenizer, "f32", save_method=save_method, **options)
    assert [dict(m.scaling) for m in model.modules() if hasattr(m, "lora_A")] == before
    ids = list(range(4, 60))
    model.save_pretrained_merged(tmp_path / "merged", tokenizer, **options)
    merged, _ = FastLanguageModel.from_pretrained(
        str(tmp_path / "merged"), max_seq_length=128, dtype=torch.float32, load_in_16bit=True
    )
    base, _ = FastLanguageModel.from_pretrained(
        str(tiny()), max_seq_length=128, dtype=torch.float32, load_in_16bit=True
    )
    with torch.no_grad():
        expected, whole, without = (m(input_ids=torch.tensor([ids])).logits[0].float() for m in (merged, model, base))
    (path,) = (tmp_path / "out").glob("*.gguf")
    if save_method == "lora":
        base.save_pretrained_gguf(tmp_path / "base", tokenizer, "f32", verify=False)
        request = runtime.Request(next((tmp_path / "base").glob("*.gguf")), ids=[ids], adapter=path)
    else:
        request = runtime.Request(path, ids=[ids])
    found = runtime.ask(request).logits[0]
    assert verify.compare(expected, found).mean_kl < 3e-5  # the merged folder has 16 bits
    assert min(verify.compare(other, found).mean_kl for other in (whole, without)) > 1e-4
    (kept,) = report(tmp_path / "out").values()
    assert kept["adapter_scale"] == options.get("adapter_scale", 1.0)
    assert kept["base_weight"] == options.get("base_weight", 0.0)


def test_the_average_with_a_base_after_full_training(tiny, tmp_path, engine):
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(tiny()), max_seq_length=128, dtype=torch.float32, full_finetuning=True
    )
    original = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(0.5)
    model.save_pretrained_gguf(tmp_path / "out", tokenizer, "f32", base_weight=0.5)
    (path,) = (tmp_path / "out").glob("*.gguf")
    reader = file.Reader(path)
    (tensor,) = (tensor for tensor in reader if tensor.name == "blk.0.ffn_up.weight")
    assert np.allclose(reader.float32(tensor), original.float() + 0.25, atol=1e-6)
    (kept,) = report(tmp_path / "out").values()
    assert "as it was trained" in kept["not_checked"][-1]


def test_several_methods_share_one_conversion(adapted, tmp_path, engine, monkeypatch):
    model, tokenizer = adapted
    conversions = []
    write = save.Conversion.write
    monkeypatch.setattr(save.Conversion, "write", lambda self, path: conversions.append(path) or write(self, path))
    text = model.save_pretrained_gguf(tmp_path / "out", tokenizer, ["Q4_K_M", "quantized", "q8_0", "not_quantized"])
    assert len(conversions) == 1
    name = model.config._name_or_path.rpartition("/")[2]
    names = {f"{name}.{method}.gguf" for method in ("Q4_K_M", "Q8_0", "F32")}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*names, "Modelfile", "README.md", "manifest.json"}
    assert artifact.verify(tmp_path / "out") == []
    assert (tmp_path / "out" / "Modelfile").read_text() == text == tokenizer._ollama_modelfile
    assert text.startswith(f"FROM ./{name}.Q4_K_M.gguf\n") and 'PARAMETER stop "<|im_end|>"' in text
    found = report(tmp_path / "out")
    assert found[f"{name}.F32.gguf"]["types"] == {"F32": 20}
    # rows of 64 and 128 take none of the types with blocks of 256
    assert found[f"{name}.Q4_K_M.gguf"]["types"] == {"Q8_0": 3, "Q5_0": 12, "F32": 5}
    assert found[f"{name}.Q4_K_M.gguf"]["replaced"][0][1:] == ["Q4_K", "Q5_0"]
    assert 0 < found[f"{name}.Q8_0.gguf"]["largest_error"] < 0.02


def test_files_of_other_methods_stay(adapted, tmp_path):
    model, tokenizer = adapted
    model.save_pretrained_gguf(tmp_path / "out", tokenizer, "q8_0", verify=False)
    before = next((tmp_path / "out").glob("*.gguf")).read_bytes()
    model.save_pretrained_gguf(tmp_path / "out", tokenizer, "f16", verify=False)
    kept = next((tmp_path / "out").glob("*Q8_0.gguf"))
    assert kept.read_bytes() == before and artifact.verify(tmp_path / "out") == []
    assert sorted(report(tmp_path / "out")) == sorted(path.name for path in (tmp_path / "out").glob("*.gguf"))


def test_a_file_in_shards(adapted, tmp_path, engine):
    model, tokenizer = adapted
    model.save_pretrained_gguf(tmp_path / "out", tokenizer, "q8_0", max_shard_size="40KB")
    shards = sorted((tmp_path / "out").glob("*.gguf"))
    assert len(shards) > 2 and shards[0].name.endswith(f"Q8_0-00001-of-{len(shards):05d}.gguf")
    model.save_pretrained_gguf(tmp_path / "whole", tokenizer, "q8_0")
    (whole,) = (tmp_path / "whole").glob("*.gguf")
    ids = [list(range(4, 40))]
    both = [runtime.ask(runtime.Request(path, ids=ids)).logits[0] for path in (shards[0], whole)]
    assert torch.equal(*both)
    assert max(path.stat().st_size for path in shards[1:]) < 60_000


def test_a_wrong_order_of_rows_is_caught(adapted, tmp_path, engine, monkeypatch):
    model, tokenizer = adapted
    monkeypatch.setattr(tensors.Rule, "reorder", lambda self, tensor: tensor)
    with pytest.raises(ExportError, match="does not predict"):
        model.save_pretrained_gguf(tmp_path / "out", tokenizer, "f16")
    assert list(tmp_path.iterdir()) == []


def test_wrong_values_are_caught_without_llama_cpp(adapted, tmp_path, monkeypatch):
    model, tokenizer = adapted
    encode = quantize.encode
    monkeypatch.setattr(quantize, "encode", lambda *args: np.ascontiguousarray(encode(*args)[::-1]))
    with pytest.raises(ExportError, match="quantized values of"):
        model.save_pretrained_gguf(tmp_path / "out", tokenizer, "q4_0", verify=False)
    assert list(tmp_path.iterdir()) == []


def test_lost_metadata_is_caught(adapted, tmp_path, monkeypatch):
    model, tokenizer = adapted
    typed = quantize.typed
    lossy = lambda metadata: {k: v for k, v in typed(metadata).items() if k != "tokenizer.chat_template"}
    monkeypatch.setattr(quantize, "typed", lossy)
    with pytest.raises(ExportError, match="chat_template"):
        model.save_pretrained_gguf(tmp_path / "out", tokenizer, "f16", verify=False)


def test_a_tensor_that_is_not_written_is_caught(tmp_path):
    planned = [file.Planned("x", (4,), Type.F32), file.Planned("y", (4,), Type.F32)]
    with pytest.raises(ExportError, match="not written.*y"):
        with file.Writer(tmp_path / "x.gguf", "llama", {}, planned) as writer:
            writer.put("x", np.ones(4, dtype=np.float32))
    with pytest.raises(ExportError, match="12 bytes instead of 16"):
        with file.Writer(tmp_path / "x.gguf", "llama", {}, planned) as writer:
            writer.put("x", np.ones(3, dtype=np.float32))


def test_without_llama_cpp_the_report_says_so(adapted, tmp_path, monkeypatch):
    model, tokenizer = adapted
    monkeypatch.setattr(runtime, "available", lambda: None)
    model.save_pretrained_gguf(tmp_path / "out", tokenizer, "q8_0")
    (found,) = report(tmp_path / "out").values()
    assert found["comparison"] is None and "gguf-run" in found["not_checked"][-1]
    assert found["tensors"] == 20 and found["largest_error"] < 0.02


def test_mistakes_are_known_before_anything_is_computed(adapted, tmp_path, monkeypatch):
    model, tokenizer = adapted
    monkeypatch.setattr(save.Conversion, "write", lambda *args: pytest.fail("a file was written"))
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="q4_k_m"):
        model.save_pretrained_gguf(out, tokenizer, "q4_k_x")
    with pytest.raises(ConfigError, match="tokenizer"):
        model.save_pretrained_gguf(out)
    with pytest.raises(ConfigError, match="first_conversion"):
        model.save_pretrained_gguf(out, tokenizer, first_conversion="q8_0")
    with pytest.raises(ConfigError, match="max_shard_size"):
        model.save_pretrained_gguf(out, tokenizer, max_shard_size="4 apples")
    with pytest.raises(ExportError, match="imatrix"):
        (tmp_path / "x.imatrix").write_bytes(b"nothing")
        model.save_pretrained_gguf(out, tokenizer, "q2_k", imatrix_file=tmp_path / "x.imatrix")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(StorageError, match="bytes needed, 10 free"):
        model.save_pretrained_gguf(out, tokenizer)
    assert not out.exists()


def test_the_package_that_quantizes_is_named(adapted, tmp_path, monkeypatch):
    model, tokenizer = adapted
    monkeypatch.setitem(sys.modules, "libgguf", None)  # importing it fails
    monkeypatch.setattr(runtime, "available", lambda: None)
    with pytest.raises(ConfigError, match=r"libgguf.*unsloth\[export\]"):
        model.save_pretrained_gguf(tmp_path / "out", tokenizer, "q4_k_m")
    model.save_pretrained_gguf(tmp_path / "out", tokenizer, "f16", verify=False)


def test_without_it_llama_cpps_own_quantizer_works(adapted, tmp_path, engine, monkeypatch):
    model, tokenizer = adapted
    model.save_pretrained_gguf(tmp_path / "first", tokenizer, "q4_k_m", verify=False)
    found = importlib.util.find_spec
    monkeypatch.setitem(sys.modules, "libgguf", None)
    hidden = lambda name, *more: None if name == "libgguf" else found(name, *more)
    monkeypatch.setattr(quantize.importlib.util, "find_spec", hidden)
    model.save_pretrained_gguf(tmp_path / "second", tokenizer, "q4_k_m", verify=False)
    (one,), (two,) = ((tmp_path / folder).glob("*.gguf") for folder in ("first", "second"))
    ours, theirs = file.Reader(one), file.Reader(two)
    others = {tensor.name: tensor for tensor in theirs}
    assert all((ours.raw(tensor) == theirs.raw(others[tensor.name])).all() for tensor in ours)
    with pytest.raises(ConfigError, match="libgguf"):
        model.save_pretrained_gguf(tmp_path / "third", tokenizer, "q4_k_m", max_shard_size="1MB")


def test_a_disk_that_becomes_full_leaves_nothing(adapted, tmp_path, monkeypatch):
    model, tokenizer = adapted

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(quantize, "encode", full)
    with pytest.raises(StorageError, match="disk became full"):
        model.save_pretrained_gguf(tmp_path / "out", tokenizer, "q8_0", verify=False)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_name_of_the_way_of_cutting_words_is_caught(adapted, tmp_path, engine):
    model, tokenizer = adapted
    with pytest.raises((TokenizerError, ExportError), match=r"llama\.cpp"):
        model.save_pretrained_gguf(tmp_path / "out", tokenizer, "f16", pre_tokenizer="no-such-name")
    assert not (tmp_path / "out").exists()


def test_the_model_is_as_it_was(adapted, tmp_path, engine):
    model, tokenizer = adapted
    model.train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model.save_pretrained_gguf(tmp_path / "out", tokenizer, "q8_0")
    assert all(module.training for module in model.modules())
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_a_model_without_an_adapter_and_added_tokens(tiny, tmp_path, engine):
    model, tokenizer = FastLanguageModel.from_pretrained(str(tiny()), max_seq_length=64, load_in_16bit=True)
    tokenizer.add_tokens(["<|new|>"], special_tokens=True)
    model.resize_token_embeddings(len(tokenizer) + 3)
    model.save_pretrained_gguf(tmp_path / "out", tokenizer, "f16")
    (path,) = (tmp_path / "out").glob("*.gguf")
    header = gguf_header.read(path)
    words = header.metadata["tokenizer.ggml.tokens"]
    assert words[260:] == ["<|new|>", "[PAD261]", "[PAD262]", "[PAD263]"]
    answer = runtime.ask(runtime.Request(path, texts=["a<|new|>b"]))
    assert answer.tokens[0] == tokenizer("a<|new|>b").input_ids and 260 in answer.tokens[0]
