"""GGUF files as a training base."""

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM

from unsloth import FastLanguageModel
from unsloth.core.errors import CheckpointError, ConfigError, ModelError, ModelNotFoundError

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(name):
    name = name.removeprefix("model.")
    if name.startswith("layers."):
        _, number, rest = name.split(".", 2)
        module, kind = rest.rsplit(".", 1)
        return f"blk.{number}.{NAMES[module]}.{kind}"
    return {"embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}[name]


def write_gguf(folder, tokenizer, target, architecture="qwen2"):
    """Write the tiny qwen2 model (no reordering of weights in that architecture) as float32 GGUF."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = model.config
    writer = gguf.GGUFWriter(target, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    tokens += ["he", "ll"]  # a tokenizer without merges cannot be read from GGUF
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 4 + [gguf.TokenType.NORMAL] * (len(tokens) - 4))
    writer.add_token_merges(["h e", "l l"])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    model.resize_token_embeddings(len(tokens))
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":
            writer.add_tensor(gguf_name(name), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def folder(tiny, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("UNSLOTH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "repo").mkdir()
    write_gguf(tiny("qwen2"), tokenizer, tmp_path / "repo" / "tiny.gguf")
    return tmp_path / "repo"


def load(folder, **options):
    return FastLanguageModel.from_pretrained(str(folder), max_seq_length=128, **options)


def test_a_gguf_file_becomes_a_training_base(tiny, folder, tmp_path):
    model, tokenizer = load(folder, gguf_file="tiny.gguf", load_in_16bit=True, dtype=torch.bfloat16)
    plain = AutoModelForCausalLM.from_pretrained(tiny("qwen2"), dtype=torch.bfloat16)
    ids = torch.arange(4, 60)[None]
    with torch.no_grad():
        difference = model(input_ids=ids).logits[..., :260] - plain(input_ids=ids).logits
    assert difference.abs().max() < 0.25  # logits of size 10 in bfloat16
    assert tokenizer.eos_token == "<|im_end|>" and "im_start" in tokenizer.chat_template
    converted = list((tmp_path / "cache" / "gguf").iterdir())
    model, _ = load(folder, gguf_file="tiny.gguf", load_in_4bit=True)
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    assert list((tmp_path / "cache" / "gguf").iterdir()) == converted
    FastLanguageModel.get_peft_model(model, r=2).save_pretrained(tmp_path / "adapter")
    assert load(tmp_path / "adapter")[0].peft_config["default"].r == 2


def test_wrong_files_are_named(folder, tiny, tokenizer, tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"no such GGUF file.*There are: tiny\.gguf"):
        load(folder, gguf_file="other.gguf")
    with pytest.raises(ConfigError, match="name of a file"):
        load(folder, gguf_file="../repo/tiny.gguf")
    with pytest.raises(ModelNotFoundError, match="gguf_file="):
        load(folder / "tiny.gguf")
    with pytest.raises(CheckpointError, match="config.json"):
        load(folder)
    content = (folder / "tiny.gguf").read_bytes()
    (folder / "page.gguf").write_bytes(b"<html>")
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        load(folder, gguf_file="page.gguf")
    (folder / "cut.gguf").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"cut\.gguf is damaged.*ends"):
        load(folder, gguf_file="cut.gguf")
    write_gguf(tiny("qwen2"), tokenizer, folder / "odd.gguf", architecture="plamo3")
    with pytest.raises(ModelError, match="architecture.*original model"):
        load(folder, gguf_file="odd.gguf")
    assert not (tmp_path / "cache" / "gguf").exists() or not any((tmp_path / "cache" / "gguf").iterdir())
