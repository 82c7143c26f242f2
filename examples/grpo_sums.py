"""Teach a small model to add two-digit numbers by rewards; up to twenty minutes on two cores.

A few steps of supervised training show the form of an answer first, on sums that are not asked for later: where no
attempt is ever right, there is nothing to learn from. Then GRPO: of 2.5 points a sum, 2 are for the exact answer.
200 sums that neither phase sees count how many answers are exactly right.
python examples/grpo_sums.py [--seed 1] [--working] [--smoke]; --working has the model add tens and ones apart in tags
of your own first, for which it is shown more sums; --smoke trains two steps.
"""

import random
import re
import sys
import tempfile

from unsloth import FastLanguageModel, GRPOConfig, GRPOTrainer, SamplingParams, SFTConfig, SFTTrainer

smoke, working = "--smoke" in sys.argv, "--working" in sys.argv
seed = int(sys.argv[sys.argv.index("--seed") + 1]) if "--seed" in sys.argv else 1
output = tempfile.mkdtemp(prefix="grpo-") if smoke else f"outputs/grpo-sums-{seed}"
WORKING, ANSWER = ("<working>", "</working>"), ("<answer>", "</answer>")
shots, updates, completions, longest = (10, 30, 64, 40) if working else (8, 50, 64, 12)
if smoke:
    shots, updates, completions = 2, 2, 8
FORM = re.compile((r"<working>[^<]*</working>" if working else "") + r"<answer>(\d+)</answer>")

sums = [(a, b) for a in range(10, 100) for b in range(10, 100)]
random.Random(0).shuffle(sums)
heldout, shown, practice = sums[: 8 if smoke else 200], sums[200:1000], sums[1000:]
random.Random(seed).shuffle(practice)


def question(a: int, b: int) -> list[dict]:
    return [{"role": "system", "content": "Add."}, {"role": "user", "content": f"{a} + {b}"}]


def answer(a: int, b: int) -> list[dict]:
    parts = (a // 10 * 10, b // 10 * 10), (a % 10, b % 10)
    written = ", ".join(f"{one} + {other} = {one + other}" for one, other in parts)
    steps = written.join(WORKING) if working else ""
    return [{"role": "assistant", "content": steps + str(a + b).join(ANSWER)}]


def given(completion: list[dict]) -> str | None:
    found = FORM.fullmatch(completion[0]["content"].strip())
    return found and found[1]


def exact(completions: list, total: list[int], **columns: list) -> list[float]:
    return [2.0 * (given(completion) == str(right)) for completion, right in zip(completions, total, strict=True)]


def form(completions: list, **columns: list) -> list[float]:
    return [0.5 * (given(completion) is not None) for completion in completions]


model, tokenizer = FastLanguageModel.from_pretrained("embedded:SmolLM2-135M-Instruct", max_seq_length=128)
model = FastLanguageModel.get_peft_model(
    model, r=16, lora_alpha=32, use_gradient_checkpointing=False, random_state=seed
)


def report(when: str) -> None:
    FastLanguageModel.for_inference(model)
    prompts = [tokenizer.apply_chat_template(question(*pair), add_generation_prompt=True) for pair in heldout]
    found = model.fast_generate(prompts, SamplingParams(temperature=0, max_tokens=longest))
    texts = [[{"content": output.outputs[0].text}] for output in found]
    right = sum(given(text) == str(sum(pair)) for text, pair in zip(texts, heldout, strict=True))
    print(f"{when}: {right} of {len(heldout)} held-out sums exactly right, {sum(map(bool, form(texts)))} in form")
    for (a, b), text in list(zip(heldout, texts, strict=True))[:3]:
        print(f"{a} + {b} -> {text[0]['content']}", flush=True)
    FastLanguageModel.for_training(model)


common = {"output_dir": output, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "seed": seed,
          "lr_scheduler_type": "constant"}  # fmt: skip
report("before")
warm_start = SFTTrainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=[{"prompt": question(*pair), "completion": answer(*pair)} for pair in shown],
    args=SFTConfig(max_steps=shots, per_device_train_batch_size=16, learning_rate=1e-3, **common),
)
warm_start.train()
report("after supervised training")
trainer = GRPOTrainer(
    model=model,
    tokenizer=tokenizer,
    reward_funcs=[exact, form],
    train_dataset=[{"prompt": question(*pair), "total": sum(pair)} for pair in practice],
    args=GRPOConfig(
        max_steps=updates,
        per_device_train_batch_size=completions,
        num_generations=8,
        max_completion_length=longest,
        learning_rate=1e-4 if working else 2e-4,
        **common,
    ),
)
trainer.train()
report("after GRPO")
model.save_lora(f"{output}/adapter")
