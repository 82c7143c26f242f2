"""How much memory a training run takes, found from shapes alone: no weights are loaded, nothing is allocated.

One step of the run is carried out on tensors that have a shape and a dtype but no memory, through the model's own
code, and what would be allocated is counted. So whatever a model family does differently is in the count.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, PretrainedConfig

from unsloth.generate.options import EngineOptions
from unsloth.kernels.logprobs import logprobs
from unsloth.layers import host_embedding
from unsloth.memory import checkpointing
from unsloth.models import adapters, load, modes, record
from unsloth.train import block_memory, memory_error, skeleton
from unsloth.train.allocations import Allocations
from unsloth.train.config import SFTConfig
from unsloth.train.dpo import DPOConfig
from unsloth.train.grpo_config import GRPOConfig
from unsloth.train.kto import KTOConfig
from unsloth.train.paired import PairedArguments
from unsloth.train.preference import PreferenceArguments
from unsloth.train.reward import RewardConfig
from unsloth.train.rollouts import cache_pages, page_bytes
from unsloth.train.token_logprobs import head_options

Training = SFTConfig | DPOConfig | KTOConfig | PairedArguments | GRPOConfig | RewardConfig
"""The configurations of all trainers whose runs are estimated."""

# The fused head works through the logits in tiles of at most this size, in float32.
_TILE_TOKENS, _TILE_VOCABULARY = 4096, 32768
_MOMENTS = {"ademamix": 3, "lion": 1, "rmsprop": 1, "adagrad": 1, "sgd": 0, "adafactor": 0}
_GRADIENTS, _LOGITS, _ACTIVATIONS = "gradients", "logits", "activations"


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes in use at the moment of a training step when most are.

    Not included: what the process and the device's own libraries take, and what the allocator keeps unused.

    Attributes:
        weights: The base model, in the form it is held in; where DPO or KTO train all of it, also the reference.
        adapter: The adapter's weights.
        optimizer: The optimizer's state.
        gradients: Those gradients that exist at that moment.
        activations: What the forward pass keeps for the backward pass, and working copies of weights.
        logits: The output head's values, their gradient and copies, and working copies of the head itself.
        batch_size: Rows of the batch that was assumed; a pair of answers is one.
        sequence_length: Tokens of each of its sequences; a prompt with one of its answers is a sequence.
        trainable_parameters: How many numbers are trained.
        total_parameters: How many numbers the model and its adapter have.
        host: Bytes of host memory: layers that wait there, where memory on the GPU is shortest, and an embedding.
        cache: Keys and values of completions while they are sampled; given back before training goes on.
        sampling: What sampling works with beside them.
    """

    weights: int
    adapter: int
    optimizer: int
    gradients: int
    activations: int
    logits: int
    batch_size: int
    sequence_length: int
    trainable_parameters: int
    total_parameters: int
    host: int = 0
    cache: int = 0
    sampling: int = 0

    @property
    def static(self) -> int:
        """Bytes that are there before the first step: model and adapter."""
        return self.weights + self.adapter

    @property
    def total(self) -> int:
        """The larger of training and sampling, in bytes."""
        training = self.gradients + self.activations + self.logits
        return self.static + self.optimizer + max(training, self.cache + self.sampling)

    def parts(self) -> dict[str, int]:
        """The parts of training by name, in bytes, in the order in which they come to exist."""
        return {
            "weights": self.weights,
            "adapter": self.adapter,
            "optimizer state": self.optimizer,
            "gradients": self.gradients,
            "activations": self.activations,
            "logits": self.logits,
        }

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in self.parts().items())
        if self.cache:
            parts += (
                f"; or, sampling, keys and values {format_bytes(self.cache)}, working {format_bytes(self.sampling)}"
            )
        return f"{format_bytes(self.total)} at {self.batch_size} x {self.sequence_length} tokens: {parts}"


def format_bytes(size: float) -> str:
    """A size in binary units, such as ``"1.50 GiB"``."""
    unit, scale = next(((u, s) for u, s in (("GiB", 2**30), ("MiB", 2**20)) if size >= s), ("KiB", 2**10))
    return f"{size / scale:,.2f} {unit}" if unit == "GiB" else f"{size / scale:,.0f} {unit}"


