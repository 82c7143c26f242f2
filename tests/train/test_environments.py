"""Training in environments: tools and conversations through the trainer, with turns of the model that are scripted."""

import asyncio
import json

import pytest
import torch
from tests.conftest import CHATML
from trl.chat_template_utils import qwen3_chat_template
from trl.trainer.grpo_trainer import GRPOTrainer as TRLTrainer

from unsloth import FastLanguageModel, GRPOConfig, GRPOTrainer
from unsloth.core.errors import ConfigError, TrainingError
from unsloth.environments import Game2048, GuessTheNumber, calculate
from unsloth.generate.engine import Engine
from unsloth.train import rollouts
from unsloth.train.rollouts import Completions

TOOLS = (
    "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROWS = [{"prompt": [{"role": "user", "content": "Play."}], "seed": seed} for seed in range(4)]


def call(name, **arguments):
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


@pytest.fixture(scope="module")
def loaded(tiny):
    model, tokenizer = FastLanguageModel.from_pretrained(str(tiny()), max_seq_length=512, dtype=torch.float32)
    return FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=False), tokenizer


def trainer_of(loaded, tmp_path, template=TOOLS, rows=ROWS, more=None, **changes):
    model, tokenizer = loaded
    tokenizer.chat_template = template
    tokenizer.response_template = None
    args = {
        "max_steps": 1, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "per_device_train_batch_size": 2, "num_generations": 2, "max_completion_length": 400, "use_cpu": True,
    }  # fmt: skip
    args = GRPOConfig(output_dir=str(tmp_path), **{**args, **changes})
    return GRPOTrainer(model=model, processing_class=tokenizer, args=args, train_dataset=rows, **(more or {}))


def script(trainer, *turns):
    """Let the model say ``turns``, a list of texts for each turn of the batch's completions that go on."""
    waiting = list(turns)

    def sample(prompts, params=None, most=None):
        texts = waiting.pop(0)
        assert len(texts) == len(prompts)
        ids = [trainer._tokenizer(f"{text}<|im_end|>", add_special_tokens=False)["input_ids"] for text in texts]
        return Completions(ids, [[-1.0] * len(turn) for turn in ids], [True] * len(ids))

    trainer.sample = sample


def rated(completions, **_):
    rated.seen = completions
    return [float(len(completion)) for completion in completions]


def written(trainer, batch):
    """Of each completion, the text of the tokens that are trained and of those that are not."""
    found = []
    for ids, attended, mask in zip(batch["completion_ids"], batch["completion_mask"], batch["tool_mask"], strict=True):
        own, other = (ids[(mask == value) & (attended == 1)] for value in (1, 0))
        found.append((trainer._tokenizer.decode(own), trainer._tokenizer.decode(other)))
    return found


def rollout(trainer):
    trainer.model.train()
    rows = [dict(trainer.train_dataset[0]) for _ in range(trainer.args.per_device_train_batch_size)]
    return trainer._generate_and_score_completions(rows)


def test_a_tool_answers_and_only_the_models_tokens_are_trained(loaded, tmp_path):
    trainer = trainer_of(loaded, tmp_path, more={"tools": [calculate], "reward_funcs": rated})
    script(trainer, [call("calculate", expression="6 * 7"), "41"], ["It is 42."])
    batch = rollout(trainer)
    first, second = written(trainer, batch)
    assert first == (
        f"{call('calculate', expression='6 * 7')}<|im_end|>It is 42.<|im_end|>",
        "\n<|im_start|>tool\n42<|im_end|>\n<|im_start|>assistant\n",
    )
    assert second == ("41<|im_end|>", "")
    assert [message["role"] for message in rated.seen[0]] == ["assistant", "tool", "assistant"]
    assert rated.seen[0][1] == {"role": "tool", "name": "calculate", "content": "42"}
    metrics = trainer._metrics["train"]
    assert metrics["tools/call_frequency"] == [0.5] and metrics["tools/failure_frequency"] == [0.0]
    assert metrics["environment/turns"] == [1.5] and metrics["environment/cut_ratio"] == [0.0]


