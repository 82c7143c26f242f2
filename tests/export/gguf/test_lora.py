"""LoRA adapters as GGUF, added by llama.cpp to a file of the base model."""

import pytest
import torch

from unsloth import FastLanguageModel
from unsloth.core.errors import AdapterError, ExportError
from unsloth.export import verify
from unsloth.export.gguf import runtime, tensors
from unsloth.models import gguf_header


def load(folder, **options):
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=128, dtype=torch.float32, load_in_16bit=True
    )
    model = FastLanguageModel.get_peft_model(model, r=4, **options)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model, tokenizer


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("qwen3", {"use_rslora": True, "lora_alpha": 3}),
        ("llama", {"scaled": 3.0}),
    ],
)
def test_llama_cpp_adds_the_adapter(family, options, tiny, tmp_path, engine):
    options = dict(options)
    scaled = options.pop("scaled", 1.0)
    model, tokenizer = load(tiny(family), **options)
    for name, module in model.named_modules():
        if name.endswith("1.self_attn.q_proj"):
            module.scaling["default"] *= scaled  # as an alpha of its own would
    model.save_pretrained_gguf(tmp_path / "adapter", tokenizer, "f32", save_method="lora")
    (path,) = (tmp_path / "adapter").glob("*.gguf")
    base, _ = FastLanguageModel.from_pretrained(
        str(tiny(family)), max_seq_length=128, dtype=torch.float32, load_in_16bit=True
    )
    base.save_pretrained_gguf(tmp_path / "base", tokenizer, "f32")
    ids = list(range(4, 60))
    (base_path,) = (tmp_path / "base").glob("*.gguf")
    found = runtime.ask(runtime.Request(base_path, ids=[ids], adapter=path)).logits[0]
    with torch.no_grad():
        expected, without = (m(input_ids=torch.tensor([ids])).logits[0] for m in (model, base))
    assert verify.compare(expected, found).mean_kl < 1e-6
    assert verify.compare(expected, without).mean_kl > 1e-3
    header = gguf_header.read(path)
    assert header.metadata["general.type"] == "adapter" and len(header.tensors) == 2 * 14


def test_a_wrong_adapter_is_caught(tiny, tmp_path, engine, monkeypatch):
    model, tokenizer = load(tiny())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter *= 5
    reorder = tensors.Rule.reorder
    wrong = lambda self, tensor: tensor if tensor.shape[1] == 4 else reorder(self, tensor)
    monkeypatch.setattr(tensors.Rule, "reorder", wrong)
    with pytest.raises(ExportError, match="does not predict"):
        model.save_pretrained_gguf(tmp_path / "adapter", tokenizer, "f16", save_method="lora")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_what_llama_cpp_cannot_add_is_named(options, tiny, tmp_path):
    model, tokenizer = load(tiny("llama", False), **options)
    with pytest.raises(AdapterError, match=r"LoRA on linear layers only.*merged"):
        model.save_pretrained_gguf(tmp_path / "adapter", tokenizer, "f16", save_method="lora")


def test_a_model_without_an_adapter_and_a_quantized_adapter(tiny, tmp_path):
    model, tokenizer = load(tiny())
    with pytest.raises(ExportError, match="f32, f16 or bf16"):
        model.save_pretrained_gguf(tmp_path / "adapter", tokenizer, "q4_k_m", save_method="lora")
    base, _ = FastLanguageModel.from_pretrained(str(tiny()), max_seq_length=128, load_in_16bit=True)
    with pytest.raises(AdapterError, match="no adapter"):
        base.save_pretrained_gguf(tmp_path / "adapter", tokenizer, "f16", save_method="lora")
