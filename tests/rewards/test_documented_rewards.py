"""The reward functions that are shown in guides, as they are pasted: each in one short run of the trainer."""

import re

import pytest
import torch

from unsloth import FastLanguageModel, GRPOConfig, GRPOTrainer

SYSTEM = "Respond in the following format:\n<reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>\n"
REASONING_START, REASONING_END = "<REASONING>", "</REASONING>"
SOLUTION_START, SOLUTION_END = "<SOLUTION>", "</SOLUTION>"
GOOD = "<reasoning>\n2 and 2\n</reasoning>\n<answer>\n4\n</answer>\n"


def extract_xml_answer(text):
    return text.split("<answer>")[-1].split("</answer>")[0].strip()


def correctness_reward_func(prompts, completions, answer, **kwargs) -> list[float]:
    responses = [completion[0]["content"] for completion in completions]
    extracted = [extract_xml_answer(r) for r in responses]
    return [2.0 if r == a else 0.0 for r, a in zip(extracted, answer, strict=True)]


def int_reward_func(completions, **kwargs) -> list[float]:
    responses = [completion[0]["content"] for completion in completions]
    return [0.5 if extract_xml_answer(r).isdigit() else 0.0 for r in responses]


def strict_format_reward_func(completions, **kwargs) -> list[float]:
    pattern = r"^<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?\n</answer>\n$"
    return [0.5 if re.match(pattern, completion[0]["content"]) else 0.0 for completion in completions]


def soft_format_reward_func(completions, **kwargs) -> list[float]:
    pattern = r"<reasoning>.*?</reasoning>\s*<answer>.*?</answer>"
    responses = [completion[0]["content"] for completion in completions]
    return [0.5 if re.match(pattern, r, re.DOTALL) else 0.0 for r in responses]


def xmlcount_reward_func(completions, **kwargs) -> list[float]:
    tags = ("<reasoning>\n", "\n</reasoning>\n", "\n<answer>\n", "\n</answer>")
    return [sum(0.125 for tag in tags if completion[0]["content"].count(tag) == 1) for completion in completions]


def number_and_match(completions, answer, **kwargs):
    """Number found: +1, else -1. The right one: +3, else -3."""
    scores = []
    for completion, right in zip(completions, answer, strict=True):
        numbers = re.findall(r"-?\d+", completion[0]["content"])
        scores.append((1 if numbers else -1) + (3 if right in numbers else -3))
    return scores


def formatting_reward_func(completions, **kwargs):
    """Of the vision guide; its completions are texts."""
    thinking_pattern = f"{REASONING_START}(.*?){REASONING_END}"
    answer_pattern = f"{SOLUTION_START}(.*?){SOLUTION_END}"
    scores = []
    for completion in completions:
        score = 0
        thinking_matches = re.findall(thinking_pattern, completion, re.DOTALL)
        answer_matches = re.findall(answer_pattern, completion, re.DOTALL)
        if len(thinking_matches) == 1:
            score += 1.0
        if len(answer_matches) == 1:
            score += 1.0
        if len(completion) != 0:
            removal = completion.replace("addCriterion", "").replace("\n", "")
            if (len(completion) - len(removal)) / len(completion) >= 0.5:
                score -= 2.0
        scores.append(score)
    return scores


CHAT = [
    xmlcount_reward_func,
    soft_format_reward_func,
    strict_format_reward_func,
    int_reward_func,
    correctness_reward_func,
    number_and_match,
]


def run(tiny, tmp_path, functions, prompt):
    model, tokenizer = FastLanguageModel.from_pretrained(str(tiny()), max_seq_length=512, dtype=torch.float32)
    model = FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=False)
    args = GRPOConfig(
        output_dir=str(tmp_path), max_steps=1, logging_steps=1, save_strategy="no", report_to="none", use_cpu=True,
        disable_tqdm=True, num_generations=2, max_prompt_length=256, max_completion_length=16,
    )  # fmt: skip
    rows = [{"prompt": prompt, "answer": "4"}] * 4
    trainer = GRPOTrainer(
        model=model, processing_class=tokenizer, reward_funcs=functions, args=args, train_dataset=rows
    )
    trainer.train()
    return trainer.state.log_history[0]


def test_the_rewards_of_grade_school_sums(tiny, tmp_path):
    prompt = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "2 + 2"}]
    logged = run(tiny, tmp_path, CHAT, prompt)
    assert {f"rewards/{function.__name__}/mean" for function in CHAT} <= set(logged)
    completions = [[{"role": "assistant", "content": text}] for text in (GOOD, "I do not know.")]
    columns = {"prompts": [prompt] * 2, "answer": ["4", "4"]}
    assert [function(completions=completions, **columns) for function in CHAT] == [
        [0.5, 0.0],
        [0.5, 0.0],
        [0.5, 0.0],
        [0.5, 0.0],
        [2.0, 0.0],
        [4, -4],
    ]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_reward_against_gibberish(tiny, tmp_path):
    assert "rewards/formatting_reward_func/mean" in run(tiny, tmp_path, [formatting_reward_func], "2 + 2 is")
    texts = ["<REASONING>2</REASONING><SOLUTION>4</SOLUTION>", "addCriterion\n" * 9, ""]
    assert formatting_reward_func(texts) == [2.0, -2.0, 0]