def test_calls_after_the_last_allowed_turn_are_not_run(loaded, tmp_path):
    more = {"tools": [calculate], "reward_funcs": rated}
    trainer = trainer_of(loaded, tmp_path, more=more, max_tool_calling_iterations=1)
    script(trainer, [call("calculate", expression="1"), "1"], [call("calculate", expression="2")])
    rollout(trainer)
    assert [episode.end for episode in trainer._played] == ["too many turns", "answered"]
    assert trainer._metrics["train"]["tools/call_frequency"] == [0.5]


def broken(text: str) -> str:
    """Fail.

    Args:
        text: Anything.
    """
    raise KeyError(text)


async def slow(seconds: float) -> str:
    """Wait.

    Args:
        seconds: How long.
    """
    await asyncio.sleep(seconds)
    return "awake"


def endless() -> str:
    """Never return."""
    while True:
        pass


WRONG = [
    (call("calculate", expressio="1"), "missing a required argument: 'expression'"),
    (call("calculate", expression="1 / 0"), "division by zero"),
    (call("multiply", a=1), "Tool multiply not found. There are: calculate, broken, endless, slow."),
    (call("broken", text="hm"), "'hm'"),
    (call("endless"), "longer than 0.3 seconds"),
    (call("slow", seconds=5), "slow took longer than 0.3 seconds"),
    ('<tool_call>{"name": "calculate", "arguments": "[1]"}</tool_call>', "must be a mapping"),
]


def test_what_goes_wrong_with_a_call_is_told_to_the_model_and_counted(loaded, tmp_path, caplog):
    tools = [calculate, broken, endless, slow]
    trainer = trainer_of(
        loaded,
        tmp_path,
        more={"tools": tools, "reward_funcs": rated},
        tool_time_limit=0.3,
        per_device_train_batch_size=len(WRONG) + 1,
        num_generations=len(WRONG) + 1,
    )
    script(trainer, [*[text for text, _ in WRONG], '<tool_call>{"name": "calcul'], ["So."] * len(WRONG))
    batch = rollout(trainer)
    for (_, expected), (_, told) in zip(WRONG, written(trainer, batch)[:-1], strict=True):
        assert "'error'" in told and expected in told
    metrics = trainer._metrics["train"]
    assert metrics["tools/failure_frequency"] == [1.0]
    assert metrics["tools/malformed_frequency"] == [pytest.approx(1 / (2 * len(WRONG) + 1))]
    assert rated.seen[-1] == [{"role": "assistant", "content": '<tool_call>{"name": "calcul'}]
    assert any(name == "broken" and kind == "KeyError" for name, kind in trainer._said)


def test_the_game_2048_ends_when_it_is_over(loaded, tmp_path):
    rows = [{**ROWS[0], "moves": 2}]
    trainer = trainer_of(loaded, tmp_path, rows=rows, more={"environment_factory": Game2048})
    up, sideways = call("move", direction="up"), call("move", direction="sideways")
    script(trainer, [call("move", direction="left"), sideways], [up, up], [call("move", direction="down")])
    batch = rollout(trainer)
    played = trainer._played
    assert [episode.end for episode in played] == ["over", "over"] and [episode.turns for episode in played] == [2, 3]
    assert played[0].messages[-1]["role"] == "tool"  # what the last move led to is for the reward, not for the tokens
    assert played[0].ids[-1] == trainer._tokenizer.eos_token_id
    assert "must be" in played[1].messages[1]["content"]
    boards = [environment.game.moves for environment in trainer.environments]
    assert boards[0] == boards[1] > 0
    assert trainer._metrics["train"]["rewards/Game2048/mean"][0] > 0
    assert trainer._metrics["train"]["completions/clipped_ratio"] == [0.0]
    prompt = trainer._tokenizer.decode(batch["prompt_ids"][0])
    assert "move" in prompt and "Reach 64. The board:" in prompt


