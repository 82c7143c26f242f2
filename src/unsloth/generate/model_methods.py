"""The methods of generation that a loaded model has.

``fast_generate``, ``load_lora`` and ``save_lora``; and, while it is prepared for inference, a ``generate`` that goes
through the engine.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from unsloth.core import settings
from unsloth.core.errors import AdapterError, ConfigError
from unsloth.core.log import get_logger
from unsloth.generate import fallback, transformers_call
from unsloth.generate.async_engine import AsyncEngine
from unsloth.generate.engine import Engine
from unsloth.generate.options import EngineOptions
from unsloth.generate.outputs import RequestOutput
from unsloth.generate.protocol import LoRARequest
from unsloth.generate.transformers_call import Call
from unsloth.generate.vllm_engine import VllmEngine
from unsloth.memory import checkpointing
from unsloth.models import families, modes, record

logger = get_logger(__name__)

Model = TypeVar("Model", bound=torch.nn.Module)

_ATTRIBUTE = "unsloth_generation"
_NAMES = ("fast_generate", "load_lora", "save_lora", "make_async_engine")


class ModelMethods:
    """The methods of one model, and its engine once there is one.

    A copy of the model, or one out of a pickle, makes its own engine.

    Args:
        model: With or without PEFT around it.
        tokenizer: Its tokenizer.
        options: Of the engine.
    """

    def __init__(self, model: torch.nn.Module, tokenizer: Any, options: EngineOptions) -> None:
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self._engine: Engine | VllmEngine | None = None
        self._said: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_engine": None}

    def engine(self) -> Engine | VllmEngine:
        """The engine, made on first use.

        Raises:
            ConfigError: It cannot run this model, or is vLLM and not installed.
        """
        if self._engine is None:
            self._engine = self._make()
        return self._engine

    def make_async_engine(self, adapters: Mapping[str, str | Path] | None = None) -> AsyncEngine:
        """An engine of its own for an event loop, on the same weights.

        Args:
            adapters: Folders of saved adapters to load, by the names that requests call them by.

        Raises:
            ConfigError: It cannot run this model.
            AdapterError: An adapter does not fit.
        """
        engine = self._make()
        for name, path in (adapters or {}).items():
            engine.load_adapter(name, path)
        return AsyncEngine(engine)

    def fast_generate(
        self,
        prompts: Any,
        sampling_params: Any = None,
        use_tqdm: bool = False,
        lora_request: Any = None,
        **more: Any,
    ) -> list[RequestOutput]:
        """Answer prompts on the weights as they are now.

        Args:
            prompts: A text, token ids, a chat, embeddings (T, hidden size), or a list of those.
            sampling_params: Of this library or vLLM's, or a list of one for each prompt.
            use_tqdm: Whether a progress bar is shown.
            lora_request: An adapter by name or as ``load_lora`` returned it, or a list; None means the model as it
                stands, its live adapter included; False the base model.
            **more: None is known; given ones are an error.

        Returns:
            One result for each prompt, with the attributes of vLLM's.

        Raises:
            ConfigError: A prompt or a parameter makes no sense.
            AdapterError: There is no such adapter.
            GenerationError: The device failed.
        """
        if more:
            raise ConfigError("fast_generate has no such argument", got=sorted(more), do="Leave it out.")
        if not self._has_engine():
            self._say("this family of models has no description, so transformers generates, more slowly")
            return fallback.generate(self.model, self.tokenizer, prompts, sampling_params, lora_request)
        with _progress(use_tqdm) as advance:
            return self.engine().generate(prompts, sampling_params, lora=lora_request, progress=advance)

    def load_lora(self, path: str | Path, name: str | None = None) -> LoRARequest:
        """Load a saved adapter for generation beside the model's own; the model itself does not change.

        Args:
            path: The folder that ``save_lora`` wrote.
            name: To call it by; None takes the folder's.

        Returns:
            What ``fast_generate`` takes as ``lora_request``.

        Raises:
            AdapterError: It does not fit the model, or has more than LoRA matrices.
        """
        engine, folder = self.engine(), Path(path)
        if name is None:
            name = folder.name or folder.resolve().name
            while name in engine.live_adapters():
                name = _next_name(name)
        return engine.load_adapter(name, folder)

    def save_lora(self, path: str | Path) -> None:
        """Save the model's adapter, as ``save_pretrained`` does.

        Raises:
            AdapterError: The model has none.
        """
        if not hasattr(self.model, "peft_config"):
            raise AdapterError("the model has no adapter to save", do="Call FastLanguageModel.get_peft_model first.")
        self.model.save_pretrained(path)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers' ``generate``, through the engine where it knows all that is asked for."""
        inner = record.transformers_model(self.model)
        reason = self._reason()
        if reason is None:
            call = transformers_call.read(inner, args, kwargs, self.engine().max_model_len)
            if isinstance(call, Call):
                return self._answer(call)
            reason = call
        self._say(f"transformers generates instead of the engine, because of {reason}")
        return type(self.model).generate(self.model, *args, **kwargs)

    def _make(self) -> Engine | VllmEngine:
        kind = VllmEngine if self.options.backend == "vllm" else Engine
        return kind(self.model, self.tokenizer, self.options)

    def _has_engine(self) -> bool:
        return self.options.backend == "vllm" or families.find(record.transformers_model(self.model)) is not None

    def _reason(self) -> str | None:
        """Why no call can go through the engine, or None."""
        if settings.disable_fast_generation():
            return "UNSLOTH_DISABLE_FAST_GENERATION"
        if not self._has_engine():
            return "the model's family, which has no description"
        try:
            self.engine().check()
        except (ConfigError, AdapterError) as error:
            return str(error)
        return None

    def _answer(self, call: Call) -> torch.Tensor:
        engine = self.engine()
        if call.streamer is not None:
            call.streamer.put(call.input_ids.cpu())
            tokens: list[int] = []
            for output in engine.stream(call.prompts[0], call.params):
                new = output.outputs[0].new_token_ids
                tokens += new
                for token in new:
                    call.streamer.put(torch.tensor([token]))
            call.streamer.end()
            rows = [tokens]
        else:
            prompts = [prompt for prompt in call.prompts for _ in range(call.repeats)]
            rows = [output.outputs[0].token_ids for output in engine.generate(prompts, call.params)]
        width = max(map(len, rows))
        padded = torch.tensor([row + [call.pad] * (width - len(row)) for row in rows])
        given = call.input_ids.repeat_interleave(call.repeats, 0)
        return torch.cat([given, padded.to(given.device, given.dtype)], 1)

    def sleep(self) -> None:
        """Let the engine, if there is one, give its memory back."""
        if self._engine is not None:
            self._engine.sleep()

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            logger.info(text)


