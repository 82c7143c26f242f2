import errno
import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, TextStreamer

from unsloth import FastLanguageModel
from unsloth.core import artifact
from unsloth.core.errors import ConfigError, ExportError, StorageError
from unsloth.export import layout, merge
from unsloth.export.merge import merged_tensors


def model_with_adapter(folder, precision="load_in_4bit", **options):
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=128, dtype=torch.float32, **{precision: True}
    )
    model = FastLanguageModel.get_peft_model(model, r=4, **options)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model.eval(), tokenizer


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}])
@pytest.mark.parametrize("precision", ["load_in_4bit", "load_in_16bit"])
def test_merged_weights_are_the_model(tiny, precision, options):
    folder = tiny("llama", tied=False)
    model, _ = model_with_adapter(folder, precision, **options)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plain.load_state_dict(dict(merged_tensors(model, torch.float32)))
    ids = torch.arange(4, 60)[None]
    with torch.no_grad():
        assert (model(input_ids=ids).logits - plain(input_ids=ids).logits).abs().max() < 1e-4


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("llama", False), ("qwen2", True), ("qwen3", False)])
def test_the_saved_folder_loads_in_plain_transformers(tiny, tmp_path, family, tied):
    model, tokenizer = model_with_adapter(tiny(family, tied))
    comparison = model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    assert comparison.top1_agreement > 0.9
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert plain.dtype == torch.bfloat16
    assert plain.config.tie_word_embeddings == tied


def test_the_adapter_loads_in_plain_peft(tiny, tmp_path):
    folder = tiny()
    model, tokenizer = model_with_adapter(folder, "load_in_16bit")
    model.save_pretrained_merged(tmp_path / "adapter", tokenizer, save_method="lora")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter").eval()
    ids = torch.arange(4, 60)[None]
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-5)


def test_unknown_methods_and_pickle_are_refused(tiny, tmp_path):
    model, tokenizer = model_with_adapter(tiny())
    with pytest.raises(ConfigError, match="merged_16bit"):
        model.save_pretrained_merged(tmp_path / "x", tokenizer, save_method="merged_2bit")
    with pytest.raises(ConfigError, match="pickle"):
        model.save_pretrained(tmp_path / "x", safe_serialization=False)
    assert not (tmp_path / "x").exists()


def test_a_full_disk_leaves_nothing_half_written(tiny, tmp_path, monkeypatch):
    model, tokenizer = model_with_adapter(tiny())
    for save in (
        lambda: model.save_pretrained(tmp_path / "x"),
        lambda: model.save_pretrained_merged(tmp_path / "x", tokenizer),
    ):
        with monkeypatch.context() as patch:
            usage = shutil.disk_usage(tmp_path)
            patch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage._replace(free=10))
            with pytest.raises(StorageError, match="bytes needed, 10 free"):
                save()
        with monkeypatch.context() as patch:
            patch.setattr(artifact, "write_manifest", raise_disk_full)
            with pytest.raises(StorageError, match="disk became full"):
                save()
        assert list(tmp_path.iterdir()) == []


def raise_disk_full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_wrong_merge_is_caught(tiny, tmp_path, monkeypatch):
    model, tokenizer = model_with_adapter(tiny())
    right, in_checkpoint = merge.merged_weight, layout.in_checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(merge, "merged_weight", lambda *args, **options: right(*args, **options) * 1.05)
        with pytest.raises(ExportError, match=r"layers\.0"):
            model.save_pretrained_merged(tmp_path / "x", tokenizer)

    def with_a_wrong_sign(*args):
        for name, tensor in in_checkpoint(*args):
            yield name, -tensor if name.endswith("layers.1.mlp.down_proj.weight") else tensor

    monkeypatch.setattr(layout, "in_checkpoint", with_a_wrong_sign)
    with pytest.raises(ExportError, match="does not predict"):
        model.save_pretrained_merged(tmp_path / "x", tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_int8_models_are_merged_and_left_as_they_were(tiny, tmp_path):
    model, tokenizer = model_with_adapter(tiny(), "load_in_8bit")
    ids = torch.arange(4, 60)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        assert model.save_pretrained_merged(tmp_path / "merged", tokenizer).median_kl < 0.05
        assert torch.equal(model(input_ids=ids).logits, before)


def test_generation_streams_and_training_goes_on_unharmed(tiny, tokenizer):
    model, _ = model_with_adapter(tiny())
    ids = torch.arange(4, 60)[None]
    before = gradients(model, ids)
    FastLanguageModel.for_inference(model)
    pieces = []

    class Collect(TextStreamer):
        def on_finalized_text(self, text, stream_end=False):
            pieces.append(text)

    model.generate(input_ids=ids, max_new_tokens=5, do_sample=False, streamer=Collect(tokenizer))
    assert pieces
    FastLanguageModel.for_training(model)
    for name, gradient in gradients(model, ids).items():
        assert torch.allclose(gradient, before[name], atol=1e-6), name


def gradients(model, ids):
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("trained", [["lm_head"], ["embed_tokens"]])
def test_a_tied_weight_that_was_trained_apart_is_saved_apart(tiny, tmp_path, trained):
    model, tokenizer = model_with_adapter(tiny("llama", tied=True), "load_in_16bit", modules_to_save=trained)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    ids = torch.arange(4, 60)[None]
    with torch.no_grad():
        difference = plain(input_ids=ids).logits - model(input_ids=ids).logits
    assert difference.abs().max() < 0.1
    assert not torch.equal(plain.lm_head.weight, plain.model.embed_tokens.weight)