def read_config(options: load.LoadOptions) -> PretrainedConfig:
    """The configuration of the model that ``options`` name: of a saved adapter, its base model's.

    Raises:
        UnslothError: As in :func:`unsloth.models.load.load`.
    """
    return load.read_config(options)


def estimate(
    options: load.LoadOptions,
    adapter: adapters.AdapterOptions | None,
    training: Training,
    *,
    config: PretrainedConfig | None = None,
    built: skeleton.Skeleton | None = None,
    sequence_length: int | None = None,
    padded: bool | None = None,
    on_gpu: bool | None = None,
    whole_blocks: bool = True,
) -> MemoryEstimate:
    """Estimate the memory of supervised fine-tuning, DPO, KTO, ORPO, CPO or GRPO, for a batch of the largest size.

    Preference training is taken to count every token of a sequence, and to compute the prompt of a pair twice, which
    it does not do where batches are packed: both are the most that it can take.

    GRPO is taken to sample all completions of a generation at once, each of the full length, and to compute no batches
    together, which it does where memory is free. Without ``max_prompt_length``, prompts take what completions leave of
    ``max_seq_length``.

    The model is taken as transformers and PEFT define it. Checked against a count of the allocations of real steps
    on the CPU, and against updates and GRPO on a GPU (see docs/performance-log.md).

    Args:
        options: How the model would be loaded.
        adapter: The adapter; None for full fine-tuning.
        training: Batch size, accumulation, optimizer and precision of the run; not changed. Its class says what is
            trained.
        config: The model's configuration; read from ``options.model_name`` if it is not given.
        built: The model's skeleton, made from the same options; None makes one.
        sequence_length: Tokens a row; None means ``training.max_length``, or the model's ``max_seq_length``.
        padded: Whether rows of unequal length share a batch, for which attention needs a mask; None means: with
            batches of several rows, unless they are packed or padding-free; with preferences, unless they are packed,
            which they are on a GPU.
        on_gpu: Whether the run uses a GPU, on which the loss is computed without the whole logits; None looks.
        whole_blocks: Whether blocks train as one function each on a GPU, where they can.

    Raises:
        UnslothError: The model's configuration cannot be read, or the adapter does not fit it.
    """
    length = sequence_length or longest_sequence(training, options)
    with _quietly():
        if isinstance(training, RewardConfig):
            options = replace(options, auto_model=AutoModelForSequenceClassification)
        built = built or skeleton.build(config or read_config(options), options, adapter)
    loaded = record.require(built.model)
    follows = training._checkpointing_follows_model
    policy = loaded.gradient_checkpointing if follows else bool(training.gradient_checkpointing)
    modes.for_training(built.model, policy)
    on_gpu = torch.cuda.is_available() if on_gpu is None else on_gpu
    logprobs_of_answers = isinstance(training, PreferenceArguments | GRPOConfig)
    step = _Step(
        batch_size=training.per_device_train_batch_size,
        answers=_answers(training),
        length=length,
        padded=_is_padded(training, on_gpu) if padded is None else padded,
        accumulates=training.gradient_accumulation_steps > 1,
        autocast=_autocast(training, loaded.dtype),
        fused_head=training.fused_head if training.fused_head is not None else on_gpu or logprobs_of_answers,
        copied=adapter is None and _copies_model(training),
        scores=isinstance(training, RewardConfig),
        shared=_shared(training, length) if on_gpu else 0,
        scored=min(length - 1, training.max_completion_length or length)
        if isinstance(training, GRPOConfig)
        else length - 1,
    )
    optimizer = _Optimizer.of(training, on_gpu)
    if on_gpu and whole_blocks and built.blocks is not None and not step.padded and step.fused_head:
        found = _from_rules(built, built.blocks, step, policy, optimizer)
    else:
        with _quietly():
            found = _measure(built, step, optimizer)
    moved = _host_embedding(built.model) if on_gpu and options.offload_embedding else 0
    found = replace(found, weights=found.weights - moved, host=found.host + moved)
    return _with_sampling(found, training, built, length) if isinstance(training, GRPOConfig) else found


def longest_sequence(training: Training, options: load.LoadOptions) -> int:
    """Tokens of the longest sequence of a run."""
    if isinstance(training, GRPOConfig):
        whole = (training.max_prompt_length or options.max_seq_length) + (training.max_completion_length or 0)
        return min(whole, options.max_seq_length)
    return training.max_length or options.max_seq_length


