import logging
import math
from collections import defaultdict

import pytest
import torch
from datasets import Dataset
from trl.trainer.grpo_config import GRPOConfig as TRLConfig
from trl.trainer.grpo_trainer import GRPOTrainer as TRLTrainer

from unsloth import FastLanguageModel, GRPOConfig, GRPOTrainer
from unsloth.core.errors import ConfigError

ROWS = [{"prompt": f"Say {i}:", "answer": str(i)} for i in range(16)]


def adapted(folder, **options):
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=128, dtype=torch.float32, **{"load_in_16bit": True, **options}
    )
    return FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=False), tokenizer


def settings(tmp_path, **changes):
    return {
        "output_dir": str(tmp_path),
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 12,
        "learning_rate": 1e-2,
        "disable_tqdm": True,
        "use_cpu": True,
        **changes,
    }


def share_of_e(completions, **_):
    return [completion.count("e") / max(len(completion), 1) for completion in completions]


def length(completions, **_):
    return [float(len(completion)) for completion in completions]


def trainer_of(tiny, tmp_path, reward_funcs=share_of_e, rows=ROWS, callbacks=None, model=None, more=None, **changes):
    model, tokenizer = model or adapted(tiny())
    args = GRPOConfig(**settings(tmp_path, **changes))
    return GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=reward_funcs,
        args=args,
        train_dataset=rows,
        callbacks=callbacks,
        **(more or {}),
    )


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.fixture
def said(caplog):
    """The warnings and notes of the library, also those that are said once."""
    logger = logging.getLogger("unsloth")
    logger.propagate = True
    for name, child in logging.root.manager.loggerDict.items():
        if name.startswith("unsloth") and isinstance(child, logging.Logger):
            for found in child.filters:
                getattr(found, "_seen", set()).clear()
    with caplog.at_level(logging.INFO, logger="unsloth"):
        yield caplog
    logger.propagate = False


DOCUMENTED = """
from unsloth import FastLanguageModel, PatchFastRL
PatchFastRL("GRPO", FastLanguageModel)
from trl import GRPOConfig, GRPOTrainer

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name = MODEL,
    max_seq_length = 64,
    load_in_4bit = True,
    fast_inference = True,
    max_lora_rank = 4,
    gpu_memory_utilization = 0.6,
)
model = FastLanguageModel.get_peft_model(model, r = 4, use_gradient_checkpointing = "unsloth", random_state = 3407)
from unsloth import SamplingParams
training_args = GRPOConfig(
    vllm_sampling_params = SamplingParams(
        min_p = 0.1,
        top_p = 1.0,
        top_k = -1,
        seed = 3407,
        stop = [tokenizer.eos_token],
        include_stop_str_in_output = True,
    ),
    temperature = 1.0,
    learning_rate = 5e-5,
    weight_decay = 0.01,
    warmup_ratio = 0.1,
    lr_scheduler_type = "linear",
    optim = "adamw_8bit",
    logging_steps = 1,
    per_device_train_batch_size = 1,
    gradient_accumulation_steps = 1,
    num_generations = 2,
    max_prompt_length = 24,
    max_completion_length = 8,
    max_steps = 2,
    save_steps = 100,
    report_to = "none",
    output_dir = "outputs",
    use_vllm = True,
)
trainer = GRPOTrainer(
    model = model,
    processing_class = tokenizer,
    reward_funcs = [share_of_e, length],
    args = training_args,
    train_dataset = ROWS,
)
trainer.train()
"""


def test_the_documented_call_runs(tiny, tmp_path, monkeypatch):
    from unsloth import compat

    monkeypatch.chdir(tmp_path)
    names = {"MODEL": str(tiny()), "share_of_e": share_of_e, "length": length}
    names["ROWS"] = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in ROWS]
    try:
        exec(compile(DOCUMENTED, "the documented call", "exec"), names)
    finally:
        compat.unbind()
    trainer = names["trainer"]
    assert isinstance(trainer, GRPOTrainer) and isinstance(trainer, TRLTrainer)
    assert trainer.state.global_step == 2
    assert trainer.args.per_device_train_batch_size == 2  # raised to num_generations
    assert trainer.rollouts is not None and trainer.rollouts.params.min_p == 0.1
    assert len(logged(trainer, "rewards/length/mean")) == 2


