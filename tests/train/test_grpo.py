import logging
import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from grpo_trainers import ROWS, adapted, length, logged, settings, share_of_e, trainer_of
from trl.trainer.grpo_config import GRPOConfig as TRLConfig
from trl.trainer.grpo_trainer import GRPOTrainer as TRLTrainer

from unsloth import FastLanguageModel, GRPOConfig, GRPOTrainer
from unsloth.core.errors import ConfigError, TrainingError
from unsloth.losses.policy import sampling_correction
from unsloth.train import rollouts


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


# Prompts, engines, precisions


def test_each_row_has_its_own_variables_for_the_template(tiny, tmp_path, tokenizer):
    template = (
        "{{ reasoning_effort }}/{{ style }}: {% for m in messages %}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %} ->{% endif %}"
    )
    rows = [
        {"prompt": [{"role": "user", "content": text}], "reasoning_effort": effort, "chat_template_kwargs": style}
        for text, effort, style in (("a", "low", {"style": "x"}), ("b", "high", None))
    ]
    seen = []

    def reward(prompts, completions, reasoning_effort):
        seen.extend(zip((p[0]["content"] for p in prompts), reasoning_effort, strict=True))
        assert all(completion[0]["role"] == "assistant" for completion in completions)
        return [0.0] * len(completions)

    model, own = adapted(tiny())
    own.chat_template = template
    changes = {"max_steps": 1, "num_generations": 4, "chat_template_kwargs": {"style": "plain"}}
    trainer = trainer_of(None, tmp_path, reward, rows, model=(model, own), **changes)
    batches, compute = [], trainer._compute_loss
    trainer._compute_loss = lambda model, inputs: batches.append(inputs) or compute(model, inputs)
    trainer.train()
    texts = own.batch_decode(batches[0]["prompt_ids"], skip_special_tokens=True)
    assert sorted(texts) == ["high/plain: b ->"] * 4 + ["low/x: a ->"] * 4
    assert sorted(seen) == [("a", "low")] * 4 + [("b", "high")] * 4


def test_full_fine_tuning_keeps_a_copy_as_the_reference(tiny, tmp_path):
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(tiny()), max_seq_length=128, dtype=torch.float32, full_finetuning=True
    )
    trainer = trainer_of(None, tmp_path, length, model=(model, tokenizer), beta=0.1, max_steps=3, learning_rate=1e-3)
    before = {name: p.clone() for name, p in trainer.ref_model.named_parameters()}
    trainer.train()
    kl = logged(trainer, "kl")
    assert kl[0] == pytest.approx(0, abs=1e-5) and kl[-1] > 1e-5
    assert all(torch.equal(p, before[name]) for name, p in trainer.ref_model.named_parameters())
    with pytest.raises(ConfigError, match="sync_ref_model needs a reference of its own"):
        trainer_of(None, tmp_path, length, model=(model, tokenizer), sync_ref_model=True)
    assert max(logged(trainer, "sampling/sampling_logp_difference/max")) < 1e-4


def test_sft_first_then_grpo_on_the_same_model(tiny, tmp_path):
    from unsloth import SFTConfig, SFTTrainer

    model, tokenizer = adapted(tiny(), load_in_4bit=True, load_in_16bit=False)
    texts = [{"text": f"Say {i}: eeee"} for i in range(8)]
    args = SFTConfig(**{k: v for k, v in settings(tmp_path).items() if k not in ("num_generations", "max_completion_length")})  # fmt: skip # noqa: E501
    SFTTrainer(model=model, tokenizer=tokenizer, train_dataset=texts, args=args).train()
    trainer = trainer_of(None, tmp_path, model=(model, tokenizer), beta=0.01)
    trainer.train()
    assert trainer.state.global_step == 2
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    answer = model.fast_generate(["Say 1:"])[0].outputs[0]  # its own engine still works
    assert answer.token_ids


def test_transformers_samples_where_it_is_asked_to(tiny, tmp_path):
    trainer = trainer_of(tiny, tmp_path, rollout_engine="transformers")
    assert trainer.rollouts is None
    trainer.train()
    assert len(logged(trainer, "reward")) == 2 and not logged(trainer, "rollout/seconds")
    with pytest.raises(ConfigError, match="samples without the engine"):
        trainer.sample([[1]])
    with pytest.raises(ConfigError, match="vLLM is not installed"):
        trainer_of(tiny, tmp_path, rollout_engine="vllm")


def test_tokens_are_weighed_where_precisions_differ(tiny, tmp_path):
    """Training under autocast in bfloat16, sampling in the float32 of the weights."""
    trainer = trainer_of(tiny, tmp_path, bf16=True, vllm_importance_sampling_cap=1.5)
    trainer.train()
    assert max(logged(trainer, "sampling/sampling_logp_difference/max")) > 1e-4
    assert max(logged(trainer, "sampling/importance_sampling_ratio/max")) <= 1.5
    assert min(logged(trainer, "sampling/importance_sampling_ratio/min")) < 1
    without = trainer_of(tiny, tmp_path, bf16=True, vllm_importance_sampling_correction=False)
    without.train()
    assert not logged(without, "sampling/importance_sampling_ratio/max")


