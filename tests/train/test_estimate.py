"""The estimate against the allocator's own record of real training steps."""

import gc
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForSequenceClassification, LlamaConfig, Qwen3Config

from unsloth import (
    CPOConfig,
    CPOTrainer,
    DPOConfig,
    DPOTrainer,
    FastLanguageModel,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    ORPOConfig,
    ORPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from unsloth.memory.budget import Budget
from unsloth.models.adapters import AdapterOptions
from unsloth.models.load import LoadOptions
from unsloth.train import fit, skeleton
from unsloth.train.estimate import estimate, read_config

SWITCHES = {"4bit": "load_in_4bit", "8bit": "load_in_8bit", "16bit": "load_in_16bit", "full": "full_finetuning"}


def measured(folder, precision, policy, dtype, length, **training):
    """Bytes of the model, and of what came on top of it in two training steps."""
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=256, dtype=dtype, fast_layers=False, **{SWITCHES[precision]: True}
    )  # the estimate is of the layers as transformers and PEFT have them
    model = FastLanguageModel.get_peft_model(model, r=8, use_gradient_checkpointing=policy)
    batch = training["per_device_train_batch_size"]
    # One row of a batch has the full length, the others are padded to it.
    rows = [{"input_ids": [5 + j % 200 for j in range(length - (0 if i % batch == 0 else 9))]} for i in range(48)]
    arguments = SFTConfig(
        max_steps=2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        train_sampling_strategy="sequential",
        **training,
    )
    return peak_of(model, SFTTrainer(model=model, tokenizer=tokenizer, train_dataset=rows, args=arguments))


def peak_of(model, trainer):
    """Bytes of the model, and of what comes on top of it while it trains."""
    gc.collect()  # what an earlier measurement left must not be freed, and so subtracted, during this one
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        trainer.train()
    now = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    tensors = [*model.parameters(), *model.buffers(), *quantization_tensors(model)]
    sizes = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(sizes.values()), peak


def quantization_tensors(model):
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            yield from (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)


CASES = [
    ("16bit", False, "float32", 128, {"per_device_train_batch_size": 1}),
    ("16bit", "unsloth", "bfloat16", 128, {"per_device_train_batch_size": 4}),
    ("4bit", False, "float32", 200, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
    ("4bit", "unsloth", "float32", 128, {"per_device_train_batch_size": 4}),
    ("full", False, "bfloat16", 128, {"per_device_train_batch_size": 1}),
    ("full", "unsloth", "float32", 128, {"per_device_train_batch_size": 4, "optim": "sgd"}),
    ("full", "unsloth", "float32", 16, {"per_device_train_batch_size": 1, "optim": "adamw_torch"}),
]


@pytest.mark.parametrize(("precision", "policy", "dtype", "length", "training"), CASES)
def test_the_estimate_is_what_is_allocated(tiny, tmp_path, precision, policy, dtype, length, training):
    training = {**training, "output_dir": str(tmp_path)}
    static, working = measured(tiny(), precision, policy, dtype, length, **training)
    options = LoadOptions(
        str(tiny()), 256, getattr(torch, dtype), precision=precision, use_gradient_checkpointing=policy
    )
    adapter = None if precision == "full" else AdapterOptions(r=8, use_gradient_checkpointing=policy)
    found = estimate(options, adapter, SFTConfig(**training), sequence_length=length)
    assert found.static == pytest.approx(static, rel=0.03)
    assert found.total - found.static == pytest.approx(working, rel=0.1)
    assert sum(found.parts().values()) == found.total


PREFERENCE = {
    "dpo": (DPOTrainer, DPOConfig, "4bit"),
    "kto": (KTOTrainer, KTOConfig, "16bit"),
    "orpo": (ORPOTrainer, ORPOConfig, "16bit"),
    "cpo, whole logits": (CPOTrainer, CPOConfig, "16bit"),
    "dpo, all weights": (DPOTrainer, DPOConfig, "full"),
    "reward": (RewardTrainer, RewardConfig, "4bit"),
}


@pytest.mark.parametrize("method", PREFERENCE)
def test_the_estimate_of_preference_training_is_what_is_allocated(tiny, tmp_path, method):
    trainer, config, precision = PREFERENCE[method]
    folder, length, batch = tiny(), 160, 3
    head = {"auto_model": AutoModelForSequenceClassification, "num_labels": 1} if method == "reward" else {}
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=256, dtype=torch.float32, fast_layers=False, **{SWITCHES[precision]: True}, **head
    )
    model = FastLanguageModel.get_peft_model(model, r=8, use_gradient_checkpointing=False)

    def answer(count):
        return [5 + j % 200 for j in range(count)]

    if method == "kto":
        rows = [{"prompt_ids": [7], "completion_ids": answer(length - 1 - i % 3), "label": i > 2} for i in range(6)]
    else:
        rows = [{"prompt_ids": [7], "chosen_ids": answer(length - 1), "rejected_ids": answer(length - 9)}] * 6
    more = {"fused_head": False} if "whole" in method else {}
    args = config(
        output_dir=str(tmp_path),
        per_device_train_batch_size=batch,
        gradient_checkpointing=False,
        max_length=length,
        max_steps=2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **more,
    )
    made = trainer(model=model, processing_class=tokenizer, train_dataset=Dataset.from_list(rows), args=args)
    static, working = peak_of(model, made)
    options = LoadOptions(str(folder), 256, torch.float32, precision=precision, use_gradient_checkpointing=False)
    adapter = None if precision == "full" else AdapterOptions(r=8, use_gradient_checkpointing=False)
    found = estimate(options, adapter, args, sequence_length=length)
    copies = 2 if precision == "full" else 1
    assert found.static == pytest.approx(copies * static, rel=0.03)
    assert found.total - found.static == pytest.approx(working, rel=0.1)


