"""The public classes: thin calls downward."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unsloth.core import settings
from unsloth.core.errors import ConfigError
from unsloth.core.log import get_logger
from unsloth.export.save import attach_methods
from unsloth.generate import model_methods
from unsloth.generate.options import EngineOptions
from unsloth.layers import fused_head as head_layer
from unsloth.memory.checkpointing import Policy
from unsloth.models import adapters, load, placement, plan, record
from unsloth.models.options import DEFAULT_LENGTH

logger = get_logger(__name__)

# Documented arguments that only matter once something else is switched on; that something is refused below.
_WITHOUT_EFFECT = {
    "max_lora_rank",
    "disable_log_stats",
    "unsloth_force_compile",
}
# Documented arguments that this version cannot honour: the neutral value, any other being an error, and a remedy.
_UNAVAILABLE: dict[str, tuple[Any, str]] = {
    "qat_scheme": (None, "Leave it out; load_in_4bit=True trains on quantized weights."),
}


class FastLanguageModel:
    """Load a language model, add an adapter to it, and switch it between training and inference."""

    @staticmethod
    def from_pretrained(
        model_name: str,
        max_seq_length: int = DEFAULT_LENGTH,
        dtype: torch.dtype | str | None = None,
        load_in_4bit: bool | None = None,
        load_in_8bit: bool | None = None,
        load_in_16bit: bool | None = None,
        full_finetuning: bool | None = None,
        token: str | bool | None = None,
        device_map: placement.DeviceMap = "sequential",
        rope_scaling: Mapping[str, Any] | None = None,
        fix_tokenizer: bool = True,
        trust_remote_code: bool = False,
        use_gradient_checkpointing: Policy = "unsloth",
        resize_model_vocab: int | None = None,
        revision: str | None = None,
        use_exact_model_name: bool = False,
        offload_embedding: bool = False,
        offload_embeddings: bool = False,
        float32_mixed_precision: bool | None = None,
        random_state: int = 3407,
        auto_model: type | None = None,
        gguf_file: str | None = None,
        attn_implementation: str | None = None,
        fast_layers: bool = True,
        fused_head: bool = True,
        fast_inference: bool | Literal["vllm"] = False,
        gpu_memory_utilization: float | None = None,
        float8_kv_cache: bool = False,
        **kwargs: Any,
    ) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
        """Load a model and its tokenizer.

        Args:
            model_name: A local folder, a hub id, a saved adapter (folder or hub id), or
                ``"embedded:SmolLM2-135M-Instruct"``.
            max_seq_length: Longest training sequence, in tokens (2048 if left out, or the model's own if that is less).
                Beyond the model's own length, its rotary position embedding is scaled (``models/rope.py``).
            dtype: Of computation; None chooses bfloat16 where supported.
            load_in_4bit: NF4 weights with double quantization. The default if no other is named.
            load_in_8bit: LLM.int8() weights.
            load_in_16bit: Weights in ``dtype``, for 16-bit LoRA.
            full_finetuning: Weights to be trained themselves, in float32 with computation in ``dtype``.
            token: Hub token.
            device_map: As in transformers; ``"sequential"`` means the current GPU, or the CPU without one.
            rope_scaling: Scaling of the positions to use instead of the one that would be chosen, such as
                ``{"rope_type": "yarn", "factor": 4.0}``.
            fix_tokenizer: Give the tokenizer a padding token of its own.
            trust_remote_code: Whether code in the repository may run.
            use_gradient_checkpointing: ``"unsloth"`` or True recompute activations, False keeps them.
            resize_model_vocab: Rows that the embedding and the head are to have at least.
            revision: Hub revision.
            use_exact_model_name: Accepted; a name is never exchanged for another one here.
            offload_embedding: Hold the input embedding in host memory, where it is frozen and not the head as well.
            offload_embeddings: The same.
            float32_mixed_precision: For full fine-tuning; False holds the weights in ``dtype`` too.
            random_state: Seed of the adapters' initial values.
            auto_model: Class of transformers to load with; None means ``AutoModelForCausalLM``.
            gguf_file: A GGUF file in the folder or repository, used instead of safetensors weights.
            attn_implementation: As in transformers.
            fast_layers: Swap layers for faster ones of the same mathematics, see ``print(model.unsloth_plan)``.
            fused_head: Whether a forward with labels computes output head and loss together, without whole logits
                (see :mod:`unsloth.layers.fused_head`). ``return_logits=True`` in that forward computes them too.
            fast_inference: Say at once if ``model.fast_generate`` cannot go through the engine. (The method is there
                anyway; the engine is made when it is first used.) ``"vllm"``: generate with vLLM, on weights that it
                loads itself, instead of the engine on the model's own.
            gpu_memory_utilization: Share of the GPU's memory for weights, cache of keys and values, and all else,
                while generating; None gives the cache half of what is free.
            float8_kv_cache: Keep keys and values in eight bits.
            **kwargs: Passed on to transformers' ``from_pretrained``.

        Returns:
            The model (wrapped by PEFT if ``model_name`` is an adapter) and the tokenizer.

        Raises:
            UnslothError: In one of its kinds, before anything is half done: ConfigError, ModelNotFoundError,
                NetworkError, CheckpointError, AdapterError, TokenizerError.
        """
        engine_options = EngineOptions(
            gpu_memory_utilization=gpu_memory_utilization,
            float8_kv_cache=float8_kv_cache,
            standby=settings.standby(),
            backend="vllm" if fast_inference == "vllm" else "own",
        )
        options = load.LoadOptions(
            model_name=model_name,
            max_seq_length=max_seq_length,
            dtype=load.parse_dtype(dtype),
            precision=load.choose_precision(load_in_4bit, load_in_8bit, load_in_16bit, full_finetuning),
            float32_mixed_precision=float32_mixed_precision is not False,
            token=token,
            device_map=device_map,
            fix_tokenizer=fix_tokenizer,
            trust_remote_code=trust_remote_code,
            use_gradient_checkpointing=use_gradient_checkpointing,
            revision=revision,
            random_state=random_state,
            attn_implementation=attn_implementation,
            rope_scaling=rope_scaling,
            resize_model_vocab=resize_model_vocab,
            auto_model=auto_model,
            gguf_file=gguf_file,
            offload_embedding=offload_embedding or offload_embeddings,
            more=_supported(kwargs),
        )
        model, tokenizer = load.load(options)
        attach_methods(model)
        if fast_layers:
            plan.install(model)
        if fused_head:
            _fuse_head(record.transformers_model(model))
        model_methods.attach(model, tokenizer, engine_options)
        if fast_inference and engine_options.backend == "own":
            model_methods.announce(model)
        return model, tokenizer

    @staticmethod
    def get_peft_model(
        model: PreTrainedModel,
        r: int = 16,
        target_modules: Iterable[str] | str = adapters.ALL_LINEAR,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        bias: str = "none",
        layers_to_transform: int | list[int] | None = None,
        layers_pattern: str | None = None,
        use_gradient_checkpointing: Policy = "unsloth",
        random_state: int = 3407,
        max_seq_length: int | None = None,
        use_rslora: bool = False,
        use_dora: bool = False,
        modules_to_save: list[str] | None = None,
        init_lora_weights: bool | str = True,
        loftq_config: dict[str, Any] | None = None,
        task_type: str = "CAUSAL_LM",
        qat_scheme: str | None = None,
        fast_layers: bool | None = None,
    ) -> PeftModel | PreTrainedModel:
        """Add a trainable LoRA adapter; a model loaded for full fine-tuning is returned as it is.

        ``max_seq_length`` is accepted for compatibility; the value given to ``from_pretrained`` holds. ``fast_layers``
        is as in ``from_pretrained``; None leaves it as it was there. All other arguments are described at
        :class:`unsloth.models.adapters.AdapterOptions`.

        Raises:
            ConfigError: A hyperparameter out of range.
            AdapterError: The model has an adapter already, or a target names none of its modules.
        """
        _supported({"qat_scheme": qat_scheme})
        options = adapters.AdapterOptions(
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            target_modules=target_modules,
            bias=bias,
            layers_to_transform=layers_to_transform,
            layers_pattern=layers_pattern,
            use_rslora=use_rslora,
            use_dora=use_dora,
            modules_to_save=modules_to_save,
            init_lora_weights=init_lora_weights,
            loftq_config=loftq_config,
            task_type=task_type,
            use_gradient_checkpointing=use_gradient_checkpointing,
            random_state=random_state,
        )
        if fast_layers is None:
            fast_layers = plan.installed(model) is not None
        inner = record.transformers_model(model)
        fused = head_layer.find(inner) is not None
        head_layer.remove(inner)  # PEFT copies a head that is to be trained
        try:
            adapted = adapters.add(model, options)
        finally:
            if fused:
                _fuse_head(inner)
        attach_methods(adapted)
        model_methods.attach_adapted(adapted)
        plan.remove(adapted)
        if fast_layers:
            plan.install(adapted)
        return adapted

    for_inference = staticmethod(model_methods.for_inference)
    for_training = staticmethod(model_methods.for_training)


class FastModel(FastLanguageModel):
    """As :class:`FastLanguageModel`, with the parts to be trained chosen by what they do."""

    @staticmethod
    def get_peft_model(  # type: ignore[override]
        model: PreTrainedModel,
        r: int = 16,
        target_modules: Iterable[str] | str | None = None,
        finetune_vision_layers: bool = True,
        finetune_language_layers: bool = True,
        finetune_attention_modules: bool = True,
        finetune_mlp_modules: bool = True,
        **kwargs: Any,
    ) -> PeftModel | PreTrainedModel:
        """Add a trainable LoRA adapter to the chosen parts of the model.

        Args:
            model: A loaded model.
            r: Rank of the update.
            target_modules: Names of the layers to adapt, of which those of the chosen parts are; None means all
                linear layers of the chosen parts.
            finetune_vision_layers: Accepted; a model without a vision part has none to train.
            finetune_language_layers: Train the language model.
            finetune_attention_modules: Of it, the attention layers.
            finetune_mlp_modules: Of it, the feed-forward layers.
            **kwargs: As for :meth:`FastLanguageModel.get_peft_model`.

        Raises:
            ConfigError: Nothing is left to train, or a hyperparameter is out of range.
            AdapterError: The model has an adapter already, or a target names none of its modules.
        """
        parts = adapters.Parts(
            vision=finetune_vision_layers,
            language=finetune_language_layers,
            attention=finetune_attention_modules,
            mlp=finetune_mlp_modules,
        )
        targets = adapters.targets_in(model, parts, target_modules)
        return FastLanguageModel.get_peft_model(model, r=r, target_modules=targets, **kwargs)


def _fuse_head(model: PreTrainedModel) -> None:
    found = head_layer.install(model)
    if not found.applies:
        logger.info("output head and loss of %s stay as they are: %s", type(model).__name__, found.text)


def _supported(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments to pass on; refuses those that this version would have to ignore."""
    passed_on = {}
    for name, value in arguments.items():
        if name in _UNAVAILABLE:
            neutral, remedy = _UNAVAILABLE[name]
            if value != neutral:
                raise ConfigError(f"{name} is not available in this version", got=value, do=remedy)
        elif name not in _WITHOUT_EFFECT:
            passed_on[name] = value
    return passed_on
