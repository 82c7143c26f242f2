"""What a run with rewards shows: lines, a live table, samples, and the files at its end."""

import csv
import io

import pytest
from matplotlib.figure import Figure
from rich.console import Console
from transformers import TrainerControl, TrainerState

from unsloth.core.errors import TrainingError
from unsloth.train import rollout_metrics
from unsloth.train.rollout_progress import RolloutProgress, samples


def entry(step, **more):
    return {
        "step": step,
        "loss": 0.1,
        "learning_rate": 1e-4,
        "num_tokens": 100.0 * step,
        "reward": step / 10,
        "reward_std": 0.25,
        "rewards/exact/mean": step / 20,
        "rewards/form/mean": 0.5,
        "frac_reward_zero_std": 0.5,
        "completions/mean_length": 9.0,
        "completions/clipped_ratio": 0.0,
        "entropy": 1 / step,
        "kl": 0.001 * step,
        "clip_ratio/region_mean": 0.01,
        "sampling/sampling_logp_difference/mean": 1e-6,
        "rollout/tokens_per_second": 1234.0,
        "training/tokens_per_second": 4321.0,
        **more,
    }


LOGS = {
    "prompt": [[{"role": "user", "content": "1 + 1"}]] * 3,
    "completion": [
        [{"role": "assistant", "content": "2"}],
        [
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]},
            {"role": "tool", "content": "3"},
            {"role": "assistant", "content": "three"},
        ],
        [{"role": "assistant", "content": "5"}],
    ],
    "rewards": {"exact": [1.0, 0.0, 0.0], "form": [0.5, 0.5, 0.5]},
    "advantages": [1.2, -0.7, -0.5],
}


class Arguments:
    def __init__(self, folder):
        self.output_dir = str(folder)


def run(tmp_path, steps, **console):
    out = io.StringIO()
    progress = RolloutProgress(lambda: samples(LOGS), console=Console(file=out, width=110, **console))
    state, control = TrainerState(max_steps=steps, is_world_process_zero=True), TrainerControl()
    progress.on_train_begin(Arguments(tmp_path), state, control)
    for step in range(1, steps + 1):
        state.global_step = step
        state.log_history.append(entry(step))
        progress.on_log(Arguments(tmp_path), state, control, logs=state.log_history[-1])
        progress.on_step_end(Arguments(tmp_path), state, control)
    progress.on_train_end(Arguments(tmp_path), state, control)
    return out.getvalue(), state.log_history


def test_a_log_gets_lines_and_samples_now_and_then(tmp_path):
    shown, _ = run(tmp_path, 30)
    lines = shown.splitlines()
    assert "step 1/30  reward 0.100 (exact 0.050, form 0.500)  spread 0.250  groups all alike 50%" in lines[0]
    assert "KL 0.0010  entropy 1.000  clipped 1.0%  mismatch 1.0e-06  sampling tokens/s 1,234" in lines[0]
    assert "cut by length" not in lines[0]  # nothing was cut
    assert lines[1] == "  '1 + 1' -> '2'  (exact 1.00, form 0.50, advantage +1.20)"
    assert "assistant:  [add {'a': 1}]\\ntool: 3\\nassistant: three" in lines[2]
    assert 20 <= sum("->" in line for line in lines) <= 24  # two for each tenth
    assert "trained 30 steps" in shown and "reward 0.200 to 2.900" in shown


def test_a_terminal_gets_a_live_table(tmp_path):
    shown, _ = run(tmp_path, 3, force_terminal=True, color_system=None)
    for text in ("training tokens/s", "4,321", "course", "▁▅█", "1 + 1", "advantage +1.20", "3/3"):
        assert text in shown


def test_evaluations_and_updates_without_new_completions(tmp_path):
    out = io.StringIO()
    progress = RolloutProgress(lambda: samples(LOGS), console=Console(file=out, width=110))
    state, control = TrainerState(max_steps=4, global_step=2), TrainerControl()
    progress.on_train_begin(Arguments(tmp_path), state, control)
    functions = {"eval_rewards/exact/mean": 0.5, "eval_rewards/form/mean": 0.25, "eval_rewards/exact/std": 0.1}
    progress.on_log(Arguments(tmp_path), state, control, {"eval_loss": 0.0, "eval_reward": 0.75, **functions})
    progress.on_log(Arguments(tmp_path), state, control, {"loss": 0.1, "entropy": 1.25, "clip_ratio/region_mean": 0.5})
    evaluated, updated = out.getvalue().splitlines()
    assert evaluated == "step 2: evaluation reward 0.750 (exact 0.500, form 0.250)"
    assert updated.startswith("step 2/4  entropy 1.250  clipped 50.0%")


def test_the_files_at_the_end(tmp_path):
    shown, history = run(tmp_path, 12)
    with (tmp_path / "rewards.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["reward"]) for row in rows] == [entry["reward"] for entry in history]
    assert rows[3]["step"] == "4" and float(rows[3]["rewards/exact/mean"]) == 0.2
    assert (tmp_path / "rewards.png").read_bytes().startswith(b"\x89PNG") and "rewards.png" in shown
    assert {path.name for path in tmp_path.iterdir()} == {"rewards.csv", "rewards.png"}


def test_figures_that_are_missing(tmp_path):
    history = [{"step": 1, "reward": 1.0}, {"step": 2, "reward": None, "kl": None}, {"step": 3, "loss": 1.0}]
    assert [figure.name for figure in rollout_metrics.figures(history)] == ["reward"]
    assert rollout_metrics.line(history[1]) == "reward -"
    rollout_metrics.plot(history, tmp_path / "a.png")
    with pytest.raises(TrainingError, match="logged none"):
        rollout_metrics.plot(history[2:], tmp_path / "b.png")


@pytest.mark.parametrize("on_gpu", [False, True])
def test_the_memory_of_both_phases_is_drawn_where_it_is_known(tmp_path, monkeypatch, on_gpu):
    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: drawn.append(self) or save(self, *a, **k))
    peaks = {"rollout/memory_gib": 7.5, "training/memory_gib": 5.0} if on_gpu else {}
    rollout_metrics.plot([entry(step, **peaks) for step in range(1, 20)], tmp_path / "a.png")
    titles = {axes.get_title(loc="left"): axes for axes in drawn[0].axes}
    assert ("peak memory of the GPU (GiB)" in titles) == on_gpu and len(titles) == 6 + on_gpu
    if on_gpu:
        lines = titles["peak memory of the GPU (GiB)"].get_lines()
        assert {line.get_label(): line.get_ydata()[0] for line in lines} == {"sampling": 7.5, "training": 5.0}


def test_the_course_of_a_figure():
    assert rollout_metrics.course([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert rollout_metrics.course([1, None, 1]) == "▁▁"
    assert len(rollout_metrics.course(list(range(500)))) == 32
    assert rollout_metrics.course([None]) == ""
