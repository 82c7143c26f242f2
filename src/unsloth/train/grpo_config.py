"""Hyperparameters of group-relative policy optimization."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments
from trl.trainer.grpo_config import GRPOConfig as TRLConfig

from unsloth.core.errors import ConfigError
from unsloth.core.log import get_logger
from unsloth.losses.policy import PolicyOptions
from unsloth.train.follow import FollowsModel
from unsloth.train.spellings import accepts_earlier_names
from unsloth.train.survival import SurvivalArguments

ENGINES = ("unsloth", "vllm", "transformers")
_OUR_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo")
_OF_BATCHES = {"per_device_train_batch_size", "gradient_accumulation_steps", "num_generations"}
_OF_BATCHES |= {"steps_per_generation", "generation_batch_size"}
_CHOICES: dict[str, tuple[Any, ...]] = {
    "rollout_engine": (None, *ENGINES),
    "invalid_rewards": ("raise", "mask"),
    "loss_type": (*_OUR_LOSSES, "gspo", "cispo", "sapo", "vespo", "luspo"),
    "scale_rewards": ("group", "batch", "none", True, False),
    "vllm_importance_sampling_mode": ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
}

logger = get_logger(__name__)


@dataclass
class RolloutArguments(SurvivalArguments, FollowsModel):
    """Fields that our GRPO has beside TRL's.

    Attributes:
        reward_functions: Reward functions by name, for runs that are described by a file; see
            :func:`unsloth.train.reward_names.find`. Used where the trainer is given no ``reward_funcs``.
        rollout_engine: What samples completions: ``"unsloth"``, this library's engine, on the weights and the adapter
            that are trained; ``"vllm"``, if it is installed; ``"transformers"``. None means our engine, and
            transformers for families of models that it does not know. ``use_vllm=True`` alone means our engine, too.
        vllm_sampling_params: Further sampling parameters, ours or vLLM's; ``temperature``, ``n``, ``seed`` and
            ``max_tokens`` follow the other arguments.
        vllm_importance_sampling_correction: Weigh tokens by how probable training finds them, over how probable the
            engine found them. None means: where the two compute in different precision, or are different programs.
        vllm_importance_sampling_cap: Upper bound of that weight; None means 2.
        max_prompt_length: Longest prompt in tokens; a longer one loses its beginning, which is said. None keeps all.
        invalid_rewards: What happens when a reward function raises, or gives anything but a finite number or None:
            ``"raise"`` ends the run with an error, ``"mask"`` leaves the completion out and counts it.
        reward_time_limit: Seconds that one call of a reward function may take; None for no limit.
        tool_time_limit: Seconds that one call of a tool, or one answer of an environment, may take; None for no limit.
        fused_head: Compute the output head in chunks, so that the logits never exist as a whole. None means yes.
        packing: Lay the completions of a batch end to end instead of padding them, and compute a prompt that several
            share once. None means wherever the model's attention tells them apart, which is on a GPU.
        tokens_per_pass: Consecutive batches of one update are computed together, up to so many tokens; 0 keeps them
            apart. None means 32,768 on a GPU, or fewer where memory, or the budget of ``use_gradient_checkpointing``,
            is short. Updates do not depend on it.
    """

    reward_functions: list[Any] | None = field(default=None, metadata={"help": "Reward functions by name."})
    rollout_engine: str | None = field(default=None, metadata={"help": "unsloth, vllm or transformers."})
    vllm_sampling_params: Any = field(default=None, metadata={"help": "Further sampling parameters."})
    vllm_importance_sampling_correction: bool | None = field(
        default=None, metadata={"help": "Correct for an engine that computes otherwise than training."}
    )
    vllm_importance_sampling_cap: float | None = field(default=None, metadata={"help": "Bound of the correction."})
    vllm_importance_sampling_mode: str = field(default="token_truncate", metadata={"help": "Form of the correction."})
    max_prompt_length: int | None = field(default=None, metadata={"help": "Longer prompts lose their beginning."})
    invalid_rewards: str = field(default="raise", metadata={"help": "raise or mask."})
    reward_time_limit: float | None = field(default=600.0, metadata={"help": "Seconds a call of a reward may take."})
    tool_time_limit: float | None = field(default=60.0, metadata={"help": "Seconds a call of a tool may take."})
    fused_head: bool | None = field(default=None, metadata={"help": "Compute no whole logits."})
    packing: bool | None = field(default=None, metadata={"help": "No padding, and shared prompts once."})
    tokens_per_pass: int | None = field(default=None, metadata={"help": "Batches computed together, in tokens."})


@accepts_earlier_names
@dataclass
class GRPOConfig(RolloutArguments, TRLConfig):
    """TRL's ``GRPOConfig``, with defaults that follow the model.

    Everything of ``trl.GRPOConfig`` and ``transformers.TrainingArguments`` is accepted, under today's names or those of
    earlier releases, and the fields of :class:`RolloutArguments`. A ``per_device_train_batch_size`` below
    ``num_generations`` is raised to it, unless ``steps_per_generation`` or ``generation_batch_size`` says how groups
    are spread over several batches.

    Raises:
        ConfigError: Values that contradict each other, or batches that hold no whole groups.
    """

    def __post_init__(self) -> None:
        self._check()
        self._raise_batches()
        # TRL calls this name deprecated, and reads a mode as on or off
        cap, correction = self.vllm_importance_sampling_cap, self.vllm_importance_sampling_correction
        self.vllm_importance_sampling_cap = None
        try:
            super().__post_init__()
        except ValueError as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(" ".join(str(error).split()).rstrip("."), do="Change the values it names.") from error
        self.vllm_importance_sampling_cap = cap
        self.vllm_importance_sampling_correction = correction
        self._check_loss()

    def change(self, values: Mapping[str, Any]) -> None:
        """As for other configurations; sizes of batches have been worked out before, and cannot be changed."""
        fixed = next((name for name in values if name in _OF_BATCHES and values[name] != getattr(self, name)), None)
        if fixed is not None:
            raise ConfigError(
                f"{fixed} decides on batches that the configuration has worked out already",
                got=f"{values[fixed]}, and {getattr(self, fixed)} there",
                do="Pass it to GRPOConfig.",
            )
        super().change(values)
        self._check()
        self._check_loss()

    def _check(self) -> None:
        if self.loss_type == "gspo":  # type: ignore[has-type] # the name of the paper for this pair
            self.loss_type, self.importance_sampling_level = "grpo", "sequence"
        _check(self)

    def _check_loss(self) -> None:
        if self.uses_our_loss:
            _ = self.loss_options  # says what is wrong with them

    @property
    def loss_options(self) -> PolicyOptions:
        """The hyperparameters of the loss, for the losses of :mod:`unsloth.losses.policy`."""
        return PolicyOptions(
            loss_type=self.loss_type,  # type: ignore[arg-type] # checked there
            epsilon=self.epsilon,
            epsilon_high=self.epsilon_high,
            delta=self.delta,
            beta=self.beta,
            level=self.importance_sampling_level,  # type: ignore[arg-type]
            max_completion_length=self.max_completion_length,
            weighted_kl=self.use_bias_correction_kl,
        )

    @property
    def uses_our_loss(self) -> bool:
        """Whether the loss is one of :mod:`unsloth.losses.policy`; TRL computes the others."""
        return (
            self.loss_type in _OUR_LOSSES
            and self.top_entropy_quantile == 1
            and self.entropy_coef == 0
            and not self.use_adaptive_entropy
            and self.off_policy_mask_threshold is None
        )

    @property
    def importance_bounds(self) -> tuple[float | None, float | None]:
        """Lower and upper bound of the correction's weight."""
        high = self.vllm_importance_sampling_cap
        return self.vllm_importance_sampling_clip_min, 2.0 if high is None else high

    def _raise_batches(self) -> None:
        """Make batches hold a whole group at least."""
        group = self.num_generations
        spread = self.steps_per_generation is not None or self.generation_batch_size is not None
        if self.per_device_train_batch_size < group and not spread:  # type: ignore[has-type]
            logger.warning(
                "per_device_train_batch_size is raised from %d to num_generations, %d: a group is compared with itself",
                self.per_device_train_batch_size,  # type: ignore[has-type]
                group,
                extra={"once": True},
            )
            self.per_device_train_batch_size = group
        evaluated = self.num_generations_eval or group
        if self.per_device_eval_batch_size < evaluated:  # type: ignore[has-type]
            self.per_device_eval_batch_size = evaluated


