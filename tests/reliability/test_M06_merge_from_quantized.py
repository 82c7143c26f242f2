"""M06: merging from a quantized base, whatever was run before, gives its dequantized weights and the adapter's change.

On a CPU, evaluating a 4-bit layer may repack its weight in place; a merge that reads it afterwards gets noise.
"""

import json

import pytest
import torch
from bitsandbytes import functional
from safetensors.torch import load_file, save_file

from unsloth import FastLanguageModel
from unsloth.core.errors import ExportError
from unsloth.export import merge
from unsloth.quant import fp8

LAYER = "model.layers.1.mlp.down_proj"


def adapted(folder, precision):
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=64, dtype=torch.bfloat16, **{precision: True}
    )
    model = FastLanguageModel.get_peft_model(model, r=4)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model, tokenizer


def use(model, how):
    ids = torch.arange(4, 30)[None]
    if how == "evaluated":
        FastLanguageModel.for_inference(model)
        with torch.no_grad():
            model(input_ids=ids)
        model.generate(input_ids=ids, max_new_tokens=2)
    elif how == "trained":
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


def update(model):
    layer = model.get_submodule(f"base_model.model.{LAYER}")
    return (layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]).detach()


@pytest.mark.parametrize("how", ["never run", "evaluated", "trained"])
@pytest.mark.parametrize("precision", ["load_in_4bit", "load_in_8bit"])
def test_the_merged_weight_is_the_dequantized_base_and_the_change(tiny, precision, how):
    weight = load_file(tiny() / "model.safetensors")[f"{LAYER}.weight"].to(torch.bfloat16)
    if precision == "load_in_4bit":
        codes, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        base = functional.dequantize_4bit(codes, state).float()
    else:
        scale = weight.float().abs().amax(1, keepdim=True) / 127
        base = (weight.float() / scale).round() * scale
    model, _ = adapted(tiny(), precision)
    use(model, how)
    merged = dict(merge.merged_tensors(model, torch.float32))[f"{LAYER}.weight"]
    expected = base + update(model)
    assert (merged - expected).norm() / expected.norm() < (1e-6 if precision == "load_in_4bit" else 0.005)
    assert torch.nn.functional.cosine_similarity(merged.flatten(), expected.flatten(), dim=0) > 0.999


def test_an_adapter_merged_into_the_codes_themselves_is_refused(tiny):
    model, _ = adapted(tiny(), "load_in_4bit")
    model.merge_adapter()
    with pytest.raises(ExportError, match=r"already merged into quantized weights.*unmerge_adapter"):
        dict(merge.merged_tensors(model))


def test_an_fp8_checkpoint_is_merged_from_what_was_loaded(tiny, tmp_path):
    tensors = load_file(tiny() / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        tensors[name], tensors[name + fp8.SCALE_SUFFIX] = fp8.quantize(tensors[name], (32, 32))
    for path in tiny().glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, tokenizer = adapted(tmp_path, "load_in_16bit")
    base = fp8.dequantize(tensors[f"{LAYER}.weight"], tensors[f"{LAYER}.weight{fp8.SCALE_SUFFIX}"], (32, 32))
    merged = dict(merge.merged_tensors(model, torch.float32))[f"{LAYER}.weight"]
    assert torch.allclose(merged, base.to(torch.bfloat16).float() + update(model), atol=1e-6)
    model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