def attach(model: torch.nn.Module, tokenizer: Any, options: EngineOptions) -> None:
    """Give a loaded model its methods; no class is changed."""
    _put(model, ModelMethods(model, tokenizer, options))


def announce(model: torch.nn.Module) -> None:
    """Say whether ``fast_generate`` goes through the engine."""
    inner = record.transformers_model(model)
    if families.find(inner) is None:
        logger.warning("no engine for the family %s: transformers generates, more slowly", inner.config.model_type)


def attach_adapted(model: torch.nn.Module) -> None:
    """Give a model with an adapter the methods, and the engine, of the model inside."""
    methods = find(model)
    if methods is not None:
        methods.model = model
        _put(model, methods)


def find(model: torch.nn.Module) -> ModelMethods | None:
    """The methods of a model that this library loaded."""
    found = record.transformers_model(model).__dict__.get(_ATTRIBUTE)
    return found if isinstance(found, ModelMethods) else None


def for_inference(model: Model) -> Model:
    """Prepare ``model`` for generation, and let its ``generate`` go through the engine where that knows how.

    The first call that must be left to transformers says why in the log. Returns the model.
    """
    modes.for_inference(model)
    methods = find(model)
    if methods is not None and methods.model is model:
        model.generate = methods.generate  # type: ignore[assignment]
    return model


def for_training(model: Model, use_gradient_checkpointing: checkpointing.Policy | None = None) -> Model:
    """Prepare ``model`` for training; its ``generate`` is transformers' again, and the engine gives its memory back.

    Args:
        model: A model of this library, with or without an adapter.
        use_gradient_checkpointing: Replaces the policy chosen when the model was loaded or adapted.

    Returns:
        The model.
    """
    methods = find(model)
    if methods is not None:
        if getattr(model.__dict__.get("generate"), "__self__", None) is methods:
            del model.generate
        methods.sleep()
    return modes.for_training(model, use_gradient_checkpointing)


def _put(model: torch.nn.Module, methods: ModelMethods) -> None:
    setattr(record.transformers_model(model), _ATTRIBUTE, methods)
    for name in _NAMES:
        setattr(model, name, getattr(methods, name))


def _next_name(name: str) -> str:
    """``name-2`` after ``name``, and so on."""
    found = re.fullmatch(r"(.*)-(\d+)", name)
    return f"{name}-2" if found is None else f"{found[1]}-{int(found[2]) + 1}"


@contextlib.contextmanager
def _progress(shown: bool) -> Iterator[Any]:
    if not shown:
        yield None
        return
    from tqdm.auto import tqdm

    with tqdm(desc="Generated", unit=" prompts") as bar:
        yield bar.update
