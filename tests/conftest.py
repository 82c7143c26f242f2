"""Small parts that many tests share: a byte-level tokenizer, tiny random models, and the embedded real model."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>"]
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="run the long forms of the reliability tests")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--soak") or "soak" in (config.getoption("-m") or ""):
        return
    for item in items:
        if item.get_closest_marker("soak") is not None:
            item.add_marker(pytest.mark.skip(reason="a long form, run by make soak"))


def pytest_collection_finish() -> None:
    """Let the collector pass over all that is imported by now: accelerate collects before and after every training."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or extension modules complain of leaks at exit


@pytest.fixture(scope="session")
def soak(request: pytest.FixtureRequest) -> bool:
    """Whether the long forms of tests were asked for (``make soak``)."""
    return request.config.getoption("--soak")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and ChatML's special tokens: 260 in all."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<pad>",
        additional_special_tokens=["<|endoftext|>", "<|im_start|>"],
        chat_template=CHATML,
    )


def make_tiny(folder: Path, family: str = "llama", tied: bool = True, positions: int = 512) -> Path:
    """Save a random 2-layer model with grouped heads, whose weights are large enough to matter, and its tokenizer."""
    config_class, model_class = FAMILIES[family]
    tokenizer = byte_tokenizer()
    config = config_class(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=positions,
        tie_word_embeddings=tied,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    model = model_class(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
        elif "bias" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``tiny(family, tied)``: the folder of a tiny model, made once a session; not to be written to."""
    made: dict[tuple[str, bool], Path] = {}

    def get(family: str = "llama", tied: bool = True) -> Path:
        if (family, tied) not in made:
            made[family, tied] = make_tiny(tmp_path_factory.mktemp(f"{family}-{tied}"), family, tied)
        return made[family, tied]

    return get


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of the embedded real model, SmolLM2-135M-Instruct."""
    from unsloth.models import embedded

    return embedded.folder()


@pytest.fixture
def conversations() -> list[dict]:
    """Twenty short conversations of one or two exchanges, of different lengths."""
    rows = []
    for i in range(20):
        messages = [
            {"role": "user", "content": f"Say {'very ' * (i % 5)}well: {i}"},
            {"role": "assistant", "content": "well " * (1 + i % 3) + str(i)},
        ]
        if i % 4 == 0:
            messages += [{"role": "user", "content": "again"}, {"role": "assistant", "content": f"well, {i}"}]
        rows.append({"messages": messages})
    return rows