@pytest.mark.parametrize(("precision", "accumulated"), [("4bit", 1), ("16bit", 2)])
def test_the_estimate_of_grpo_is_what_is_allocated(tiny, tmp_path, precision, accumulated):
    folder, prompt, completion = tiny(), 40, 120
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=256, dtype=torch.float32, fast_layers=False, **{SWITCHES[precision]: True}
    )
    model = FastLanguageModel.get_peft_model(model, r=8, use_gradient_checkpointing=False)
    ends = {token: -100.0 for token in range(4)}  # so that every completion has its full length
    args = GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=8,
        gradient_accumulation_steps=accumulated,
        num_generations=4,
        gradient_checkpointing=False,
        max_prompt_length=prompt,
        max_completion_length=completion,
        vllm_sampling_params={"logit_bias": ends},
        max_steps=2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    rows = [{"prompt": " ".join(f"{i}{j}" for j in range(60 if i % 2 else 5))} for i in range(8)]

    def reward(completions, **_):
        return [float(place) for place, _ in enumerate(completions)]

    made = GRPOTrainer(model, reward, args, rows, processing_class=tokenizer)
    static, working = peak_of(model, made)
    options = LoadOptions(str(folder), 256, torch.float32, precision=precision, use_gradient_checkpointing=False)
    found = estimate(options, AdapterOptions(r=8, use_gradient_checkpointing=False), args)
    assert found.sequence_length == prompt + completion
    assert found.static == pytest.approx(static, rel=0.03)
    assert found.total - found.static == pytest.approx(working, rel=0.1)


# GiB on an H100 while sampling and while training (docs/performance-log.md): completions of so many tokens to prompts
# of so many, a batch of so many, activations within 1 GiB
ON_A_GPU = {
    "1.5B, NF4": ((28, 1536, 8960, 12, 2, 151936), "4bit", (256, 512, 8, 1), (1.479, 2.686)),
    "8B, NF4": ((32, 4096, 14336, 32, 8, 128256), "4bit", (512, 2048, 8, 1), (8.076, 8.343)),
    "8B, NF4, 20K tokens": ((32, 4096, 14336, 32, 8, 128256), "4bit", (512, 20000, 1, 8), (27.164, 8.744)),
    "1.7B": ((28, 2048, 6144, 16, 8, 151936), "16bit", (256, 512, 8, 8), (7.516, 5.040)),
}


@pytest.mark.parametrize("case", ON_A_GPU)
def test_the_estimate_of_grpo_on_a_gpu(tmp_path, case):
    (layers, hidden, inner, heads, key_heads, vocabulary), precision, lengths, measured = ON_A_GPU[case]
    prompt, completion, batch, accumulated = lengths
    kind = LlamaConfig if precision == "4bit" else Qwen3Config
    config = kind(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=key_heads, max_position_embeddings=32768,
        tie_word_embeddings=hidden < 4096,
    )  # fmt: skip
    policy = Budget(device=2**30)
    options = LoadOptions("random", prompt + completion, torch.bfloat16, precision=precision)
    adapter = AdapterOptions(r=32, use_gradient_checkpointing=policy)
    training = GRPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulated,
        steps_per_generation=accumulated, num_generations=8, max_completion_length=completion, optim="adamw_8bit",
    )  # fmt: skip
    found = estimate(options, adapter, training, config=config, on_gpu=True)
    sampling = found.static + found.optimizer + found.cache + found.sampling
    assert sampling / 2**30 == pytest.approx(measured[0], rel=0.1)
    assert sum(found.parts().values()) / 2**30 == pytest.approx(measured[1], rel=0.1)
    assert found.total == max(sampling, sum(found.parts().values()))


