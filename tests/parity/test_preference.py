"""Our trainers on preferences against TRL's own with plain transformers and PEFT: same losses, same adapters."""

import peft
import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.cpo import CPOConfig as TheirCPOConfig
from trl.experimental.cpo import CPOTrainer as TheirCPOTrainer
from trl.experimental.orpo import ORPOConfig as TheirORPOConfig
from trl.experimental.orpo import ORPOTrainer as TheirORPOTrainer
from trl.trainer.dpo_config import DPOConfig as TheirDPOConfig
from trl.trainer.dpo_trainer import DPOTrainer as TheirDPOTrainer
from trl.trainer.kto_config import KTOConfig as TheirKTOConfig
from trl.trainer.kto_trainer import KTOTrainer as TheirKTOTrainer

from unsloth import (
    CPOConfig,
    CPOTrainer,
    DPOConfig,
    DPOTrainer,
    FastLanguageModel,
    KTOConfig,
    KTOTrainer,
    ORPOConfig,
    ORPOTrainer,
)

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TRAINERS = {
    "dpo": (DPOTrainer, DPOConfig, TheirDPOTrainer, TheirDPOConfig),
    "kto": (KTOTrainer, KTOConfig, TheirKTOTrainer, TheirKTOConfig),
    "orpo": (ORPOTrainer, ORPOConfig, TheirORPOTrainer, TheirORPOConfig),
    "cpo": (CPOTrainer, CPOConfig, TheirCPOTrainer, TheirCPOConfig),
}


def arguments(tmp_path, **changes):
    return {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 8,
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


def losses(trainer):
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def pairs(messages: bool) -> list[dict]:
    rows = []
    for i in range(16):
        row = {
            "prompt": f"Say {'very ' * (i % 4)}well: {i}",
            "chosen": " well" * (1 + i % 3) + f" {i}",
            "rejected": f" no, not {'ever ' * (i % 2)}{i}",
        }
        if messages:
            roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
            row = {name: [{"role": roles[name], "content": text}] for name, text in row.items()}
        rows.append(row)
    return rows


def rated() -> list[dict]:
    rows = []
    for i, row in enumerate(pairs(messages=False)):
        good = i % 3 != 0
        rows.append({"prompt": row["prompt"], "completion": row["chosen" if good else "rejected"], "label": good})
    return rows


def their_run(folder, trainer, config, rows, settings):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    transformers.set_seed(3407)
    model = peft.get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM"))
    trained = trainer(
        model=model,
        args=config(gradient_checkpointing=False, **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trained.train()
    return losses(trained), weights(model)


def our_run(folder, trainer, config, rows, settings, **more):
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=512, dtype=torch.float32, load_in_16bit=True
    )
    model = FastLanguageModel.get_peft_model(
        model, r=8, lora_alpha=16, target_modules=TARGETS, use_gradient_checkpointing=False
    )
    trained = trainer(model=model, tokenizer=tokenizer, train_dataset=rows, args=config(**settings), **more)
    trained.train()
    return losses(trained), weights(model)


def assert_same(ours, theirs):
    (our_losses, our_weights), (their_losses, their_weights) = ours, theirs
    assert len(our_losses) == len(their_losses) == 8
    assert (our_losses - their_losses).abs().max() < 1e-5
    assert (our_losses - our_losses[0]).abs().max() > 1e-3  # it trained
    assert our_weights.keys() == their_weights.keys() and our_weights
    assert max((our_weights[name] - their_weights[name]).abs().max() for name in our_weights) < 1e-5


CASES = {
    "dpo": ("dpo", "messages", {}),
    "dpo-ipo-sft": ("dpo", "text", {"loss_type": ["ipo", "sft"], "loss_weights": [1.0, 0.2], "beta": 0.3}),
    "dpo-ld": ("dpo", "text", {"ld_alpha": 0.4}),
    "dpo-precomputed": ("dpo", "text", {"precompute_ref_log_probs": True}),
    "kto": ("kto", "rated", {"train_sampling_strategy": "sequential", "desirable_weight": 0.7}),
    "kto-apo": ("kto", "rated", {"loss_type": "apo_zero_unpaired", "train_sampling_strategy": "sequential"}),
    "orpo": ("orpo", "text", {"beta": 0.3}),
    "cpo": ("cpo", "text", {"cpo_alpha": 0.5}),
    "simpo": ("cpo", "text", {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0}),
}


@pytest.mark.parametrize("case", CASES)
def test_trainers_train_as_trls_do(tiny, tmp_path, case):
    method, layout, particular = CASES[case]
    trainer, config, their_trainer, their_config = TRAINERS[method]
    rows = rated() if layout == "rated" else pairs(messages=layout == "messages")
    settings = arguments(tmp_path, **particular)
    theirs = their_run(tiny(), their_trainer, their_config, rows, {"max_length": 512, **settings})
    assert_same(our_run(tiny(), trainer, config, rows, settings), theirs)


def test_whole_logits_give_the_same(tiny, tmp_path):
    settings = arguments(tmp_path)
    rows = pairs(messages=False)
    ours = our_run(tiny(), DPOTrainer, DPOConfig, rows, settings)
    assert_same(our_run(tiny(), DPOTrainer, DPOConfig, rows, settings, fused_head=False), ours)