def test_a_correction_that_the_loss_of_trl_leaves_out_is_named(tiny, tmp_path, said):
    trainer = trainer_of(tiny, tmp_path, loss_type="cispo", epsilon_high=4.0, vllm_importance_sampling_correction=True)
    assert not trainer._corrects
    assert "tokens are not weighed" in said.text and "cispo" in said.text


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_weights_of_the_correction(mode):
    """Against TRL's way of writing them."""
    generator = torch.Generator().manual_seed(3)
    ours, sampled = (torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    sampled[1, 2] = float("nan")
    mask = (torch.arange(6) < torch.tensor([6, 4, 1, 0])[:, None]).double()
    difference = torch.nan_to_num((ours - sampled) * mask, nan=0.0)
    if mode.startswith("sequence"):
        difference = difference.sum(-1, keepdim=True)
    ratio = difference.exp()
    expected = ratio.clamp(0.5, 2.0)
    if mode.endswith("mask"):
        expected = ratio.masked_fill((ratio < 0.5) | (ratio > 2.0), 0.0)
    torch.testing.assert_close(sampling_correction(ours, sampled, mask, mode, 0.5, 2.0), expected)


def test_every_completion_cut_off_and_masked_gives_no_nan(tiny, tmp_path):
    trainer = trainer_of(
        tiny, tmp_path, length, mask_truncated_completions=True, beta=0.1, max_completion_length=3,
        vllm_sampling_params={"logit_bias": {2: -100.0, 1: -100.0, 0: -100.0, 3: -100.0}, "max_tokens": 3},
    )  # fmt: skip
    before = [p.clone() for p in trainer.model.parameters() if p.requires_grad]
    trainer.train()
    for name in ("loss", "kl", "entropy", "grad_norm"):
        assert logged(trainer, name) == [0.0, 0.0], name
    after = [p for p in trainer.model.parameters() if p.requires_grad]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_a_stop_text_ends_a_completion_and_does_not_cut_it_off(tiny, tmp_path):
    trainer = trainer_of(
        tiny, tmp_path, length, mask_truncated_completions=True, max_steps=1, max_completion_length=6,
        vllm_sampling_params={"stop": ["a", "e", "o", "s", "t", " "]},
    )  # fmt: skip
    ends, batches = [], []
    sample, compute = trainer.sample, trainer._compute_loss

    def sampled(*args):
        ends.append(sample(*args))
        return ends[-1]

    trainer.sample = sampled
    trainer._compute_loss = lambda model, batch: batches.append(batch) or compute(model, batch)
    trainer.train()
    (found,), (batch,) = ends, batches
    stopped = [ids[-1] not in trainer.eos_token_ids for ids in found.ids]
    assert any(over and stop for over, stop in zip(found.finished, stopped, strict=True))
    lengths = [len(ids) for ids, over in zip(found.ids, found.finished, strict=True) if over]
    assert logged(trainer, "completions/clipped_ratio") == pytest.approx([1 - len(lengths) / 8])
    assert logged(trainer, "completions/mean_terminated_length") == pytest.approx([sum(lengths) / len(lengths)])
    assert batch["completion_mask"].sum(1).tolist() == [
        len(ids) * over for ids, over in zip(found.ids, found.finished, strict=True)
    ]
    assert batch["num_items_in_batch"] == sum(lengths)


def test_completions_take_turns_where_the_cache_is_short(tiny, tmp_path, monkeypatch, said):
    found = []
    for share in (1.0, 0.4):
        trainer = trainer_of(tiny, tmp_path, length, max_steps=1)
        whole = rollouts.cache_pages(8, 4, 8, 20, 16) * trainer.rollouts._page_bytes() / 0.8
        monkeypatch.setattr(rollouts, "_free_memory", lambda bytes_=share * whole * 1.05: bytes_)
        trainer.train()
        found.append(logged(trainer, "completions/mean_length") + logged(trainer, "loss"))
    assert found[0] == pytest.approx(found[1], rel=1e-5) and "at a time are sampled" in said.text


def test_what_training_holds_gives_way_to_the_cache(tiny, tmp_path, monkeypatch, said):
    """As dequantized weights and recorded layers do on a GPU that they would fill."""
    held, asked = [], []

    class Keeper:
        def forget(self):
            asked.append(len(held))
            held.clear()

    monkeypatch.setattr(rollouts, "fused_head", SimpleNamespace(keeper_of=lambda model: Keeper()))
    monkeypatch.setattr(rollouts, "_free_memory", lambda: 0.0 if held else math.inf)
    trainer = trainer_of(tiny, tmp_path, max_steps=3)
    loss = trainer._compute_loss

    def training(model, inputs):
        if trainer.state.global_step < 2:
            held.append("weights")
        return loss(model, inputs)

    trainer._compute_loss = training
    trainer.train()
    assert asked == [1, 1] and "at a time are sampled" not in said.text


def test_evaluation_is_repeatable_and_disturbs_nothing(tiny, tmp_path):
    trainer = trainer_of(tiny, tmp_path, length, per_device_eval_batch_size=8)
    held_out = Dataset.from_list([{"prompt": f"Held {i}"} for i in range(4)])
    first, again = trainer.evaluate(held_out), trainer.evaluate(held_out)
    assert first["eval_reward"] == again["eval_reward"]
    assert "eval_completions/mean_length" in first


def test_trls_own_configuration_is_taken(tiny, tmp_path):
    model, tokenizer = adapted(tiny())
    args = TRLConfig(**settings(tmp_path), bf16=False)
    trainer = GRPOTrainer(model, share_of_e, args, ROWS, processing_class=tokenizer)
    assert isinstance(trainer.args, GRPOConfig) and trainer.args.generation_batch_size == 8
    trainer.train()
    assert trainer.state.global_step == 2


def test_what_the_trainer_itself_is_given_is_checked_too(tiny, tmp_path):
    model, tokenizer = adapted(tiny())
    common = {"model": model, "tokenizer": tokenizer, "reward_funcs": length, "train_dataset": ROWS}
    alone = GRPOTrainer(**common, num_generations=16, report_to="none", output_dir=str(tmp_path), use_cpu=True)
    assert alone.args.per_device_train_batch_size == 16 and alone.args.report_to == []
    args = GRPOConfig(**settings(tmp_path))
    beside = GRPOTrainer(**common, args=args, loss_type="gspo", beta=0.1, report_to="none", num_generations=4)
    assert (beside.args.loss_type, beside.args.importance_sampling_level) == ("grpo", "sequence") and beside.beta == 0.1
    for change, message in [({"loss_type": "ppo"}, "unknown loss_type"), ({"num_generations": 2}, "Pass it to GRPO")]:
        with pytest.raises(ConfigError, match=message):
            GRPOTrainer(**common, args=GRPOConfig(**settings(tmp_path)), **change)


@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")  # TRL says that it is experimental
def test_a_rollout_func_answers_every_prompt(tiny, tmp_path):
    def short(prompts, trainer):
        return {"prompt_ids": [[5]] * len(prompts), "completion_ids": [[6]] * 3, "logprobs": [[0.0]] * 3}

    with pytest.raises(TrainingError, match="3 completion_ids for 8 prompts"):
        trainer_of(tiny, tmp_path, more={"rollout_func": short}).train()
    with pytest.raises(TrainingError, match="returned no completion_ids"):
        more = {"rollout_func": lambda prompts, trainer: {"prompt_ids": [[5]] * len(prompts)}}
        trainer_of(tiny, tmp_path, more=more).train()


def test_trls_rloo_keeps_working(tiny, tmp_path):
    from trl import RLOOConfig, RLOOTrainer

    model, tokenizer = adapted(tiny())
    args = RLOOConfig(**settings(tmp_path, beta=0.0), bf16=False)
    trainer = RLOOTrainer(
        model=model,
        reward_funcs=share_of_e,
        args=args,
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 2


def test_cuts_hide_probabilities(tiny, tmp_path):
    """With a temperature and cuts, the engine does not know what training computes, and nothing is compared."""
    trainer = trainer_of(tiny, tmp_path, temperature=0.8, top_p=0.5, max_steps=1)
    trainer.train()
    assert logged(trainer, "sampling/sampling_logp_difference/max") == [0.0]
    plain = trainer_of(tiny, tmp_path, temperature=0.8, max_steps=1)
    plain.train()
    assert 0 < logged(plain, "sampling/sampling_logp_difference/max")[0] < 1e-4
    cut = trainer_of(tiny, tmp_path, top_p=0.5, max_steps=1)
    cut.train()
    assert 0 < logged(cut, "sampling/sampling_logp_difference/max")[0] < 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_generations": 1}, "a group needs two at least"),
        ({"temperature": 0.0}, "greedy completions"),
        ({"rollout_engine": "tgi"}, "unknown rollout_engine"),
        ({"invalid_rewards": "zero"}, "unknown invalid_rewards"),
        ({"max_prompt_length": 0}, "max_prompt_length must be above 0"),
        ({"delta": 1.1}, "delta must be above"),
        ({"vllm_importance_sampling_mode": "word"}, "unknown vllm_importance_sampling_mode"),
        ({"steps_per_generation": 2, "generation_batch_size": 8}, "can not be both configured"),
        ({"num_generation": 4}, "Did you mean num_generations"),
        ({"reward_weights": {"a": 1.0}}, "reward_weights must be a list"),
        ({"loss_type": "ppo"}, "unknown loss_type.*dapo, gspo, cispo"),
        ({"scale_rewards": "std"}, "unknown scale_rewards"),
    ],
)
def test_arguments_that_make_no_sense(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        GRPOConfig(**settings(tmp_path, **changes))


def test_each_reward_has_its_weight(tiny, tmp_path):
    with pytest.raises(ConfigError, match="one number for every reward function: got '1 for share_of_e, length'"):
        trainer_of(tiny, tmp_path, [share_of_e, length], reward_weights=[1.0])
