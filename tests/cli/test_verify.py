"""``unsloth verify``: every difference is found and said in words."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from unsloth import FastLanguageModel
from unsloth.cli.main import app
from unsloth.export.gguf import runtime

WRITES_BOS = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def engine():
    if runtime.available() is None:
        pytest.skip("llama.cpp is not installed (extra gguf-run)")


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """An adapter, the model merged with it, GGUF files of both, and of the base alone."""
    folder = tmp_path_factory.mktemp("made")
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(tiny()), max_seq_length=128, dtype=torch.float32, load_in_16bit=True
    )
    model.save_pretrained_gguf(folder / "base_gguf", tokenizer, "q8_0")
    model = FastLanguageModel.get_peft_model(model, r=4)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained_merged(folder / "adapter", tokenizer, save_method="lora")
    model.save_pretrained_merged(folder / "merged", tokenizer)
    model.save_pretrained_gguf(folder / "gguf", tokenizer, ["f16", "q4_0"])
    return folder


def verified(target, base, *more):
    command = ["verify", str(target), "--against", str(base), *map(str, more)]
    result = CliRunner().invoke(app, command)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code == 0, " ".join(result.output.split())


def test_what_was_exported_is_the_model(made, tiny):
    for target in ("merged", "gguf"):
        well, text = verified(made / target, tiny(), "--adapter", made / "adapter")
        assert well and "Everything that was compared is alike" in text and "PROBLEM" not in text, text
        assert "the chat template" in text and "tokens of" in text
    if runtime.available():
        assert text.count("predictions: same next token") == 2 and "greedy answer" in text


def test_an_adapter_that_is_not_in_it(made, tiny, engine):
    for target in ("base_gguf", tiny()):
        well, text = verified(made / target, tiny(), "--adapter", made / "adapter")
        assert not well and "the adapter is not in it" in text and "This is not the model" in text


def test_another_base(made, tiny, tmp_path, engine):
    well, text = verified(next((made / "gguf").glob("*F16.gguf")), tiny("qwen2"))
    assert not well and "wrong base: the file is a llama model, the original is qwen2" in text
    well, text = verified(made / "merged", tiny("qwen2"))
    assert not well and "wrong base: the folder has a llama model" in text
    shutil.copytree(tiny(), tmp_path / "other")
    weights = load_file(tmp_path / "other" / "model.safetensors")
    changed = {name: tensor.flip(0).contiguous() for name, tensor in weights.items()}
    save_file(changed, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    for target in (made / "merged", next((made / "gguf").glob("*F16.gguf"))):
        well, text = verified(target, tmp_path / "other")
        assert not well and "predictions are another model's" in text
    result = CliRunner().invoke(
        app, ["verify", str(made / "merged"), "--against", "some/other", "--adapter", str(made / "adapter")]
    )
    assert "wrong base: the adapter in" in str(result.exception) and "--against" in str(result.exception)


def test_missing_tensors_templates_and_damage(made, tiny, tmp_path):
    shutil.copytree(made / "merged", tmp_path / "lost")
    weights = load_file(tmp_path / "lost" / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "lost" / "model.safetensors", metadata={"format": "pt"})
    well, text = verified(tmp_path / "lost", tiny(), "--adapter", made / "adapter")
    assert not well and "missing tensors (1): model.layers.1.mlp.up_proj.weight" in text
    assert "model.safetensors has" in text  # the manifest says so, too
    shutil.copytree(made / "merged", tmp_path / "template")
    for path in (tmp_path / "template").glob("*template*"):
        path.write_text(path.read_text().replace("im_end", "im_stop"))
    well, text = verified(tmp_path / "template", tiny(), "--adapter", made / "adapter")
    assert not well and "wrong chat template: at character" in text and "im_stop" in text


def test_a_double_beginning(tiny, tmp_path, engine):
    """A tokenizer that puts a first token before every text, and a template that writes one too."""
    base = tmp_path / "base"
    shutil.copytree(tiny(), base)
    content = json.loads((base / "tokenizer.json").read_text())
    bos = content["added_tokens"][0]
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": bos["content"], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos["content"]: {"id": bos["content"], "ids": [bos["id"]], "tokens": [bos["content"]]}},
    }
    (base / "tokenizer.json").write_text(json.dumps(content))
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**settings, "bos_token": bos["content"]}))
    (base / "chat_template.jinja").write_text(WRITES_BOS)
    model, tokenizer = FastLanguageModel.from_pretrained(str(base), max_seq_length=128, load_in_16bit=True)
    model.save_pretrained_gguf(tmp_path / "gguf", tokenizer, "f16")
    well, text = verified(tmp_path / "gguf", base)
    assert well and "double BOS: the chat template writes" in text
    plain = tmp_path / "plain"
    shutil.copytree(tiny(), plain)
    well, text = verified(tmp_path / "gguf", plain)
    assert not well and "double BOS: a first token is put before every text" in text
