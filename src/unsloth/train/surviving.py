"""What every trainer of this library does so that a run survives kills, signals, full disks and broken batches."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import pickle
from collections.abc import Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate.optimizer import AcceleratedOptimizer
from transformers import PreTrainedTokenizerBase, ProcessorMixin, Trainer
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import SaveStrategy

from unsloth.core import artifact
from unsloth.core.errors import ConfigError, TrainingError, UnslothError
from unsloth.core.log import get_logger
from unsloth.models import trained
from unsloth.train import (
    checkpoint,
    differences,
    discovery,
    explanations,
    interrupts,
    lock,
    output_folder,
    randomness,
    resume,
    states,
)
from unsloth.train.guard import StepGuard, TooManySkipped
from unsloth.train.learning_rate import continue_with
from unsloth.train.memory_error import is_out_of_memory
from unsloth.train.progress import TrainingProgress
from unsloth.train.sampling import EpochSampler

_RUN = "run"  # name of the state that holds our own counters

logger = get_logger(__name__)


@dataclass
class _Boundary:
    """The states between two steps that the next step changes at once: what an interrupted step goes back to."""

    random: randomness.State
    counters: dict[str, Any]


class SurvivingTrainer(Trainer):
    """A base for trainers, before TRL's class; see :class:`unsloth.train.loop.ModelLoop`.

    Checkpoints are staged, verified and free of pickle; a resumed run goes on bit for bit on the CPU; steps on
    gradients that are not finite are not taken; SIGTERM, SIGINT and SIGHUP end the run with a checkpoint; running
    out of memory leaves the weights of the last step. The configuration has the fields of
    :class:`unsloth.train.survival.SurvivalArguments`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        config = kwargs.get("args")
        if config is not None and config.save_strategy != SaveStrategy.NO:
            output_folder.check_writable(Path(config.output_dir))
        self._listener = interrupts.Listener()
        self._source: resume.Source | None = None
        self._accepted: set[str] = set()
        self._identity: differences.Identity | None = None
        self._newest: Path | None = None
        self._last_good: Path | None = None  # the newest one made while steps were taken
        self._boundary: _Boundary | None = None
        self._first_step: int | None = None
        self._in_step = False
        self._evaluating = False
        self._to_restore: dict[str, Any] | None = None
        self._finite_total = self._total_loss_scalar = 0.0
        super().__init__(*args, **kwargs)
        self._guard = StepGuard(self.args.max_skipped_steps)

    # The run as a whole

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train, from the beginning or from a checkpoint; see ``docs/checkpoints.md``.

        Args:
            resume_from_checkpoint: True resumes from the newest whole checkpoint in ``output_dir``, and starts at
                the beginning if there is none; a folder resumes from that one.
            trial: As in transformers.
            ignore_keys_for_eval: As in transformers.

        Raises:
            CheckpointError: The checkpoint is damaged, incomplete, or does not fit the model.
            ConfigError: This run differs from the checkpoint's; see ``SurvivalArguments.resume_allow``.
            StorageError: The output folder is in use by another run, full, or cannot be written.
            TrainingError: Out of memory, too many steps skipped in a row, or a dead data loading worker.
            KeyboardInterrupt: After SIGINT, when the checkpoint is written.
            SystemExit: After SIGTERM or SIGHUP, when the checkpoint is written.
        """
        differences.check_names(self.args.resume_allow, self.args)
        self._start_anew()
        resuming = resume_from_checkpoint not in (None, False)
        with contextlib.ExitStack() as stack:
            if self._saves():
                self._prepare_output(stack)
            path = None
            if self._saves() or resuming:
                self._identity = differences.identify(self.model, self.args, self.train_dataset)
            if resuming:
                path = self._open_checkpoint(resume_from_checkpoint, stack)
            self._listener = stack.enter_context(interrupts.listening())
            stack.callback(self._stop_listening)
            try:
                result = super().train(path, trial, ignore_keys_for_eval)
            except interrupts.StopRequested:
                self._leave()
            except (RuntimeError, MemoryError, TooManySkipped) as error:
                if self._listener.received is not None and explanations.is_dead_worker(error):
                    self._leave()  # the signal went to the data loading workers, too
                explained = self._explained(error)
                if explained is None:
                    raise
                raise explained from error
            if self._listener.received is not None:
                raise self._listener.leave()
            trained.note(self.model, self._summary())
            return result

    def _summary(self) -> trained.Trained:
        """What the model's card will say of the run."""
        logged = self.state.log_history
        return trained.Trained(
            method=type(self).__name__,
            steps=self.state.global_step,
            epochs=round(self.state.epoch or 0, 2),
            rows=len(self.train_dataset) if isinstance(self.train_dataset, Sized) else None,
            batch_size=self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size,
            learning_rate=self.args.learning_rate,
            optimizer=str(getattr(self.args.optim, "value", self.args.optim)),
            losses=tuple((entry["step"], entry["loss"]) for entry in logged if "loss" in entry),
            held_out=tuple((entry["step"], entry["eval_loss"]) for entry in logged if "eval_loss" in entry),
        )

    def _start_anew(self) -> None:
        self._guard = StepGuard(self.args.max_skipped_steps)
        self._source = self._newest = self._last_good = self._first_step = None
        self._identity = self._boundary = self._to_restore = None
        self._accepted = set()
        self._in_step = self._evaluating = False
        self._finite_total = 0.0
        if self.args.auto_find_batch_size:
            # It would start again at step 0, with weights that have moved.
            logger.warning("auto_find_batch_size is ignored; out of memory, the run stops and says what takes less")
            self.args.auto_find_batch_size = False

    def _saves(self) -> bool:
        return self.args.save_strategy != SaveStrategy.NO

    def _prepare_output(self, stack: contextlib.ExitStack) -> None:
        if self.args.world_size > 1:
            raise ConfigError(
                "checkpoints of runs on several processes are not available in this version",
                got=f"{self.args.world_size} processes",
                do='Train on one, or with save_strategy="no".',
            )
        folder = Path(self.args.output_dir)
        stack.enter_context(lock.held(folder))
        artifact.remove_leftovers(folder, discovery.PREFIX)
        size = checkpoint.estimated_bytes(self.model, not self.args.save_only_model)
        rows = len(self.train_dataset) if isinstance(self.train_dataset, Sized) else None
        output_folder.check_room(folder, size, output_folder.checkpoints_at_once(self.args, rows))

    def _open_checkpoint(self, given: Any, stack: contextlib.ExitStack) -> str | None:
        """Verify the checkpoint and the run; return the path that transformers resumes from."""
        allow = self.args.resume_allow
        source = resume.locate(given, Path(self.args.output_dir), allow)
        if source is None:
            return None
        if source.details is not None and self._identity is not None:
            self._accepted = differences.check(source.folder, source.details, self._identity, allow)
        folder = stack.enter_context(artifact.utf8_path(source.folder))
        if not source.is_run:
            self._load_from_checkpoint(os.fspath(folder))
            return None
        self._source, self._newest, self._last_good = source, source.folder, source.folder
        logger.info("resuming from %s", source.folder)
        return os.fspath(folder)

    def _leave(self) -> NoReturn:
        """End a run that a signal has stopped: one checkpoint, unless this step has one, and the right exit."""
        goodbye = self._listener.leave()
        step = self.state.global_step
        try:
            if not self._saves():
                logger.warning('stopped at step %d; no checkpoint, because of save_strategy="no"', step)
            elif step == self._first_step or self._newest == self._path(step):
                logger.warning("stopped at step %d; the newest checkpoint is %s", step, self._newest or "none")
            elif self._guard.is_open:
                logger.warning("stopped in the middle of an optimizer step; the newest checkpoint is %s", self._newest)
            else:
                self._write(None, self._boundary if self._in_step else None)
                logger.warning("stopped at step %d; saved %s", step, self._newest)
        except UnslothError as error:
            logger.error("no checkpoint could be made: %s", error)
            raise goodbye from error
        raise goodbye from None

    def _stop_listening(self) -> None:
        self._listener = interrupts.Listener()
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TrainingProgress):
                callback.close()

    # Between the steps

    def get_train_dataloader(self) -> Any:
        """As in transformers; the order of the rows depends on ``seed`` (or ``data_seed``) and the epoch alone."""
        with randomness.undisturbed():
            torch.default_generator.manual_seed(self.args.seed)
            return super().get_train_dataloader()

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            return EpochSampler(sampler, seed)
        return sampler

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers."""
        self._listener.check()
        self._in_step = True
        return super().get_batch_samples(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As in transformers; a signal that has arrived ends the run before or after it."""
        self._listener.check()
        loss = super().training_step(*args, **kwargs)
        self._listener.check()
        return loss

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; a signal that has arrived ends the run before it."""
        self._listener.check()
        return super().prediction_step(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in transformers; the random numbers of the training are not disturbed by it."""
        self._evaluating = True
        with randomness.undisturbed():
            metrics = super().evaluate(*args, **kwargs)
        self._evaluating = False
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in transformers, with ``skipped_steps``; a loss that is not finite is logged, and then forgotten."""
        if "loss" in logs:
            if not math.isfinite(self._total_loss_scalar):
                self._total_loss_scalar = self._finite_total
                self._tr_loss.zero_()
            self._finite_total = self._total_loss_scalar
        if self._guard.skipped:
            logs["skipped_steps"] = self._guard.skipped
        super().log(logs, start_time)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._guard.judge(norm, self.accelerator.scaler, self.state.global_step + 1)
        return norm

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As in transformers; the optimizer is guarded from here on."""
        if isinstance(self.optimizer, AcceleratedOptimizer):
            self._guard.attach(self.optimizer)
        return super().create_scheduler(num_training_steps, optimizer)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        trained = super()._init_training_state(*args, **kwargs)
        self._first_step = self.state.global_step
        return trained

    def _run_epoch(self, **kwargs: Any) -> None:
        if self._to_restore is not None:
            counters, self._to_restore = self._to_restore, None
            self._set_counters(counters)
            if counters["evaluation_due"]:
                self.control.should_evaluate = True
                names = ("model", "trial", "epoch", "ignore_keys_for_eval", "start_time")
                self._maybe_log_save_evaluate(self._tr_loss, None, *(kwargs[name] for name in names))
                self.control.should_evaluate = False
        super()._run_epoch(**kwargs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self._in_step = self._guard.is_open = False
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self._boundary = _Boundary(randomness.capture(), self._counters())

    def _counters(self) -> dict[str, Any]:
        """What a resumed run needs so that its log continues the earlier one, too."""
        metrics = getattr(self, "_metrics", {}).get("train", {})
        return {
            "loss": self._tr_loss.clone(),
            "logged_step": self._globalstep_last_logged,
            "metrics": {name: list(values) for name, values in metrics.items()},
            "tokens": getattr(self, "_total_train_tokens", 0),
            "skipped": self._guard.skipped,
            "skipped_in_a_row": self._guard.in_a_row,
            "evaluation_due": self._evaluating,
        }

    def _set_counters(self, counters: dict[str, Any]) -> None:
        self._tr_loss.copy_(counters["loss"])
        # What was lost before belongs into the next entry of the log, but not into the mean of this call.
        self._total_loss_scalar -= self._tr_loss.item() if torch.isfinite(self._tr_loss) else 0.0
        self._finite_total = self._total_loss_scalar
        self._globalstep_last_logged = counters["logged_step"]
        if hasattr(self, "_metrics"):
            self._metrics["train"].update({name: list(values) for name, values in counters["metrics"].items()})
        if hasattr(self, "_total_train_tokens"):
            self._total_train_tokens = counters["tokens"]
        self._guard.skipped, self._guard.in_a_row = counters["skipped"], counters["skipped_in_a_row"]

    # Writing

    def _path(self, step: int, trial: Any = None) -> Path:
        return checkpoint.path_of(Path(self._get_output_dir(trial)), step)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        self._write(trial, None)

    def _write(self, trial: Any, boundary: _Boundary | None) -> None:
        """Commit a checkpoint of the last finished step, and rotate the older ones.

        Args:
            trial: As in transformers.
            boundary: The states at the end of that step, if another one was begun since.
        """
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        step = self.state.global_step
        previous_best = self.state.best_model_checkpoint
        best = self._path(self.state.best_global_step, trial) if self.state.best_global_step else None
        if best is not None and (best.exists() or self.state.best_global_step == step):
            self.state.best_model_checkpoint = str(best)
        self._export_callbacks()
        run_states = {} if self.args.save_only_model else self._states(boundary)
        try:
            path = checkpoint.commit(
                Path(self._get_output_dir(trial)),
                self.accelerator.unwrap_model(self.model, keep_torch_compile=False),
                self._companions(),
                self.state,
                run_states,
                self._identity or differences.identify(self.model, self.args, self.train_dataset),
            )
        except TrainingError as error:
            self.state.best_model_checkpoint = previous_best
            raise TrainingError(f"{str(error).rstrip('.')}. {explanations.where_to_resume(self._last_good)}") from error
        except UnslothError:
            self.state.best_model_checkpoint = previous_best
            raise
        self._newest = path
        if self._guard.in_a_row == 0:
            self._last_good = path
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(path))
        kept = (path, self._last_good, self.state.best_model_checkpoint)
        discovery.rotate(path.parent, self.args.save_total_limit, kept)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        needed = checkpoint.weight_bytes(model)
        folder = output_dir or self.args.output_dir
        with (
            artifact.stage(folder, kind="model", existing="extend", needed_bytes=needed) as staging,
            artifact.utf8_path(staging) as path,
        ):
            checkpoint.write_model(model, self._companions(), path)

    def _companions(self) -> list[Any]:
        found = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        return [found] if isinstance(found, PreTrainedTokenizerBase | ProcessorMixin) else []

    def _states(self, boundary: _Boundary | None) -> dict[str, Any]:
        found = {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.lr_scheduler.state_dict(),
            "rng": boundary.random if boundary else randomness.capture(),
            _RUN: boundary.counters if boundary else self._counters(),
        }
        if self.accelerator.scaler is not None:
            found["scaler"] = self.accelerator.scaler.state_dict()
        return found

    def _export_callbacks(self) -> None:
        exported: dict[str, Any] = {}
        for callback in (*self.callback_handler.callbacks, self.control):
            if isinstance(callback, ExportableState):
                exported.setdefault(type(callback).__name__, []).append(callback.state())
        self.state.stateful_callbacks = {name: all_[0] if len(all_) == 1 else all_ for name, all_ in exported.items()}

    # Reading

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        resume.check_fit(folder, self.model if model is None else model)
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        except pickle.UnpicklingError as error:
            raise resume.pickle_refused(next(folder.glob("*model*.bin"), folder)) from error

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self._source is None or checkpoint is None:
            return
        fresh = [dict(group) for group in self.optimizer.param_groups]
        if "optim" not in self._accepted:
            self._load_state("optimizer", self.optimizer, checkpoint)
        if "lr_scheduler_type" not in self._accepted:
            self._load_state("scheduler", self.lr_scheduler, checkpoint)
        else:
            self.lr_scheduler.last_epoch = self.state.global_step
        continue_with(self.optimizer, self.lr_scheduler, fresh, self._accepted)
        if self._source.details is not None and _RUN in self._source.details["states"]:
            self._to_restore = states.read(Path(checkpoint), _RUN)

    def _load_scaler(self, checkpoint: str | None) -> None:
        if self._source is not None and checkpoint is not None and self.accelerator.scaler is not None:
            self._load_state("scaler", self.accelerator.scaler, checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self._source is None or checkpoint is None:
            return
        if "rng" not in self._source.states:
            logger.warning("the random generators start anew: the checkpoint has no usable state of them")
            return
        state = self._read("rng", checkpoint)
        if self._source.details is None:
            cuda = state.get("cuda", [])
            state = {**state, "torch": state["cpu"], "cuda": [cuda] if isinstance(cuda, torch.Tensor) else cuda}
        randomness.restore(state)

    def _load_best_model(self) -> None:
        best = Path(self.state.best_model_checkpoint)
        if (best / artifact.MANIFEST).is_file():
            discovery.require_whole(best)
        with artifact.utf8_path(best) as folder:
            self.state.best_model_checkpoint = os.fspath(folder)
            try:
                super()._load_best_model()
            finally:
                self.state.best_model_checkpoint = str(best)

    def _load_state(self, name: str, target: Any, checkpoint: str) -> None:
        if self._source is not None and name in self._source.states:
            target.load_state_dict(self._read(name, checkpoint))
        else:
            logger.warning("the %s starts anew: the checkpoint has no usable state of it", name)

    def _read(self, name: str, checkpoint: str) -> Any:
        if self._source is not None and self._source.details is None:
            return resume.read_foreign(Path(checkpoint), name)
        return states.read(Path(checkpoint), name)

    def _explained(self, error: BaseException) -> TrainingError | None:
        """The error to raise instead of one that the loop ended with; None if there is nothing to add."""
        step = self.state.global_step
        if isinstance(error, TooManySkipped):
            return explanations.skipped_too_many(error.step, error.count, self.args, self._last_good)
        if explanations.is_dead_worker(error):
            return explanations.dead_worker(error, self.args, self._last_good)
        if not is_out_of_memory(error):
            return None
        self.model.zero_grad(set_to_none=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return explanations.out_of_memory(step, self._evaluating, self.args, self._last_good)
