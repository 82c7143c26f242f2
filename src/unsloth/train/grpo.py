"""Group-relative policy optimization (GRPO, arXiv:2402.03300), on TRL's trainer and with our engine.

A step samples a group of completions for every prompt, rates them with reward functions, and makes those more likely
that did better than their group. What is here: completions come from the weights as they are, by
:mod:`unsloth.train.rollouts`; log-probabilities and entropy come without whole logits and with a shared prompt
computed once; the loss is that of :mod:`unsloth.losses.policy`; what training and sampling think of each token is
compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from trl.trainer.callbacks import SyncRefModelCallback
from trl.trainer.grpo_trainer import GRPOTrainer as TRLTrainer
from trl.trainer.utils import RepeatSampler, split_tensor_dict

from unsloth.core.errors import ConfigError, RewardError
from unsloth.core.log import get_logger
from unsloth.data.formats import template_variables
from unsloth.data.masking import IGNORED
from unsloth.data.prepare import Rows
from unsloth.generate.sampling import SamplingParams
from unsloth.losses.policy import PolicyLoss, policy_loss, sampling_correction, without_truncated
from unsloth.models import record
from unsloth.rewards.call import name_of
from unsloth.train import masters, reward_names, setup
from unsloth.train.checked_reward import CheckedReward, mask_whole_rows
from unsloth.train.environments import (
    Environments,
    check_prompts,
    conversations,
    placeholder_rows,
    tools_accepted,
)
from unsloth.train.grpo_config import GRPOConfig, choose_engine, reopened
from unsloth.train.larger_passes import LargerPasses
from unsloth.train.loop import ModelLoop
from unsloth.train.packed_rows import filled, pack
from unsloth.train.phases import Phases
from unsloth.train.preference import accept
from unsloth.train.prompt_rows import check_columns, encode_prompt, prompt_rows
from unsloth.train.reference import AdapterFree, reference_of
from unsloth.train.rollout_progress import RolloutProgress, samples
from unsloth.train.rollouts import Completions, Rollouts, checked, sampling_params
from unsloth.train.sampling import RepeatedEpochs
from unsloth.train.token_logprobs import TokenLogprobs

# Legend: B completions of a batch, P tokens of the longest prompt, C of the longest completion.

logger = get_logger(__name__)


class GRPOTrainer(Phases, LargerPasses, Environments, ModelLoop, TRLTrainer):
    """Trains a model on its own completions, rated by reward functions.

    A subclass of ``trl.GRPOTrainer``. Adapters are trained in float32, and the reference of ``beta`` is the model
    without its adapter.

    Args:
        model: A model of ``FastLanguageModel``, with an adapter or loaded for full fine-tuning; a model of plain
            transformers or PEFT works too.
        reward_funcs: A function ``f(prompts, completions, **columns) -> list[float]``, ordinary or ``async``, or a
            list of them; a model that classifies sequences, or its name.
        args: A ``GRPOConfig``, or plain ``TrainingArguments``.
        train_dataset: Rows with a ``prompt``: a text, or a list of messages. Columns beside it go to the reward
            functions; ``reasoning_effort``, ``enable_thinking``, ``documents`` and the mapping
            ``chat_template_kwargs`` go to the chat template, too.
        eval_dataset: The same, or a mapping from name to data set.
        processing_class: The tokenizer.
        tokenizer: The earlier name of ``processing_class``.
        peft_config: A PEFT configuration, to add an adapter to ``model`` first.
        **more: ``beta``, ``loss_type`` and other fields of ``GRPOConfig``, over which they take precedence;
            ``callbacks``, ``tools``, ``environment_factory``, ``rollout_func`` and what else ``trl.GRPOTrainer`` takes.

    Raises:
        ConfigError: Arguments that contradict each other, or a reward function that needs a column that is not there.
        DataError: Rows without prompts; names the row.
        TrainingError: The model has nothing to train.
    """

    rollouts: Rollouts | None = None
    """What samples completions; None where transformers or vLLM does."""
    _buffered_inputs: list[dict[str, Any]] | None

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        reward_funcs: Any = None,
        args: TrainingArguments | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | Mapping[str, Rows] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        **more: Any,
    ) -> None:
        given = accept(TRLTrainer, GRPOConfig, model, reopened(args), (tokenizer, processing_class), peft_config, more)
        args = given.args
        head = record.transformers_model(given.model).get_output_embeddings()
        if isinstance(head, BaseTunerLayer):
            raise ConfigError(
                "an adapter on the output head cannot be trained by GRPO", do="Leave lm_head out of target_modules."
            )
        self._tokenizer = given.tokenizer
        functions = reward_funcs
        if functions is None:
            functions = [reward_names.find(entry) for entry in args.reward_functions or ()]
        functions = list(functions) if isinstance(functions, list | tuple) else [functions]
        rows, held_out = prompt_rows(train_dataset, given.more), prompt_rows(eval_dataset, {"eval": True})
        check_columns(functions, rows, given.more)
        talk = conversations(given.more.get("environment_factory"))
        if talk is not None:
            del given.more["environment_factory"]
            functions += talk.rewards()
            rows = placeholder_rows(args) if rows is None else rows
        weights = args.reward_weights
        if weights is not None and len(weights) != len(functions) and not given.more.get("environment_factory"):
            raise ConfigError(
                "reward_weights needs one number for every reward function",
                got=f"{len(weights)} for {', '.join(map(name_of, functions))}",
            )
        with_tools = bool(given.more.get("tools") or given.more.get("environment_factory"))
        if with_tools or talk is not None:
            check_prompts(rows)
        if given.more.get("rollout_func") is not None:
            given.more["rollout_func"] = checked(given.more["rollout_func"])
        engine = choose_engine(args)
        args.use_vllm = engine == "vllm"
        beta, args.beta = args.beta, 0.0  # TRL would copy the adapter, or load the model again, as the reference
        reference = reference_of(given.model) if beta else None  # before TRL puts its head around the model
        synchronized, args.sync_ref_model = args.sync_ref_model, False
        with masters.preserved(given.model), tools_accepted(given.tokenizer, with_tools):
            super().__init__(
                model=given.model,
                reward_funcs=[self._checked(function, args) for function in functions],
                args=args,
                train_dataset=rows,
                eval_dataset=held_out,
                processing_class=given.tokenizer,
                **given.more,
            )
        self._set_up_environments(talk)
        self._check_own_rewards(args)
        self.beta = args.beta = beta
        self.mask_truncated_completions = False  # done here, where it is known what ended a completion
        args.sync_ref_model = synchronized
        chunked = args.fused_head is not False
        self._policy = TokenLogprobs(given.model, chunked)
        self._packing = args.packing is not False
        self._fills = given.model.device.type == "cuda"  # where launches of similar passes are recorded
        if args.packing and not self._policy.packs:
            raise ConfigError(
                "packing needs a model whose attention tells packed sequences apart",
                got=record.transformers_model(given.model).config._attn_implementation,
                do="Leave packing out; it is used where it can be. It also needs fused_head.",
            )
        self._add_reference(reference, chunked)
        self._batch_rows: Sequence[Mapping[str, Any]] = ()
        self._turn = self._evaluated = 0
        if engine in (None, "unsloth"):
            self.rollouts = self._make_rollouts(required=engine is not None)
        self._corrects = self._wants_correction()
        shown = RolloutProgress(lambda: samples(self._logs), show_samples=not args.log_completions)
        setup.show_progress(self, shown)

    def _checked(self, function: Any, args: GRPOConfig) -> Any:
        if not callable(function) or isinstance(function, nn.Module | CheckedReward):
            return function  # a reward model, or its name
        return CheckedReward(function, args.invalid_rewards, args.reward_time_limit)  # type: ignore[arg-type]

    def _check_own_rewards(self, args: GRPOConfig) -> None:
        """Check what environments reward themselves as well; TRL has added it."""
        functions: list[Any] = self.reward_funcs  # type: ignore[has-type]
        self.reward_funcs = [self._checked(function, args) for function in functions]

    def _add_reference(self, reference: nn.Module | None, chunked: bool) -> None:
        """The reference of the KL term: the model without its adapter, or else a frozen copy."""
        self._reference = self._policy
        self.ref_model = None
        if reference is not None and not isinstance(
            reference, AdapterFree
        ):  # which TRL's own way of switching the adapter off does, too
            self.ref_model = self.accelerator.prepare_model(reference, evaluation_mode=True)
            self._reference = TokenLogprobs(reference, chunked)
        if self.args.sync_ref_model:
            if self.ref_model is None:
                raise ConfigError(
                    "sync_ref_model needs a reference of its own, and with an adapter or beta=0 there is none",
                    do="Leave it out, or fine-tune in full with beta above 0.",
                )
            self.add_callback(SyncRefModelCallback(ref_model=self.ref_model, accelerator=self.accelerator))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; what sampling needs is freed at the end."""
        try:
            return super().train(*args, **kwargs)
        finally:
            if self.rollouts is not None:
                self.rollouts.close()

    # Rollouts

    def _make_rollouts(self, required: bool) -> Rollouts | None:
        rows = max(self.args.generation_batch_size, self.args.per_device_eval_batch_size)
        params = sampling_params(self.args)
        turns = bool(self.tools) or self.rollout_func is not None
        try:
            return Rollouts(self.model, self._tokenizer, params, rows, self.num_generations, turns)
        except ConfigError as error:
            if required:
                raise
            logger.warning("transformers samples the completions, more slowly, because %s", str(error).split("\n")[0])
            return None

    def _wants_correction(self) -> bool:
        """Whether tokens are weighed for the difference between training and sampling."""
        wanted = self.args.vllm_importance_sampling_correction
        if self.rollouts is None or wanted is False:
            return False
        training = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else self.model.dtype
        corrects = bool(wanted) or training != self.rollouts.dtype or self.rollouts.float8
        if corrects and not self.args.uses_our_loss:
            logger.warning(
                "with loss_type=%r and these options the loss is computed by TRL: tokens are not weighed for the "
                "difference between sampling and training, which is not reported either",
                self.args.loss_type,
            )
        return corrects and self.args.uses_our_loss

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | None = None,
        most: Sequence[int] | None = None,
    ) -> Completions:
        """One completion by the policy as it is for each of ``prompts``, token ids; for environments of several turns.

        ``most`` is how many tokens each may have, in the place of ``params.max_tokens``.

        The random numbers follow from the seed, the step, how many times this was called in it, and the place in the
        list. A signal that arrives meanwhile ends the run as it does elsewhere.

        Raises:
            ConfigError: The completions of this trainer come from elsewhere.
            DataError: A prompt leaves no room for a completion.
            GenerationError: The device failed.
        """
        if self.rollouts is None:
            raise ConfigError("this trainer samples without the engine", do='Set rollout_engine="unsloth".')
        place = (0, self._step) if self.model.training else (1, self.state.global_step, self._evaluated)
        key = (self.args.seed, self.accelerator.process_index, *place, self._turn)
        self._turn += 1
        return self.rollouts.sample(prompts, key, self._listener.check, params, most)

    def _generate(self, prompts: list[Any]) -> Any:
        """As in TRL; the engine's cache gives its memory back when all turns are over.

        A completion that a stop text ended was not cut off, which TRL reads off its last token.
        """
        self._turn, self._finished = 0, None
        mode = "train" if self.model.training else "eval"
        try:
            found = super()._generate(prompts)
        finally:
            if self.rollouts is not None:
                self.rollouts.sleep()
        if mode == "eval":
            self._evaluated += 1
        if self._played is not None:
            self._finished = [episode.finished for episode in self._played]
        elif self.rollout_func is not None:  # whatever it sampled last
            self._finished = None
        if self._finished is not None:
            _, ids, written, *_ = found
            lengths = [len(turn) for turn in ids] if written is None else [sum(mask) for mask in written]
            self._note_ends(mode, lengths, self._finished)
        if self.rollouts is not None:
            seconds, tokens = self.rollouts.take_counts()
            self._metrics[mode]["rollout/seconds"].append(seconds)
            self._metrics[mode]["rollout/tokens_per_second"].append(tokens / max(seconds, 1e-9))
        return found

    def _note_ends(self, mode: str, lengths: Sequence[int], finished: Sequence[bool]) -> None:
        """Correct what TRL has noted of how completions ended."""
        pairs = torch.tensor([lengths, finished], device=self.accelerator.device).T
        every, ended = self.accelerator.gather(pairs).double().unbind(1)
        whole = every[ended > 0] if ended.any() else every.new_zeros(1)
        values = {"clipped_ratio": 1 - ended.mean(), "mean_terminated_length": whole.mean()}
        values |= {"min_terminated_length": whole.min(), "max_terminated_length": whole.max()}
        for name, value in values.items():
            self._metrics[mode][f"completions/{name}"][-1] = value.item()

    def _generate_single_turn(
        self,
        prompt_ids: list[list[int]],
        images: Any,
        multimodal_fields: Any,
        num_generations: int,
        has_tool_images: bool = False,
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """As in TRL, by our engine."""
        if self.rollouts is None or images or multimodal_fields:
            return super()._generate_single_turn(
                prompt_ids, images, multimodal_fields, num_generations, has_tool_images
            )
        found = self.sample(prompt_ids)
        self._finished = found.finished
        return found.ids, found.logprobs

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], Any, dict[str, Any]]:
        """As in TRL, with each row's own variables for the chat template, and prompts cut to ``max_prompt_length``."""
        if self._is_vlm:
            return super()._tokenize_prompts(prompts)
        found: list[list[int]] = []
        before: Any = None
        for number, prompt in enumerate(prompts):
            key = (prompt, self._tools_of(number), self._variables_of(number))
            found.append(found[-1] if key == before else self._encode(*key))
            before = key
        return found, None, {}

    def _encode(self, prompt: Any, tools: list[Any], variables: Mapping[str, Any]) -> list[int]:
        more = {**self.chat_template_kwargs, **variables}
        ids = encode_prompt(prompt, self._tokenizer, more, tools, self.chat_template)
        most = self.args.max_prompt_length
        if most is None or len(ids) <= most:
            return ids
        logger.warning(
            "a prompt is longer than max_prompt_length=%d: it loses its beginning", most, extra={"once": True}
        )
        return ids[-most:]

    def _tools_of(self, number: int) -> list[Any]:
        if self.environment_factories is not None:
            return self._env_tools[self._batch_environments[number]]
        return self.tools

    def _variables_of(self, number: int) -> dict[str, Any]:
        if number >= len(self._batch_rows):  # prompts that no row stands behind
            return {}
        row = self._batch_rows[number]
        return {**template_variables(row), **(row.get("chat_template_kwargs") or {})}

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """As in TRL; warns where no group has anything to learn from."""
        self._batch_rows = inputs
        found = super()._generate_and_score_completions(inputs)
        if self.args.mask_truncated_completions:
            self._leave_out_truncated(found)
        if self.model.training and not found["advantages"].any():
            logger.warning(
                "all completions of each prompt got the same reward, so there is nothing to learn from this batch: "
                "the reward functions may be too coarse, or the task too hard or too easy",
                extra={"once": True},
            )
        return found

    def _leave_out_truncated(self, batch: dict[str, Any]) -> None:
        """Take completions that were cut off out of the loss."""
        mask, ends = batch["completion_mask"], [*self.eos_token_ids, self._tokenizer.pad_token_id]
        if self._finished is None:
            last = batch["completion_ids"].gather(1, (mask.sum(1, keepdim=True) - 1).clamp(min=0))
            finished = torch.isin(last[:, 0], torch.tensor(ends, device=mask.device))
        else:
            finished = torch.tensor(self._finished, device=mask.device)
        batch["completion_mask"] = without_truncated(mask, finished)
        counted = batch["completion_mask"] * batch.get("tool_mask", 1)
        batch["num_items_in_batch"] = self.accelerator.gather(counted.sum()).sum()

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> torch.Tensor:
        """As in TRL: (B, functions). A completion that one function could not rate is rated by none."""
        found = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        checked = [function for function in self.reward_funcs if isinstance(function, CheckedReward)]
        if self.accelerator.num_processes == 1:
            found = mask_whole_rows(checked, found)
            self._count_masked(checked, found, prompts)
        return found

    def _count_masked(self, checked: Sequence[CheckedReward], found: torch.Tensor, prompts: Any) -> None:
        masked = {row for function in checked for row in function.masked}
        unrated = [row for row in found.isnan().all(1).nonzero().flatten().tolist() if row not in masked]
        if unrated and self.args.invalid_rewards == "raise":
            names = ", ".join(self.reward_func_names)
            raise RewardError(
                f"no reward function ({names}) applies to completion {unrated[0]}: all returned None",
                got=prompts[unrated[0]],
                do='Return a number from one of them, or pass invalid_rewards="mask".',
            )
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["rewards/masked"].append(float(len(masked) + len(unrated)))
        for function in checked:
            if function.masked:
                row, reason = next(iter(function.masked.items()))
                logger.warning("reward %r: completion %d is left out: %s", function.__name__, row, reason)

    # Batches

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        """As in TRL, in the order of the data set: the completions of a group stay neighbours.

        Each batch is as wide as its longest prompt and completion, and may stand for several.
        """
        rows = generation_batch if isinstance(generation_batch, list) else [{}]
        if not self.model.training or {"image", "images"} & set(rows[0]):
            return super()._prepare_inputs(generation_batch)
        if self._step % self._cycle == 0 or self._buffered_inputs is None:
            whole = self._generate_and_score_completions(generation_batch)
            self._buffered_inputs = split_tensor_dict(whole, self.args.steps_per_generation)
        return self._next_pass()

    @property
    def _cycle(self) -> int:
        """Batches between two generations."""
        return self.args.steps_per_generation * self.num_iterations

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(train_dataset)
        return RepeatedEpochs(sampler) if isinstance(sampler, RepeatSampler) else sampler

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in transformers; the completions depend on the seed, the step and the place of a row."""
        self._evaluated = 0
        return super().evaluate(*args, **kwargs)

    # Log-probabilities and loss

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **images: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Log-probability and entropy (B, C) of the completions' tokens; as in TRL."""
        if compute_aux_loss or any(value is not None for value in images.values()):
            return super()._get_per_token_logps_and_entropies(
                model,
                input_ids,
                attention_mask,
                logits_to_keep,
                batch_size,
                compute_entropy,
                compute_aux_loss,
                **images,
            )
        rows = self._rows_at_once(input_ids, batch_size)
        parts = [
            self._scores(model, ids, attended, logits_to_keep, compute_entropy)
            for ids, attended in zip(input_ids.split(rows), attention_mask.split(rows), strict=True)
        ]
        logprobs = torch.cat([part.logprobs[:, -logits_to_keep:] for part in parts])
        entropy = None
        if compute_entropy:
            entropy = torch.cat([part.entropy[:, -logits_to_keep:] for part in parts if part.entropy is not None])
        return logprobs, entropy, None

    def _scores(self, model: nn.Module, ids: torch.Tensor, attended: torch.Tensor, kept: int, entropy: bool) -> Any:
        scorer = self._reference if model is self.ref_model else self._policy
        is_prompt = torch.arange(ids.shape[1], device=ids.device) < ids.shape[1] - kept
        packed = None
        if self._packing and scorer.packs:
            prompts = ids[:, :-kept]
            # the first row with the same prompt
            leaders = (prompts[:, None] == prompts[None]).all(-1).int().argmax(1)
            packed = pack(ids, attended, is_prompt.expand_as(ids), leaders)
            packed = filled(packed) if self._fills else packed
        labels = ids.masked_fill((attended == 0) | is_prompt, IGNORED)
        with self.accelerator.autocast():
            return scorer.scores(
                model,
                {"input_ids": ids, "attention_mask": attended},
                labels,
                packed,
                temperature=self.temperature,
                entropy=entropy,
                entropy_grad=self._entropy_bonus_enabled,
            )

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """The loss of a batch, by :mod:`unsloth.losses.policy`; TRL's own where it has what only TRL computes."""
        if not inputs:  # computed with an earlier batch
            return torch.zeros((), device=self.accelerator.device, requires_grad=True)
        if not self.args.uses_our_loss or self.aux_loss_enabled or "pixel_values" in inputs:
            return super()._compute_loss(model, inputs)
        mask = inputs["completion_mask"]
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attended = torch.cat([inputs["prompt_mask"], mask], dim=1)
        logprobs, entropy, _ = self._get_per_token_logps_and_entropies(
            model, ids, attended, mask.shape[1], compute_entropy=True
        )
        mask = mask * inputs.get("tool_mask", 1)
        old = inputs.get("old_per_token_logps")
        accumulated = self.current_gradient_accumulation_steps if self.model.training else 1
        num_items = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
        if self.model.training:  # they are those of all batches of a generation
            num_items = num_items * accumulated / self.args.steps_per_generation
        found = policy_loss(
            logprobs,
            old,
            inputs["advantages"],
            mask,
            self.args.loss_options,
            ref_logprobs=inputs.get("ref_per_token_logps"),
            correction=self._correction((logprobs if old is None else old).detach(), inputs, mask),
            num_items=num_items,
        )
        self._note(found, entropy, mask)
        if self.args.loss_type == "dapo":
            return found.loss
        batches = len(mask) // self.args.per_device_train_batch_size if self.model.training else 1
        return found.loss * batches / accumulated

    def _correction(self, logprobs: torch.Tensor, inputs: Mapping[str, Any], mask: torch.Tensor) -> torch.Tensor | None:
        """Compare log-probabilities (B, C) with those of sampling; weights of the tokens, if they are to have any."""
        sampled = inputs.get("sampling_per_token_logps")
        if "importance_sampling_ratio" in inputs or sampled is None:  # TRL's, which has compared them already
            return inputs.get("importance_sampling_ratio")
        known = mask.bool() & ~sampled.isnan()
        apart = (logprobs - sampled).abs().masked_fill(~known, 0.0)
        mode = "train" if self.model.training else "eval"
        total, most, count = torch.stack([apart.sum(), apart.max(), known.sum().to(apart.dtype)]).tolist()
        self._metrics[mode]["sampling/sampling_logp_difference/mean"].append(total / max(count, 1))
        self._metrics[mode]["sampling/sampling_logp_difference/max"].append(most)
        if not self._corrects:
            return None
        weight = sampling_correction(
            logprobs, sampled, mask, self.args.vllm_importance_sampling_mode, *self.args.importance_bounds
        )
        kept = weight.expand_as(mask)[mask.bool()]
        if len(kept):
            for name, value in zip(
                ("min", "mean", "max"), torch.stack([kept.min(), kept.mean(), kept.max()]).tolist(), strict=True
            ):
                self._metrics[mode][f"sampling/importance_sampling_ratio/{name}"].append(value)
        return weight

    def _note(self, found: PolicyLoss, entropy: torch.Tensor | None, mask: torch.Tensor) -> None:
        """Keep what is reported of a batch."""
        assert entropy is not None
        values = {
            "entropy": (entropy * mask).sum() / mask.sum().clamp(min=1),
            "clip_ratio/low_mean": found.clipped_low,
            "clip_ratio/high_mean": found.clipped_high,
            "clip_ratio/region_mean": found.clipped_low + found.clipped_high,
        }
        if self.beta and found.kl is not None:
            values["kl"] = found.kl
        numbers = torch.stack([value.detach().float() for value in values.values()])
        mode = "train" if self.model.training else "eval"
        for name, value in zip(values, self.accelerator.gather(numbers[None]).mean(0).tolist(), strict=True):
            self._metrics[mode][name].append(value)

    # Surviving

    def _counters(self) -> dict[str, Any]:
        """With the completions of a generation that is not used up, so that a resumed run goes on with them."""
        return {
            **super()._counters(),
            "batches": self._step,
            "rollouts": self._buffered_inputs if self._step % self._cycle else None,
            "entropy": [self.entropy_coef, self._last_world_entropy],
        }

    def _set_counters(self, counters: dict[str, Any]) -> None:
        super()._set_counters(counters)
        self._step = counters["batches"]
        self.entropy_coef, self._last_world_entropy = counters["entropy"]
        if counters["rollouts"] is not None:
            device = self.accelerator.device
            self._buffered_inputs = [
                {name: value.to(device) if torch.is_tensor(value) else value for name, value in part.items()}
                for part in counters["rollouts"]
            ]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        self._step, self._buffered_inputs = 0, None  # of this run, until the checkpoint says otherwise
        self._forget_passes()
        super()._load_optimizer_and_scheduler(checkpoint)