@pytest.mark.parametrize("precision", ["4bit", "16bit", "full"])
def test_the_plan_of_a_skeleton_is_that_of_the_loaded_model(tiny, precision):
    options = LoadOptions(str(tiny()), 128, torch.float32, precision=precision)
    adapter = None if precision == "full" else AdapterOptions(r=4)
    found = skeleton.build(read_config(options), options, adapter).plan
    model, _ = FastLanguageModel.from_pretrained(
        str(tiny()), max_seq_length=128, dtype=torch.float32, **{SWITCHES[precision]: True}
    )
    model = FastLanguageModel.get_peft_model(model, r=4)
    # the first line says whether it is applied
    assert str(found).splitlines()[1:] == str(model.unsloth_plan).splitlines()[1:]
    assert skeleton.build(read_config(options), options, adapter, fast_layers=False).plan is None


@pytest.fixture
def plan(tiny, tmp_path):
    options = LoadOptions(str(tiny()), 512, torch.float32, precision="16bit", use_gradient_checkpointing=False)
    training = SFTConfig(output_dir=str(tmp_path), per_device_train_batch_size=4, max_length=256)
    return fit.Plan(options, AdapterOptions(r=8, use_gradient_checkpointing=False), training, read_config(options))


def test_parameters_and_memory_follow_the_options(plan):
    base = plan.memory()
    wide = replace(plan, adapter=replace(plan.adapter, r=64))  # matrices of more than 4,096 numbers
    assert wide.with_training(optim="adamw_8bit").memory().optimizer < wide.memory().optimizer * 0.5
    assert plan.with_checkpointing().memory().activations < base.activations
    fused = plan.with_training(fused_head=True).memory()
    assert fused.logits < base.logits and fused.activations <= base.activations * 1.05
    # Rank times (inputs + outputs), over q and o, k and v, gate, up and down, in two layers.
    assert base.trainable_parameters == 2 * 8 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))


def test_the_largest_batch_fits_and_one_more_does_not(plan):
    now = plan.memory()
    limit = now.static + 3 * (now.total - now.static)
    batch = fit.largest_batch(plan, limit, now)
    assert batch > 4
    assert plan.with_training(per_device_train_batch_size=batch).memory().total <= limit
    assert plan.with_training(per_device_train_batch_size=batch + 1).memory().total > limit
    assert fit.largest_batch(plan, now.static, now) == 0


def test_the_longest_rows_fit_and_are_no_longer_than_the_model_knows(plan):
    now = plan.memory()
    length = fit.largest_length(plan, now.total * 3 // 4, now)
    assert 0 < length < 256 and length % 64 == 0
    assert plan.with_training(max_length=length).memory().total <= now.total * 3 // 4
    assert fit.largest_length(plan, 2**40, now) == 512


def test_what_would_help_grpo(tiny, tmp_path):
    options = LoadOptions(str(tiny()), 512, torch.float32, precision="16bit", use_gradient_checkpointing=False)
    training = GRPOConfig(output_dir=str(tmp_path), per_device_train_batch_size=8, max_completion_length=256)
    adapter = AdapterOptions(r=8, use_gradient_checkpointing=False)
    plan = fit.Plan(options, adapter, training, read_config(options))
    now = plan.memory()
    assert plan.length == 512 and now.cache > 0
    settings = " ".join(knob.setting for knob in fit.knobs(plan, now))
    assert "steps_per_generation: 8" in settings and "max_completion_length: 128" in settings
    length = fit.largest_length(plan, now.total * 3 // 4, now)
    assert 256 < length < 512 and plan.with_length(length).memory().total <= now.total * 3 // 4


def test_the_knobs_save_memory_and_leave_out_what_is_set_already(plan):
    now = plan.memory()
    found = fit.knobs(plan, now)
    assert [knob.memory.total for knob in found] == sorted(knob.memory.total for knob in found)
    assert all(knob.memory.total < now.total for knob in found)
    settings = " ".join(knob.setting for knob in found)
    assert "batch_size: 1" in settings and "checkpointing" in settings and "load_in_4bit" in settings
    assert "checkpointing" not in " ".join(k.setting for k in fit.knobs(plan.with_checkpointing(), now))


@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_on_the_host_is_counted_there(tiny, tied):
    loading = LoadOptions(str(tiny("llama", tied)), precision="4bit", dtype=torch.bfloat16)
    adapter, training = AdapterOptions(r=4), SFTConfig(per_device_train_batch_size=1, report_to="none", use_cpu=True)
    training._checkpointing_follows_model = True

    def of(offload, on_gpu=True):
        options = replace(loading, offload_embedding=offload)
        return estimate(options, adapter, training, sequence_length=64, on_gpu=on_gpu)

    embedding = 0 if tied else 260 * 64 * 2
    stays, moved = of(False), of(True)
    assert stays.weights - moved.weights == moved.host - stays.host == embedding
    assert stays.total - moved.total == embedding
    assert of(True, on_gpu=False) == of(False, on_gpu=False)
