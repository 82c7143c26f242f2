import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from unsloth import FastLanguageModel
from unsloth.cli.export import ExportOptions, dry_run, export
from unsloth.core.errors import AdapterError, ConfigError
from unsloth.export.forecast import forecast


@pytest.fixture(scope="module")
def adapters(tiny, tmp_path_factory):
    """Two adapters on one base."""
    folder = tmp_path_factory.mktemp("adapters")
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(tiny()), max_seq_length=64, dtype=torch.float32, load_in_16bit=True
    )
    model = FastLanguageModel.get_peft_model(model, r=4)
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.05)
        model.save_pretrained_merged(folder / name, tokenizer, save_method="lora")
    return folder


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_adapters_are_scaled_averaged_and_combined(adapters, tiny, tmp_path, capsys):
    common = {"name": str(adapters / "first"), "precision": "16bit"}
    export(ExportOptions(out=str(tmp_path / "one"), **common))
    assert "same next token" in capsys.readouterr().out
    export(ExportOptions(out=str(tmp_path / "half"), adapter_scale=0.5, **common))
    export(ExportOptions(out=str(tmp_path / "both"), further=[f"{adapters / 'second'}=-2"], **common))
    export(ExportOptions(out=str(tmp_path / "other"), **{**common, "name": str(adapters / "second")}))
    name = "model.layers.0.self_attn.v_proj.weight"
    base = load_file(tiny() / "model.safetensors")[name]
    one, half, both, other = (weights(tmp_path / x)[name].float() - base for x in ("one", "half", "both", "other"))
    assert torch.allclose(half, one / 2, atol=4e-3) and torch.allclose(both, one - 2 * other, atol=8e-3)
    assert both.norm() > 1.5 * one.norm()


@pytest.mark.parametrize("method", ["merged_16bit", "merged_4bit_forced", "lora"])
def test_a_dry_run_writes_nothing_and_knows_the_size(adapters, tmp_path, capsys, method):
    options = ExportOptions(name=str(adapters / "first"), out=str(tmp_path / "x"), method=method, push_to="me/model")
    dry_run(options)
    text = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [] and "me/model, private" in text and method in text
    expected = forecast(options.name, options.out, method)
    export(ExportOptions(name=options.name, out=options.out, method=method, precision="16bit"))
    written = sum(path.stat().st_size for path in (tmp_path / "x").glob("*.safetensors"))
    header = 20_000  # of small files; in 4 bits there are tables for every weight too
    assert expected.nbytes <= written < expected.nbytes + header * (3 if "4bit" in method else 1)
    assert expected.files == 1


def test_the_head_that_an_adapter_brings_is_counted(tiny, tmp_path):
    model, tokenizer = FastLanguageModel.from_pretrained(str(tiny()), max_seq_length=64, load_in_16bit=True)
    model = FastLanguageModel.get_peft_model(model, r=4, modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path / "adapter")
    plain, own = (forecast(str(name), tmp_path, "merged_16bit") for name in (tiny(), tmp_path / "adapter"))
    assert own.tensors == plain.tensors + 1 and own.nbytes == plain.nbytes + 260 * 64 * 2


def test_what_cannot_be_exported(adapters, tiny, tmp_path):
    common = {"name": str(adapters / "first"), "out": str(tmp_path / "x")}
    with pytest.raises(ConfigError, match="merged_4bit_forced"):
        export(ExportOptions(method="merged_4bit", **common))
    with pytest.raises(ConfigError, match="FOLDER=WEIGHT"):
        export(ExportOptions(further=["adapter=much"], **common))
    with pytest.raises(AdapterError, match="adds adapters to an adapter"):
        export(ExportOptions(name=str(tiny()), out=common["out"], further=["a=1"]))
    with pytest.raises(AdapterError, match="no adapter"):
        forecast(str(tiny()), tmp_path, "lora")
    other = tmp_path / "other"
    shutil.copytree(adapters / "second", other)
    tensors = load_file(other / "adapter_model.safetensors")
    save_file({n.replace("layers.1", "layers.7"): t for n, t in tensors.items()}, other / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"layers\.7.*does not have"):
        export(ExportOptions(further=[str(other)], **common))
