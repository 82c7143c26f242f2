"""Our trainer against plain transformers and PEFT: same rows, same seed, same losses and weights.

The reference is written here with AutoModel, get_peft_model and transformers.Trainer only; it tokenizes and masks
by its own means.
"""

from __future__ import annotations

import peft
import pytest
import torch
import transformers
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainingArguments

from unsloth import FastLanguageModel, SFTConfig, SFTTrainer, train_on_responses_only
from unsloth.models import families

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PRECISIONS = {"lora": {"load_in_16bit": True}, "qlora": {"load_in_4bit": True}, "full": {"full_finetuning": True}}


def plain_run(folder, rows, precision, arguments, responses_only, targets=TARGETS):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = "right"
    quantization = None
    if precision == "qlora":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=quantization)
    for module in model.modules():  # the bitsandbytes trap on AVX512-BF16 machines
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if precision != "full":
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        transformers.set_seed(3407)
        model = peft.get_peft_model(
            model, LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")
        )
    encoded = []
    for row in rows:
        ids, labels = [], []
        for message in row["messages"]:
            header = f"<|im_start|>{message['role']}\n"
            body = f"{message['content']}<|im_end|>\n"
            for text, trained in (
                (header, not responses_only),
                (body, not responses_only or message["role"] == "assistant"),
            ):
                part = tokenizer(text, add_special_tokens=False).input_ids
                ids += part
                labels += part if trained else [-100] * len(part)
        encoded.append({"input_ids": ids, "labels": labels})
    trainer = transformers.Trainer(
        model=model,
        args=TrainingArguments(**arguments),
        train_dataset=encoded,
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
    )
    trainer.train()
    return losses(trainer), weights(model)


def our_run(folder, rows, precision, arguments, responses_only, checkpointing=False, **adapter):
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=512, dtype=torch.float32, **PRECISIONS[precision]
    )
    model = FastLanguageModel.get_peft_model(
        model, r=8, lora_alpha=16, use_gradient_checkpointing=checkpointing, **adapter
    )
    trainer = SFTTrainer(model=model, tokenizer=tokenizer, train_dataset=rows, args=SFTConfig(**arguments))
    if responses_only:
        trainer = train_on_responses_only(trainer)
    trainer.train()
    return losses(trainer), weights(model)


def losses(trainer):
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def arguments(tmp_path, **changes):
    return {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 20,
        "learning_rate": 2e-4,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": "none",
        "optim": "adamw_torch",
        "bf16": False,
        "seed": 11,
        "use_cpu": True,
        "disable_tqdm": True,
        **changes,
    }


def assert_same(ours, plain):
    our_losses, our_weights = ours
    plain_losses, plain_weights = plain
    assert len(our_losses) == len(plain_losses) == 20
    assert abs(our_losses[0] - plain_losses[0]) < 1e-5
    assert (our_losses - plain_losses).abs().max() < 1e-4
    assert our_weights.keys() == plain_weights.keys()
    assert len(our_weights) > 0
    worst = max((our_weights[name] - plain_weights[name]).abs().max() for name in our_weights)
    assert worst < 1e-4
    assert our_losses[-1] != our_losses[0]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("precision", ["lora", "qlora", "full"])
def test_tiny_models_train_as_with_plain_libraries(tiny, conversations, tmp_path, family, precision):
    folder = tiny(family)
    plain = plain_run(folder, conversations, precision, arguments(tmp_path), responses_only=False)
    assert_same(our_run(folder, conversations, precision, arguments(tmp_path), responses_only=False), plain)


def test_responses_only_with_checkpointing_trains_as_with_plain_libraries(tiny, conversations, tmp_path):
    folder = tiny("llama", tied=False)
    plain = plain_run(folder, conversations, "lora", arguments(tmp_path), responses_only=True)
    ours = our_run(folder, conversations, "lora", arguments(tmp_path), responses_only=True, checkpointing="unsloth")
    assert_same(ours, plain)


SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "head_dim": 16}


@pytest.mark.parametrize(
    ("family", "precision", "targets"),
    [
        ("Olmo2", "qlora", TARGETS),
        ("SeedOss", "lora", TARGETS),
        ("Starcoder2", "lora", "all-linear"),
        ("Persimmon", "qlora", "all-linear"),
    ],
)
def test_a_family_without_a_spec_trains_as_with_plain_libraries(
    tokenizer, conversations, tmp_path, family, precision, targets
):
    """No targets are named; their dropouts fall the same way."""
    ids = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = getattr(transformers, f"{family}Config")(**SIZES, **ids, eos_token_id=tokenizer.eos_token_id)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    assert families.find(model) is None
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    settings = arguments(tmp_path)
    plain = plain_run(tmp_path / "model", conversations, precision, settings, responses_only=False, targets=targets)
    assert_same(our_run(tmp_path / "model", conversations, precision, settings, responses_only=False), plain)


@pytest.mark.model
def test_smollm2_trains_as_with_plain_libraries(smollm2, conversations, tmp_path):
    # The template of this model writes a system message by itself unless there is one.
    rows = [{"messages": [{"role": "system", "content": "Be brief."}, *row["messages"]]} for row in conversations]
    settings = arguments(tmp_path, gradient_accumulation_steps=1)
    plain = plain_run(smollm2, rows, "qlora", settings, responses_only=True)
    assert_same(our_run(smollm2, rows, "qlora", settings, responses_only=True), plain)
