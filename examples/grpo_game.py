"""Teach a small model a game of several turns by rewards; up to twenty minutes on two cores.

The model guesses a number from 1 to 12, is told "larger" or "smaller", and has four guesses. First a few steps of
supervised training on games of players who guess at random and pay no heed to what they are told: that is the form of a
game, and wins a third of them. What the words are good for, GRPO has the model find out.
python examples/grpo_game.py [--seed 1] [--smoke]; --smoke trains two steps.
"""

import random
import sys
import tempfile

from unsloth import FastLanguageModel, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from unsloth.environments import GuessTheNumber

smoke = "--smoke" in sys.argv
seed = int(sys.argv[sys.argv.index("--seed") + 1]) if "--seed" in sys.argv else 1
output = tempfile.mkdtemp(prefix="grpo-") if smoke else f"outputs/grpo-game-{seed}"
shots, updates, completions, heldout = (2, 2, 8, 8) if smoke else (10, 40, 48, 100)
LARGEST, GUESSES = 12, 4
PROMPT = [{"role": "system", "content": "Play."}, {"role": "user", "content": ""}]  # the game adds what it says


def games(first: int, count: int) -> list[dict]:
    return [{"prompt": PROMPT, "seed": n, "largest": LARGEST, "guesses": GUESSES} for n in range(first, first + count)]


def careless(row: dict) -> list[dict]:
    game, talk = GuessTheNumber(), [PROMPT[0]]
    said = game.reset(**row)
    for guess in random.Random(row["seed"]).sample(range(1, LARGEST + 1), GUESSES):
        if said is not None:
            talk += [{"role": "user", "content": said}, {"role": "assistant", "content": str(guess)}]
            said = game.next_turn(str(guess))
    return talk


def won(environments: list, completions: list, **columns: list) -> list[float]:
    last[:] = completions
    return [float(game.found) for game in environments]


last: list = []
model, tokenizer = FastLanguageModel.from_pretrained("embedded:SmolLM2-135M-Instruct", max_seq_length=256)
model = FastLanguageModel.get_peft_model(
    model, r=16, lora_alpha=32, use_gradient_checkpointing=False, random_state=seed
)
common = {"output_dir": output, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "seed": seed,
          "lr_scheduler_type": "constant", "learning_rate": 1e-3}  # fmt: skip
warm_start = SFTTrainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=[{"messages": careless(row)} for row in games(0, 200)],
    args=SFTConfig(max_steps=shots, per_device_train_batch_size=16, assistant_only_loss=True, **common),
)
warm_start.train()
trainer = GRPOTrainer(
    model=model,
    tokenizer=tokenizer,
    environment_factory=GuessTheNumber,  # its own reward: the sooner the better, and for what guesses have ruled out
    reward_funcs=[won],
    train_dataset=games(1000, 1000),
    eval_dataset=games(5000, heldout),
    args=GRPOConfig(
        max_steps=updates,
        per_device_train_batch_size=completions,
        per_device_eval_batch_size=heldout,
        num_generations=8,
        num_generations_eval=1,
        max_completion_length=160,
        **{**common, "learning_rate": 2e-4},
    ),
)


def report(when: str) -> None:
    share = trainer.evaluate()["eval_rewards/won/mean"]
    guesses = [message["content"] for message in last[0] if message["role"] == "assistant"]
    print(f"{when}: {share:.0%} of {heldout} games won, one of them: {' -> '.join([*guesses, 'end'])}", flush=True)


report("after supervised training")
trainer.train()
report("after GRPO")
model.save_lora(f"{output}/adapter")
