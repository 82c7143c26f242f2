"""Loss and gradients of GRPO, and how completions are laid for them."""

from collections import defaultdict

import pytest
import torch
from datasets import Dataset
from grpo_trainers import ROWS, adapted, settings, share_of_e, trainer_of
from trl.trainer.grpo_config import GRPOConfig as TRLConfig
from trl.trainer.grpo_trainer import GRPOTrainer as TRLTrainer

from unsloth.layers import packed_attention

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


# Completions of a prompt end to end, the prompt once


@pytest.mark.parametrize("lengths", [(3, 9, 5, 12, 1, 7, 12, 4), (2, 0, 3, 1, 0, 0, 4, 1)])
def test_a_shared_prompt_is_computed_once(tiny, tmp_path, lengths):
    """Completions of length 0 are those that were masked for being cut off."""
    model = adapted(tiny())
    model[0].set_attn_implementation(packed_attention.NAME)  # as the plan does on a GPU
    seen = []
    model[0].get_input_embeddings().register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    found = {}
    for way, packing, fills in [("packed", None, False), ("filled", None, True), ("padded", False, False)]:
        trainer = trainer_of(None, tmp_path, model=model, beta=0.04, packing=packing)
        trainer._fills = fills  # as on a GPU
        found[way] = loss_and_gradients(trainer, injected(trainer, lengths=lengths))
    assert seen == [(1, 6 + 4 + sum(lengths)), (1, 256), (8, 6 + max(lengths))]
    for way in ("packed", "filled"):
        torch.testing.assert_close(found[way][0], found["padded"][0], rtol=1e-5, atol=1e-6)
        for name, grad in found[way][1].items():
            torch.testing.assert_close(grad, found["padded"][1][name], rtol=1e-4, atol=1e-5, msg=name)
