"""Reward the Python that a model writes: a strategy for the game 2048, or a matrix multiplication.

python examples/grpo_code.py [2048|matmul] [--model NAME] [--shown] [--smoke]. Meant for a GPU and a model that can
write Python. --shown, for 2048 on two cores: the embedded model, which cannot, is shown short strategies first, half of
which are stuck after a few moves or do not run; which are better is for GRPO to find out. --smoke trains two steps of
the embedded model. Generated code runs in the sandbox only.
"""

import random
import sys
import tempfile
from collections.abc import Callable
from operator import mul

from unsloth import FastLanguageModel, GRPOConfig, GRPOTrainer, SamplingParams, SFTConfig, SFTTrainer
from unsloth.environments import GameBoard
from unsloth.rewards import check_python_modules, create_locked_down_function, execute_with_time_limit, time_calls

smoke, shown = "--smoke" in sys.argv, "--shown" in sys.argv
seed = int(sys.argv[sys.argv.index("--seed") + 1]) if "--seed" in sys.argv else 1
task = "matmul" if "matmul" in sys.argv else "2048"
default = "embedded:SmolLM2-135M-Instruct" if smoke or shown else "Qwen/Qwen2.5-Coder-1.5B-Instruct"
name = sys.argv[sys.argv.index("--model") + 1] if "--model" in sys.argv else default
output = tempfile.mkdtemp(prefix="grpo-") if smoke else f"outputs/grpo-{task}"

TASKS = {  # what the function is called with, and what the model is asked
    "2048": ("strategy(board)", """Create a new short 2048 strategy using only native Python code.
You are given a list of list of numbers for the current board state.
Output one action for "W", "A", "S", "D" on what is the optimal next step."""),
    "matmul": ("matmul(A, B)", """Create a new fast matrix multiplication function using only native Python code.
You are given a list of list of numbers."""),
}  # fmt: skip
signature, wish = TASKS[task]
form = "Output your new function in backticks using the format below:\n```python\ndef {}:\n    return ...\n```"
prompt = [{"role": "user", "content": f"{wish}\n{form.format(signature)}"}]


def function_of(completion: list[dict]) -> str | None:
    parts = completion[0]["content"].split("```")
    code = parts[1].removeprefix("python").strip() if len(parts) > 2 else ""
    return code if code.startswith(f"def {signature}:") else None


def compiles(completions: list, **columns: list) -> list[float]:
    codes = map(function_of, completions)
    return [-2.0 if code is None else tried(code, lambda function: 1.0) for code in codes]


def no_imports(completions: list, **columns: list) -> list[float]:
    codes = map(function_of, completions)
    return [-1.0 if code is None else 1.0 if check_python_modules(code)[0] else -20.0 for code in codes]


def succeeds(completions: list, **columns: list) -> list[float]:
    seed = random.randrange(10_000)  # the same for all that are compared
    codes = map(function_of, completions)
    return [-2.0 if code is None else tried(code, lambda f: RATINGS[task](f, seed)) for code in codes]


def tried(code: str, rate: Callable) -> float:
    try:
        return rate(create_locked_down_function(code))
    except TimeoutError:
        return -1.0
    except Exception:  # noqa: BLE001 - of whatever kind, it is the generated code's
        return -3.0


@execute_with_time_limit(5)
def play(strategy: Callable, seed: int) -> float:
    game = GameBoard(size=6, seed=seed, target=2048, probability_fours=0.10)
    while game.state() == "ongoing":
        moves = game.moves
        game.do_action(strategy(list(game.board())))
        if game.moves == moves:
            break  # it would do the same for ever
    return 20.0 if game.state() == "success" else game.largest.bit_length() / 2


@execute_with_time_limit(10)
def multiply(matmul: Callable, seed: int) -> float:
    def matrices(number: int) -> list:
        chosen = random.Random(1000 * seed + number)
        return [[[chosen.randint(-9, 9) for _ in range(24)] for _ in range(24)] for _ in range(2)]

    def right(given: list, found: list) -> bool:
        return found == [[sum(map(mul, row, column)) for column in zip(*given[1], strict=True)] for row in given[0]]

    seconds = time_calls(matmul, matrices, rounds=3, check=right, wipe_bytes=1 << 20).seconds
    return 5.0 + min(15.0, 0.01 / max(seconds, 1e-4))


RATINGS = {"2048": play, "matmul": multiply}


def strategies(count: int) -> list[str]:
    """Of a player who knows Python, and next to nothing of the game."""
    chosen, found = random.Random(seed), []
    for _ in range(count):
        keys = "".join(chosen.sample("WASD", 4))
        bodies = [
            f'return "{keys[0]}"',
            f'return "{keys[0]}" if board[0][0] == 0 else "{keys[1]}"',
            f"return board[{keys[0]}]",
            f'return "{keys[:2]}"[sum(map(sum, board)) % 2]',
            f'return "{keys}"[sum(map(sum, board)) % 4]',
            f'return "{keys[:3]}"[sum(row.count(0) for row in board) % 3]',
        ]
        found.append(f"```python\ndef strategy(board):\n    {chosen.choice(bodies)}\n```")
    return found


def report(when: str) -> None:
    chat = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)
    FastLanguageModel.for_inference(model)
    ways = [SamplingParams(temperature=1.0, max_tokens=length, seed=n) for n in range(2 if smoke else 40)]
    texts = [[{"content": output.outputs[0].text}] for output in model.fast_generate([chat] * len(ways), ways)]
    FastLanguageModel.for_training(model)
    scores = succeeds(texts)
    works = sum(score > 0 for score in scores)
    print(f"{when}: {works} of {len(ways)} functions work, mean reward for what they do {sum(scores) / len(ways):.2f}")
    print(texts[0][0]["content"], flush=True)


model, tokenizer = FastLanguageModel.from_pretrained(name, max_seq_length=1024, load_in_4bit=True)
model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=32, random_state=seed)
group, length, updates = (2, 24, 2) if smoke else (8, 64, 30) if shown else (8, 512, 300)
common = {"output_dir": output, "logging_steps": 1, "report_to": "none", "seed": seed}
if shown:
    warm_start = SFTTrainer(
        model=model,
        tokenizer=tokenizer,
        train_dataset=[
            {"prompt": prompt, "completion": [{"role": "assistant", "content": text}]} for text in strategies(200)
        ],
        args=SFTConfig(max_steps=2 if smoke else 12, per_device_train_batch_size=16, learning_rate=1e-3, **common),
    )
    warm_start.train()
report("before")
trainer = GRPOTrainer(
    model=model,
    tokenizer=tokenizer,
    reward_funcs=[compiles, no_imports, succeeds],
    train_dataset=[{"prompt": prompt}] * 1000,
    args=GRPOConfig(
        per_device_train_batch_size=(3 if shown else 2) * group,
        num_generations=group,
        max_completion_length=length,
        max_steps=updates,
        learning_rate=1e-4 if shown else 5e-5,
        **common,
    ),
)
trainer.train()
report("after GRPO")