def test_a_conversation_needs_no_tools(loaded, tmp_path):
    trainer = trainer_of(
        loaded, tmp_path, CHATML, more={"environment_factory": GuessTheNumber}, max_tool_calling_iterations=2
    )
    script(trainer, ["10", "hm"], ["13", "1 or 2"], ["12"])
    batch = rollout(trainer)
    assert trainer.environments[0]._sought == trainer.environments[1]._sought == 13
    first, second = trainer._played
    assert (first.end, second.end) == ("over", "too many turns")
    assert first.messages == [
        {"role": "assistant", "content": "10"},
        {"role": "user", "content": "It is larger."},
        {"role": "assistant", "content": "13"},
    ]
    own, other = written(trainer, batch)[0]
    assert own == "10<|im_end|>13<|im_end|>"
    assert other == "\n<|im_start|>user\nIt is larger.<|im_end|>\n<|im_start|>assistant\n"
    metrics = trainer._metrics["train"]
    assert metrics["rewards/GuessTheNumber/mean"] == [pytest.approx((0.5 + 0.5 * 5 / 6 + 0.4 * 12 / 20) / 2)]
    assert metrics["environment/cut_ratio"] == [0.5]


def test_a_whole_run_on_a_random_model(loaded, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(rollouts, "Engine", lambda *given: made.append(Engine(*given)) or made[-1])
    trainer = trainer_of(loaded, tmp_path, rows=None, more={"environment_factory": GuessTheNumber}, max_steps=2)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert len(logged) == 2
    # over several turns, training finds each of the model's tokens as probable as sampling did
    assert all(entry["sampling/sampling_logp_difference/max"] < 1e-4 for entry in logged)
    assert all(entry["environment/turns"] >= 1 for entry in logged)
    assert len(made) == 1  # turns grow, and the cache has had room for them from the start


def test_tokens_and_masks_are_those_of_trl(loaded, tmp_path):
    given = {"tools": [calculate], "reward_funcs": rated}
    turns = [[call("calculate", expression="2 + 3"), "4"], [call("calculate", expression="5 * 5")], ["25"]]
    found = []
    for loop in (None, TRLTrainer._tool_call_loop):
        trainer = trainer_of(loaded, tmp_path, qwen3_chat_template, more=given)
        if loop is not None:
            trainer._tool_call_loop = loop.__get__(trainer)
            trainer._generate_single_turn = lambda prompts, *_, _trainer=trainer, **__: (
                lambda found: (found.ids, found.logprobs)
            )(_trainer.sample(prompts))
        script(trainer, *turns)
        found.append(rollout(trainer))
    ours, theirs = found
    for name in ("prompt_ids", "completion_ids", "completion_mask", "tool_mask", "sampling_per_token_logps"):
        assert torch.equal(ours[name], theirs[name]), name


class Talks:
    def reset(self, **row):
        return "Begin."

    def next_turn(self, answer):
        return {"raise": lambda: 1 / 0, "number": lambda: 3, "loop": endless}[answer]()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("raise", r"Talks.next_turn raised ZeroDivisionError: .*test_environments.py, line"),
        ("number", "must return a text, or None when it is over: got 3"),
        ("loop", "Talks.next_turn raised SandboxTimeoutError"),
    ],
)
def test_a_conversation_that_fails_ends_the_run(loaded, tmp_path, answer, message):
    more = {"environment_factory": Talks, "reward_funcs": rated}
    trainer = trainer_of(loaded, tmp_path, more=more, tool_time_limit=0.3)
    script(trainer, [answer] * 2)
    with pytest.raises(TrainingError, match=message):
        rollout(trainer)


class NoReset:
    def move(self):
        """Nothing."""


def test_what_cannot_be_played(loaded, tmp_path):
    plain = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(ConfigError, match="shows no calls of tools"):
        trainer_of(loaded, tmp_path, plain, more={"tools": [calculate], "reward_funcs": rated})
    with pytest.raises(ConfigError, match=r"needs a method reset\(\*\*row\): got 'NoReset'"):
        trainer_of(loaded, tmp_path, more={"environment_factory": NoReset, "reward_funcs": rated})
    with pytest.raises(ConfigError, match="cannot be mixed"):
        trainer_of(loaded, tmp_path, more={"environment_factory": {"a": GuessTheNumber, "b": Game2048}})
    with pytest.raises(ConfigError, match="prompts that are lists of messages"):
        trainer_of(loaded, tmp_path, rows=[{"prompt": "Play."}], more={"environment_factory": GuessTheNumber})
    with pytest.raises(ConfigError, match="max_steps must say"):
        trainer_of(loaded, tmp_path, rows=None, more={"environment_factory": GuessTheNumber}, max_steps=-1)