def _shared(training: Training, length: int) -> int:
    """Tokens of a batch that are not computed, because prompts of a group are computed once."""
    if not isinstance(training, GRPOConfig) or training.packing is False:
        return 0
    batch = training.per_device_train_batch_size
    return (batch - -(-batch // training.num_generations)) * _prompt(training, length)


def _prompt(training: GRPOConfig, length: int) -> int:
    """Tokens of the longest prompt, in sequences of ``length``."""
    return max(1, length - (training.max_completion_length or 0))


def _with_sampling(
    found: MemoryEstimate, training: GRPOConfig, built: skeleton.Skeleton, length: int
) -> MemoryEstimate:
    """With what sampling takes: the cache, logits, and the widest values of a layer for the prompts of one step."""
    config = record.transformers_model(built.model).config.get_text_config()
    loaded, options = record.require(built.model), EngineOptions()
    itemsize = loaded.dtype.itemsize
    accumulated = training.per_device_train_batch_size * training.gradient_accumulation_steps
    rows, prompt = training.generation_batch_size or accumulated, _prompt(training, length)
    tokens = min(options.max_num_batched_tokens, -(-rows // training.num_generations) * prompt)
    hidden, inner = config.hidden_size, getattr(config, "intermediate_size", 4 * config.hidden_size)
    dequantized = 2 * inner * hidden * itemsize if loaded.precision in ("4bit", "8bit") else 0
    pages = cache_pages(rows, training.num_generations, prompt, length, options.page_size)
    return replace(
        found,
        cache=pages * page_bytes(config, options.page_size, itemsize),
        sampling=3 * tokens * (hidden + inner) * itemsize + dequantized + rows * config.vocab_size * (itemsize + 4),
    )


@dataclass(frozen=True)
class _Step:
    """What one training step does.

    Attributes:
        batch_size: Rows.
        answers: Sequences that a row of preferences, or a completion, has; 0 for a row that is a text.
        length: Tokens of a sequence.
        padded: Whether attention needs a mask.
        accumulates: Whether gradients outlive a batch.
        autocast: The dtype of products, if autocast chooses it.
        fused_head: Whether the whole logits never exist.
        copied: Whether a frozen copy of the model is the reference.
        shared: Tokens that sequences have in common, and that are computed once.
        scored: Of a sequence, the last tokens whose log-probabilities are computed, where not all are.
        scores: Whether the model gives one score a sequence.
    """

    batch_size: int
    answers: int
    length: int
    padded: bool
    accumulates: bool
    autocast: torch.dtype | None
    fused_head: bool
    copied: bool
    shared: int
    scored: int
    scores: bool = False

    @property
    def sequences(self) -> int:
        """That are computed at once."""
        return self.batch_size * max(1, self.answers)

    @property
    def tokens(self) -> int:
        """That are computed at once, without padding."""
        return self.sequences * self.length - self.shared


@dataclass(frozen=True)
class _Optimizer:
    """What an optimizer needs beside the gradients.

    Attributes:
        moments: Values it keeps for each trained number.
        eight_bit: Whether they take a byte each (with a float32 scale for 256 of them); those of tensors with fewer
            than 4,096 numbers stay float32.
        working: Trained tensors that it holds intermediate values of at once: "none", "one" or "all".
    """

    moments: int
    eight_bit: bool
    working: Literal["none", "one", "all"]

    @classmethod
    def of(cls, training: Training, on_gpu: bool) -> _Optimizer:
        name = str(getattr(training.optim, "value", training.optim))
        # Adafactor's rows and columns take less than a thousandth of the matrices.
        moments = next((count for part, count in _MOMENTS.items() if part in name), 2)
        if "8bit" in name or "paged" in name or "fused" in name or "bnb" in name:
            return cls(moments, "8bit" in name, "none")
        return cls(moments, False, "all" if on_gpu and name == "adamw_torch" else "one")

    def state_bytes(self, trained: Sequence[torch.Tensor]) -> int:
        def each(parameter: torch.Tensor) -> float:
            if self.eight_bit:
                return 4 if parameter.numel() < 4096 else 1 + 4 / 256
            return parameter.element_size()

        return round(sum(self.moments * each(p) * p.numel() for p in trained))

    def working_bytes(self, trained: Sequence[torch.Tensor]) -> int:
        sizes = [tensor.nbytes for tensor in trained]
        return {"none": 0, "one": max(sizes), "all": sum(sizes)}[self.working]


def _answers(training: Training) -> int:
    if not isinstance(training, PreferenceArguments | GRPOConfig):
        return 0
    return 1 if isinstance(training, KTOConfig | GRPOConfig) else 2


def _copies_model(training: Training) -> bool:
    if isinstance(training, GRPOConfig):
        return bool(training.beta)
    return isinstance(training, DPOConfig | KTOConfig) and not training.precompute_ref_log_probs


def _is_padded(training: Training, on_gpu: bool) -> bool:
    if isinstance(training, PreferenceArguments | GRPOConfig):
        return not on_gpu or training.packing is False or training.fused_head is False
    padding_free = on_gpu if training.padding_free is None else training.padding_free
    return training.per_device_train_batch_size > 1 and not (training.packing or padding_free)


def _autocast(training: Training, dtype: torch.dtype) -> torch.dtype | None:
    if training._precision_follows_model:
        return torch.bfloat16 if dtype == torch.bfloat16 else None
    return torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else None


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)
        yield


@dataclass(frozen=True)
class _Parameters:
    """Of a model: what is trained, what is there, and what of it is the adapter."""

    trained: list[torch.Tensor]
    everything: list[torch.Tensor]
    adapter: list[torch.Tensor]

    @classmethod
    def of(cls, model: torch.nn.Module) -> _Parameters:
        named = dict(model.named_parameters())
        adapted = isinstance(model, PeftModel)
        return cls(
            [parameter for parameter in named.values() if parameter.requires_grad],
            [*named.values(), *model.buffers()],
            [p for name, p in named.items() if adapted and (p.requires_grad or _is_adapter(name))],
        )


def _measure(built: skeleton.Skeleton, step: _Step, optimizer: _Optimizer) -> MemoryEstimate:
    """From a step on shapes."""
    model, parameters = built.model, _Parameters.of(built.model)
    vocabulary = record.transformers_model(model).config.get_text_config().vocab_size

    def label(tensor: torch.Tensor) -> str:
        is_logits = (
            tensor.ndim > 1 and vocabulary in (tensor.shape[-1], tensor.shape[0]) and tensor.dtype.is_floating_point
        )
        return _LOGITS if is_logits and tensor.numel() != 0 else _ACTIVATIONS

    allocations = Allocations(label)
    allocations.exclude(parameters.everything)
    with built.shapes, allocations:
        inputs = _batch(step)
        for _ in range(2 if step.accumulates else 1):
            _forward(model, inputs, step).backward()
            for parameter in parameters.trained:
                if parameter.grad is not None:
                    allocations.relabel(parameter.grad, _GRADIENTS)
        for parameter in parameters.trained:
            parameter.grad = None
    return _estimate(built, step, optimizer, parameters, allocations.peak())


def _from_rules(
    built: skeleton.Skeleton,
    blocks: block_memory.Blocks,
    step: _Step,
    policy: checkpointing.Policy,
    optimizer: _Optimizer,
) -> MemoryEstimate:
    """From the rules that blocks go by which train as one function."""
    parameters = _Parameters.of(built.model)
    inner = record.transformers_model(built.model)
    dtype = step.autocast or record.require(built.model).dtype
    vocabulary = inner.config.get_text_config().vocab_size
    found = block_memory.measure(blocks, policy, step.tokens, dtype.itemsize, vocabulary)
    all_gradients = sum(parameter.nbytes for parameter in parameters.trained)
    gradients, activations, logits = found.peak(all_gradients, accumulated=step.accumulates)
    peak = Counter({_GRADIENTS: gradients, _LOGITS: logits, _ACTIVATIONS: activations})
    return replace(_estimate(built, step, optimizer, parameters, peak), host=found.host)


def _host_embedding(model: torch.nn.Module) -> int:
    """Bytes of an input embedding that can be in host memory."""
    inner = record.transformers_model(model)
    return 0 if host_embedding.obstacle(inner) else inner.get_input_embeddings().weight.nbytes


def _estimate(
    built: skeleton.Skeleton, step: _Step, optimizer: _Optimizer, parameters: _Parameters, peak: Counter[str]
) -> MemoryEstimate:
    """The larger of a peak in forward and backward, and what the update of the weights takes."""
    trained, model = parameters.trained, built.model
    gradients = sum(parameter.nbytes for parameter in trained)
    updating = gradients + optimizer.working_bytes(trained) + memory_error.snapshot_bytes(trained)
    if updating > sum(peak.values()):
        peak = Counter({_GRADIENTS: gradients, _ACTIVATIONS: updating - gradients})
    base = _bytes(parameters.everything) - _bytes(parameters.adapter)
    return MemoryEstimate(
        weights=2 * base if step.copied else base,
        adapter=_bytes(parameters.adapter),
        optimizer=optimizer.state_bytes(trained),
        gradients=peak[_GRADIENTS],
        activations=peak[_ACTIVATIONS],
        logits=peak[_LOGITS],
        batch_size=step.batch_size,
        sequence_length=step.length,
        trainable_parameters=sum(parameter.numel() for parameter in trained),
        total_parameters=_count_parameters(model),
    )


def _batch(step: _Step) -> dict[str, torch.Tensor]:
    shape = (step.sequences, step.length)
    names = ["input_ids", "labels", *(["attention_mask"] if step.padded else [])]
    return {name: torch.zeros(shape, dtype=torch.int64) for name in names}


def _forward(model: torch.nn.Module, inputs: dict[str, torch.Tensor], step: _Step) -> torch.Tensor:
    """The loss of a batch, computed as the trainer does."""
    with torch.autocast("cpu", dtype=step.autocast, enabled=step.autocast is not None):
        inner = record.transformers_model(model)
        if step.scores:
            return model(**{k: v for k, v in inputs.items() if k != "labels"}, use_cache=False).logits.float().sum()
        if step.answers:
            return _logprobs(inner, inputs, step)
        if step.fused_head:
            hidden = inner.base_model(**{k: v for k, v in inputs.items() if k != "labels"}).last_hidden_state
            return _FusedLoss.apply(hidden, inner.get_output_embeddings().weight)
        outputs = model(**inputs, use_cache=False)
    if step.autocast is not None:
        outputs.logits.float()  # the trainer hands out float32 copies of what was computed in 16 bits
    return outputs.loss


def _logprobs(inner: Any, inputs: dict[str, torch.Tensor], step: _Step) -> torch.Tensor:
    """A loss of the log-probabilities of the last tokens, computed as the trainers that need them do."""
    inputs, targets = {k: v for k, v in inputs.items() if k != "labels"}, inputs["labels"][:, -step.scored :]
    if not step.fused_head:
        logits = inner(**inputs, use_cache=False).logits[:, :-1].float()
        return logits.log_softmax(-1)[:, -step.scored :].gather(-1, targets[..., None]).sum()
    hidden = inner.base_model(**inputs, use_cache=False).last_hidden_state[:, -step.scored - 1 : -1]
    scored = hidden.reshape(-1, hidden.shape[-1])  # the rows that count
    head = inner.get_output_embeddings()
    return logprobs(scored, head.weight, targets.reshape(-1), options=head_options(inner.config)).logprobs.sum()


class _FusedLoss(torch.autograd.Function):
    """The shapes of a loss that is computed tile by tile, forward and again backward."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight)
        _tile(hidden, weight)
        return torch.empty(())

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        hidden, weight = ctx.saved_tensors
        _tile(hidden, weight)
        return torch.empty_like(hidden), torch.empty_like(weight) if ctx.needs_input_grad[1] else None


def _tile(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    tokens = hidden.numel() // hidden.shape[-1]
    return torch.empty(min(tokens, _TILE_TOKENS), min(weight.shape[0], _TILE_VOCABULARY))


def _is_adapter(name: str) -> bool:
    return "lora_" in name or "modules_to_save" in name


def _bytes(tensors: Sequence[torch.Tensor]) -> int:
    """Bytes of the storages of ``tensors``, each counted once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _count_parameters(model: torch.nn.Module) -> int:
    packed = {
        id(m.weight): m.in_features * m.out_features for m in model.modules() if isinstance(m, skeleton.Linear4bit)
    }
    return sum(packed.get(id(parameter), parameter.numel()) for parameter in model.parameters())