def test_the_reward_rises(tiny, tmp_path):
    changes = {"max_steps": 30, "per_device_train_batch_size": 16, "num_generations": 8, "learning_rate": 3e-2}
    trainer = trainer_of(tiny, tmp_path, beta=0.01, **changes)
    trainer.train()
    rewards = logged(trainer, "reward")
    assert sum(rewards[-5:]) / 5 > 0.15 > 5 * sum(rewards[:5]) / 5
    # training and sampling agree on every step, on weights that have moved
    assert max(logged(trainer, "sampling/sampling_logp_difference/max")) < 1e-4
    assert not logged(trainer, "sampling/importance_sampling_ratio/mean")  # nothing to correct
    for name in ("entropy", "kl", "clip_ratio/region_mean", "rollout/tokens_per_second", "completions/mean_length"):
        assert all(math.isfinite(value) for value in logged(trainer, name))
    assert list(trainer.model.peft_config) == ["default"]


BATCHES = [
    ({"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "steps_per_generation": 4}, 3),
    ({"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4, "steps_per_generation": 4}, 3),
    ({"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4, "steps_per_generation": 4}, 4),
    ({"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2, "steps_per_generation": 2}, 3),
]
FLOWS = [
    ["000", "111", "222", "333", "444", "555", "666", "777"],
    ["000", "111", "222", "333", "444", "555", "666", "777"],
    ["000", "011", "112", "222", "333", "344", "445", "555"],
    ["000111", "222333", "444555", "666777"],
]


@pytest.mark.parametrize("example", range(4))
def test_the_documented_batch_examples(tiny, tmp_path, example):
    """Which prompts each batch holds, and after which batches the optimizer steps."""
    batches, group = BATCHES[example]
    rows = [{"prompt": f"{i}"} for i in range(8)]
    updates = len(FLOWS[example]) // batches["gradient_accumulation_steps"]
    trainer = trainer_of(
        tiny, tmp_path, rows=rows, **batches, num_generations=group, max_steps=updates, shuffle_dataset=False,
        max_completion_length=2,
    )  # fmt: skip
    seen, stepped, generated = [], [], []
    loss, sample = trainer._compute_loss, trainer.sample

    def compute(model, inputs):
        ids = inputs["prompt_ids"]
        seen.append("".join(trainer._tokenizer.batch_decode(ids, skip_special_tokens=True)))
        stepped.append(trainer.state.global_step)
        return loss(model, inputs)

    def counted(prompts, params=None):
        generated.append(len(seen))
        return sample(prompts, params)

    trainer._compute_loss, trainer.sample = compute, counted
    trainer.train()
    assert seen == FLOWS[example]
    accumulated = batches["gradient_accumulation_steps"]
    assert stepped == [number // accumulated for number in range(len(seen))]
    assert generated == list(range(0, len(seen), batches["steps_per_generation"]))


def test_a_batch_below_a_group_is_raised_to_it(tmp_path, said):
    made = GRPOConfig(**settings(tmp_path, per_device_train_batch_size=1, num_generations=4))
    assert (made.per_device_train_batch_size, made.generation_batch_size) == (4, 4)
    assert "raised from 1 to num_generations, 4" in said.text
    kept = GRPOConfig(**settings(tmp_path, per_device_train_batch_size=1, num_generations=4, steps_per_generation=4))
    assert kept.per_device_train_batch_size == 1
    with pytest.raises(ConfigError, match="divisible by num_generations"):
        GRPOConfig(**settings(tmp_path, per_device_train_batch_size=6, num_generations=4))


# Parity


def injected(trainer, seed=0, lengths=(3, 9, 5, 12, 1, 7, 12, 4)):
    """A generation batch of made-up completions to two prompts of different length, with old log-probabilities."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    completions = torch.randint(4, 200, (8, width), generator=generator)
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    prompts = torch.randint(4, 200, (2, 6), generator=generator).repeat_interleave(4, 0)
    prompt_mask = torch.ones_like(prompts)
    prompt_mask[4:, :2] = 0
    pad = trainer._tokenizer.pad_token_id
    return {
        "prompt_ids": prompts.masked_fill(prompt_mask == 0, pad),
        "prompt_mask": prompt_mask,
        "completion_ids": completions.masked_fill(mask == 0, pad),
        "completion_mask": mask,
        "advantages": torch.randn(8, generator=generator),
        "old_per_token_logps": torch.rand((8, width), generator=generator) - 6,
        "ref_per_token_logps": torch.rand((8, width), generator=generator) - 6,
        "num_items_in_batch": mask.sum().float(),
    }


def loss_and_gradients(trainer, inputs):
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, dict(inputs))
    loss.backward()
    names = [name for name, p in trainer.model.named_parameters() if p.requires_grad and ".ref." not in name]
    return loss.detach(), {name: trainer.model.get_parameter(name).grad.clone() for name in names}


CASES = {
    "dapo": {},
    "grpo": {"loss_type": "grpo", "epsilon_high": 0.28},
    "bnpo": {"loss_type": "bnpo", "beta": 0.04},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": False},
    "two-sided": {"delta": 1.5, "beta": 0.1, "use_bias_correction_kl": False},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "beta": 0.01},
    "warm": {"temperature": 0.7, "beta": 0.04},
    "on policy": {"beta": 0.04},
    "cispo": {"loss_type": "cispo", "epsilon_high": 4.0},
    "sapo": {"loss_type": "sapo"},
    "vespo": {"loss_type": "vespo"},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "high entropy": {"top_entropy_quantile": 0.3},
    "entropy bonus": {"entropy_coef": 0.1},
}


@pytest.fixture(scope="module")
def shared_model(tiny):
    model, tokenizer = adapted(tiny())
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # so that there are gradients for both factors
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.02
    return model, tokenizer


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_trls(shared_model, tmp_path, case):
    changes = settings(tmp_path, **CASES[case])
    ours = trainer_of(None, tmp_path, model=shared_model, **CASES[case])
    inputs = injected(ours)
    if case == "on policy":
        del inputs["old_per_token_logps"]
    found = loss_and_gradients(ours, inputs)
    model, tokenizer = shared_model
    theirs = TRLTrainer(
        model=model, processing_class=tokenizer, reward_funcs=share_of_e, args=TRLConfig(**changes, bf16=False),
        train_dataset=Dataset.from_list(ROWS),
    )  # fmt: skip
    try:
        expected = loss_and_gradients(theirs, inputs)
    finally:
        if "ref" in model.peft_config:  # TRL's copy of the adapter
            model.delete_adapter("ref")
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    assert found[1].keys() == expected[1].keys() and any(grad.any() for grad in found[1].values())
    for name, grad in found[1].items():
        torch.testing.assert_close(grad, expected[1][name], rtol=1e-4, atol=1e-5, msg=name)


def test_the_loss_is_that_of_the_paper(shared_model, tmp_path):
    """Independent of both: whole logits of one completion at a time, and the formula written out."""
    trainer = trainer_of(None, tmp_path, model=shared_model, loss_type="grpo", beta=0.04, temperature=0.9)
    inputs = injected(trainer)
    loss, grads = loss_and_gradients(trainer, inputs)
    model = trainer.model
    model.zero_grad()
    total = 0.0
    for i in range(8):
        prompt = inputs["prompt_ids"][i][inputs["prompt_mask"][i].bool()]
        completion = inputs["completion_ids"][i][inputs["completion_mask"][i].bool()]
        logits = model(input_ids=torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
        every = (logits / 0.9).log_softmax(-1)
        terms = 0.0
        for t, token in enumerate(completion):
            ratio = torch.exp(every[t, token] - inputs["old_per_token_logps"][i, t])
            advantage = inputs["advantages"][i]
            surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            gap = inputs["ref_per_token_logps"][i, t] - every[t, token]
            terms = terms + surrogate - 0.04 * ratio * (torch.exp(gap) - gap - 1)
        total = total - terms / len(completion) / 8
    total.backward()
    torch.testing.assert_close(loss, total.detach(), rtol=1e-5, atol=1e-6)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, model.get_parameter(name).grad, rtol=1e-4, atol=1e-6, msg=name)
