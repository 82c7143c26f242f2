"""Positions beyond a model's own length use scaled frequencies: those that transformers computes for that scaling."""

import json
import math
import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from unsloth import FastLanguageModel
from unsloth.core.errors import ConfigError
from unsloth.models import rope

OWN = 512  # positions of the tiny models
HALF = 8  # frequencies of a head
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SHORT, LONG = [1.0] * HALF, [1.0, 1.0, 1.5, 2.0, 3.0, 4.0, 4.0, 4.0]
LONGROPE = {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG}
YARN = {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.1 * math.log(4.0) + 1}


def folder_with(tiny, tmp_path, parameters, positions=OWN):
    """A copy of the tiny model whose configuration has these RoPE parameters."""
    folder = shutil.copytree(tiny(), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_theta": 10000.0, **parameters}
    config["max_position_embeddings"] = positions
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def load(folder, length, **options):
    return FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=length, dtype=torch.float32, load_in_16bit=True, **options
    )


def expected(positions, length, **parameters):
    """Frequencies and scaling of cosines, as transformers computes them from a configuration made by hand."""
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        head_dim=16,
        max_position_embeddings=positions,
        rope_parameters={"rope_theta": 10000.0, **parameters},
    )
    return ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu", seq_len=length)


CASES = {
    "default becomes yarn": (
        {},
        OWN,
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
        2048,
    ),
    "linear": ({"rope_type": "linear", "factor": 2.0}, 1024, {"rope_type": "linear", "factor": 4.0}, 2048),
    "dynamic": ({"rope_type": "dynamic", "factor": 2.0}, OWN, {"rope_type": "dynamic", "factor": 4.0}, OWN),
    "yarn": (
        YARN | {"original_max_position_embeddings": 128},
        OWN,
        {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 128},
        2048,
    ),
    "llama3": (
        LLAMA3 | {"original_max_position_embeddings": 128},
        OWN,
        LLAMA3 | {"factor": 16.0, "original_max_position_embeddings": 128},
        2048,
    ),
    "longrope": (
        LONGROPE | {"original_max_position_embeddings": 128},
        OWN,
        # ln(16) / ln(4) = 2: every divisor is squared
        LONGROPE | {"long_factor": [x**2 for x in LONG], "original_max_position_embeddings": 128},
        2048,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_longer_sequence_uses_the_scaled_frequencies(tiny, tmp_path, case):
    before, positions, after, after_positions = CASES[case]
    model, _ = load(folder_with(tiny, tmp_path, before, positions), 2048)
    rotary = model.model.rotary_emb
    position_ids = torch.arange(2040, 2048)[None]
    frequencies, scale = expected(after_positions, 2048, **after)
    cosines, _ = rotary(torch.zeros(1, 8, 64), position_ids)
    angles = position_ids[0, :, None].float() * frequencies
    assert torch.allclose(cosines[0, :, :HALF], angles.cos() * scale, atol=1e-3)
    unscaled = position_ids[0, :, None].float() / 10000.0 ** (torch.arange(HALF) / HALF)
    assert not torch.allclose(cosines[0, :, :HALF], unscaled.cos(), atol=0.1)
    assert rope.longest(model.config) == 2048 == model.max_seq_length


def test_the_scaling_is_in_what_is_saved(tiny, tmp_path):
    """Merged, it loads alike in plain transformers; as an adapter, here, also when no length is asked for."""
    model, tokenizer = load(tiny(), 1536)
    model = FastLanguageModel.get_peft_model(model, r=2)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.arange(600)[None] % 250
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    config = AutoConfig.from_pretrained(tmp_path / "merged")
    assert config.rope_parameters["rope_type"] == "yarn" and config.rope_parameters["factor"] == 3.0
    assert config.max_position_embeddings == 1536
    model.save_pretrained(tmp_path / "adapter")
    again, _ = load(tmp_path / "adapter", 128)
    plain_base = AutoModelForCausalLM.from_pretrained(tiny(), config=model.config, dtype=torch.float32)
    plain = PeftModel.from_pretrained(plain_base, tmp_path / "adapter").eval()
    unscaled = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny()), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(again.eval()(input_ids=ids).logits, logits)
        assert torch.allclose(plain(input_ids=ids).logits, logits, atol=1e-5)
        assert not torch.allclose(unscaled(input_ids=ids).logits, logits, atol=0.1)


def test_rope_scaling_overrides(tiny, tmp_path):
    model, _ = load(tiny(), 1000, rope_scaling={"type": "linear", "factor": 2})
    frequencies, _ = expected(1024, None, rope_type="linear", factor=2.0)
    assert torch.allclose(model.model.rotary_emb.inv_freq, frequencies)
    with pytest.raises(ConfigError, match="1,024 positions that rope_scaling reaches"):
        load(tiny(), 2000, rope_scaling={"type": "linear", "factor": 2})
    llama3 = folder_with(tiny, tmp_path, LLAMA3 | {"original_max_position_embeddings": 128})
    model, _ = load(llama3, 1024, rope_scaling={"rope_type": "yarn", "factor": 8.0})
    frequencies, scale = expected(1024, None, rope_type="yarn", factor=8.0, original_max_position_embeddings=128)
    assert torch.allclose(model.model.rotary_emb.inv_freq, frequencies)
    assert model.model.rotary_emb.attention_scaling == pytest.approx(scale)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"factor": 2.0}, "rope_type"),
        ({"rope_type": "jarn", "factor": 2.0}, "Known are"),
        ({"rope_type": "yarn"}, "Add factor"),
        ({"rope_type": "linear", "factor": 0.5}, "at least 1"),
        ({"rope_type": "linear", "factor": float("nan")}, "at least 1"),
        ({"rope_type": "linear", "factor": 2.0, "beta": 1}, "Remove beta"),
        ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}, "list of 8 numbers"),
        ("yarn", "must be a mapping"),
    ],
)
def test_a_wrong_rope_scaling_is_refused(wanted, message):
    with pytest.raises(ConfigError, match=message):
        rope.override(LlamaConfig(hidden_size=64, num_attention_heads=4), wanted)


def test_layers_with_a_window_are_left_alone():
    from transformers import Gemma3TextConfig

    config = Gemma3TextConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=512)
    window = dict(config.rope_parameters["sliding_attention"])
    rope.extend(config, 1024)
    assert config.rope_parameters["sliding_attention"] == window
    assert config.rope_parameters["full_attention"]["factor"] == 2.0


def test_a_model_without_rotary_positions_says_so():
    from transformers import GPT2Config

    with pytest.raises(ConfigError, match="no rotary position embedding"):
        rope.extend(GPT2Config(), 4096)