def _check(args: Any) -> None:
    """Raise :class:`ConfigError` for values that are wrong by themselves."""
    if not isinstance(args.num_generations, int) or args.num_generations < 2:
        raise ConfigError(
            "a completion is compared with others of its prompt, so a group needs two at least",
            got=f"num_generations={args.num_generations}",
            do="Use 4 or more.",
        )
    for name, known in _CHOICES.items():
        value = getattr(args, name)
        if value not in known:
            names = ", ".join(choice for choice in known if isinstance(choice, str))
            raise ConfigError(f"unknown {name}", got=value, do=f"Use one of {names}.")
    if args.tokens_per_pass is not None and args.tokens_per_pass < 0:
        raise ConfigError("tokens_per_pass must be 0 or more", got=args.tokens_per_pass)
    for name in ("max_prompt_length", "max_completion_length", "reward_time_limit", "tool_time_limit"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ConfigError(f"{name} must be above 0", got=value)
    if not args.temperature > 0:
        raise ConfigError(
            "greedy completions of one prompt are all the same, and teach nothing",
            got=f"temperature={args.temperature}",
            do="Use 1.0.",
        )
    if isinstance(args.reward_weights, Mapping):
        raise ConfigError("reward_weights must be a list", got=args.reward_weights, do="One number a function.")


def reopened(args: TrainingArguments | None) -> TrainingArguments | None:
    """TRL's configuration with what it has worked out of other fields left open again."""
    if isinstance(args, TRLConfig) and not isinstance(args, GRPOConfig):
        args = copy.copy(args)
        args.generation_batch_size = None
        args.vllm_importance_sampling_correction = args.vllm_importance_sampling_correction and None
        args.vllm_importance_sampling_mode = "token_truncate"
    return args


def choose_engine(args: GRPOConfig) -> str | None:
    """The name in ``rollout_engine``, or what ``vllm_mode`` says; None for our engine where it can be used."""
    wanted = args.rollout_engine
    if wanted is None and args.use_vllm and args.vllm_mode == "server":
        wanted = "vllm"
    if wanted == "vllm" and importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "vLLM is not installed", got='rollout_engine="vllm"', do="Leave it out: the engine here samples as well."
        )
    if wanted is None and args.use_vllm:
        logger.info('use_vllm: completions are sampled by the engine here; rollout_engine="vllm" asks for vLLM')
    return wanted
