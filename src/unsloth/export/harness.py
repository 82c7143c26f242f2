"""Tasks of the lm-evaluation-harness on a model, an adapter or a GGUF file (extra ``eval``)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from unsloth.core.errors import ConfigError, UnslothError
from unsloth.export.predict import Predictor


def evaluate(
    predictor: Predictor,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    shots: int | None = None,
    limit: int | None = None,
    include_path: str | os.PathLike[str] | None = None,
    chat: bool = False,
) -> dict[str, dict[str, float]]:
    """Run tasks, and return their metrics.

    Args:
        predictor: The model.
        tokenizer: Its tokenizer.
        tasks: Names of tasks or groups.
        shots: Examples before each question; None leaves it to the task.
        limit: Rows of each task; None takes all.
        include_path: A folder with further tasks, each a YAML file.
        chat: Whether questions are put through the chat template.

    Returns:
        By task: metric (``"acc,none"``) and value.

    Raises:
        UnslothError: The harness is not installed.
        ConfigError: There is no such task.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UnslothError(
            "the lm-evaluation-harness is not installed", do='Run: pip install "unsloth[eval]".'
        ) from error
    from unsloth.export.harness_model import HarnessModel

    own = None if include_path is None else str(include_path)
    manager = TaskManager(include_path=own, include_defaults=own is None)
    if own is not None and any(task not in manager.all_tasks for task in tasks):
        manager = TaskManager(include_path=own)  # which reads thousands of files
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown or not tasks:
        raise ConfigError(
            "there is no such task", got=unknown or list(tasks), do="The harness lists them: lm-eval ls tasks."
        )
    found: Any = simple_evaluate(
        model=HarnessModel(predictor, tokenizer),
        tasks=list(tasks),
        num_fewshot=shots,
        limit=limit,
        task_manager=manager,
        apply_chat_template=chat,
        bootstrap_iters=0,
        log_samples=False,
    )
    return {
        task: {metric: value for metric, value in values.items() if isinstance(value, int | float)}
        for task, values in found["results"].items()
    }
