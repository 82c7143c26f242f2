"""Teach a small model to answer an order with the kitchen ticket instead of chatter, by preferences alone.

python examples/preference.py [dpo|orpo|kto|simpo] [--smoke] [--seed=1]; --smoke trains two steps. The seed decides on
the adapter's first weights and on the order of the pairs.
"""

import sys
import tempfile

import torch

import unsloth
from unsloth import FastLanguageModel
from unsloth.data import demo

smoke = "--smoke" in sys.argv
seed = next((int(part.removeprefix("--seed=")) for part in sys.argv if part.startswith("--seed=")), 3407)
method = next((name for name in sys.argv[1:] if not name.startswith("-")), "dpo")
output = tempfile.mkdtemp(prefix="preference-") if smoke else f"outputs/preference-{method}"

TRAINING_CHATTER = [
    "Sure! I will get {} ready for you. Anything else today?",
    "Great choice! So that is {}. It will be a few minutes, please take a seat.",
    "Thank you for your order. I have noted {}, and will bring it right away.",
    "Of course, I can help with that. You would like {}, is that right?",
]
HELDOUT_CHATTER = [
    "Hello and welcome! {} is coming up. Have a lovely day!",
    "No problem at all. Let me prepare {} for you, it won't take long.",
]


def pairs(rows: list[dict], chatter: list[str]) -> list[dict]:
    found = []
    for i, row in enumerate(rows):
        system, order, ticket = row["messages"]
        items = ticket["content"].split(" | ")[0].replace("; ", " and ")
        talk = {"role": "assistant", "content": chatter[i % len(chatter)].format(items)}
        found.append({"prompt": [system, order], "chosen": [ticket], "rejected": [talk]})
    return found


METHODS = {  # trainer, and what is particular to it
    "dpo": ("DPO", {"beta": 0.1, "learning_rate": 2e-4}),
    "orpo": ("ORPO", {"beta": 0.5, "learning_rate": 1e-3}),
    "kto": ("KTO", {"beta": 0.1, "learning_rate": 4e-4, "per_device_train_batch_size": 8}),
    "simpo": ("CPO", {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0, "learning_rate": 5e-4}),
}
name, particular = METHODS[method]
heldout = pairs(demo.heldout_rows(), HELDOUT_CHATTER)[: 2 if smoke else None]
model, tokenizer = FastLanguageModel.from_pretrained("embedded:SmolLM2-135M-Instruct", max_seq_length=256)
model = FastLanguageModel.get_peft_model(
    model, r=16, lora_alpha=32, use_gradient_checkpointing=False, random_state=seed
)
settings = {
    "max_steps": 2 if smoke else 12,
    "per_device_train_batch_size": 1 if smoke else 4,
    "warmup_steps": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "seed": seed,
}
trainer = getattr(unsloth, f"{name}Trainer")(
    model=model,
    tokenizer=tokenizer,
    train_dataset=pairs(demo.train_rows(), TRAINING_CHATTER),
    args=getattr(unsloth, f"{name}Config")(output_dir=output, **{**settings, **particular}),
)


@torch.no_grad()
def score(messages: list[dict], answer: list[dict]) -> float:
    """Mean log-probability of a token of the answer."""
    start = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(messages + answer, return_tensors="pt").to(model.device)
    logprobs = model(input_ids=whole).logits[0, :-1].float().log_softmax(-1)
    return logprobs.gather(-1, whole[0, 1:, None])[len(start) - 1 :].mean().item()


def report(when: str) -> None:
    FastLanguageModel.for_inference(model)
    margins = [score(row["prompt"], row["chosen"]) - score(row["prompt"], row["rejected"]) for row in heldout]
    right, mean = sum(margin > 0 for margin in margins), sum(margins) / len(margins)
    print(f"{method} {when}: {right} of {len(margins)} held-out pairs ordered right, mean margin {mean:+.2f}")
    for row in heldout[:3]:
        inputs = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_tensors="pt")
        answer = model.generate(input_ids=inputs.to(model.device), max_new_tokens=40, do_sample=False)
        text = tokenizer.decode(answer[0, inputs.shape[1] :], skip_special_tokens=True)
        print(f"{row['prompt'][-1]['content']} -> {text}")


report("before")
trainer.train()
report("after")
model.save_pretrained(f"{output}/adapter")
