"""The exceptions this library raises on purpose.

Every message answers three questions in one or two sentences: what failed, what was received, what to do.
Catch :class:`UnslothError` to catch all of them.
"""

from __future__ import annotations

_ABSENT = object()


class UnslothError(Exception):
    """Base of every error raised by this library.

    Args:
        what: What failed, as a clause without a full stop ("no such model folder").
        got: The value received. Left out of the message when not given.
        do: The remedy, as one or two full sentences.
    """

    def __init__(self, what: str, *, got: object = _ABSENT, do: str = "") -> None:
        message = what if got is _ABSENT else f"{what}: got {_shorten(got)}"
        if do:
            message = f"{message.rstrip('.')}. {do}"
        super().__init__(message)


class ConfigError(UnslothError, ValueError):
    """An argument, or a combination of arguments, makes no sense."""


class ModelError(UnslothError):
    """A model could not be found or loaded."""


class ModelNotFoundError(ModelError):
    """Neither a local folder nor a reachable hub repository has this name."""


class NetworkError(ModelError):
    """The hub could not be reached, and no complete local copy exists."""


class CheckpointError(ModelError):
    """Files of a model are missing, truncated, or do not fit its configuration."""


class AdapterError(UnslothError):
    """An adapter does not fit the model, or cannot be built as asked."""


class PlanError(UnslothError):
    """A model does not have the structure that its family promises, or its layers cannot be swapped as asked."""


class TokenizerError(UnslothError):
    """A tokenizer lacks something that the task needs, such as a chat template."""


class DataError(UnslothError, ValueError):
    """Rows that cannot be trained on."""


class TrainingError(UnslothError):
    """A run that cannot go on."""


class GenerationError(UnslothError):
    """Text could not be generated."""


class ExportError(UnslothError):
    """A result could not be written, or did not equal the model it was made from."""


class UploadError(ExportError):
    """The hub refused an upload or could not be reached; the local copy is whole."""


class StorageError(UnslothError):
    """The disk is full, read-only, or holds something that must not be overwritten."""


class RewardError(UnslothError, ValueError):
    """A reward function failed, or returned something other than one finite number a completion."""


class SandboxError(UnslothError):
    """Generated code could not be run, or not to its end. Base of the errors below."""


class SandboxUnavailableError(SandboxError):
    """The sandbox itself failed or cannot be had here: says nothing about the generated code."""


class SandboxTimeoutError(SandboxError, TimeoutError):
    """Generated code, or a loop around it, took longer than its limit."""


class SandboxKilledError(SandboxError, RuntimeError):
    """Generated code ended its process: it crashed the interpreter or left through a back door."""


class GeneratedCodeError(SandboxError, ValueError):
    """Generated code is not allowed, or gave something that cannot be taken as a result."""


class RefusedImportError(GeneratedCodeError, ImportError):
    """Generated code imports a module that it may not have."""


class RefusedNameError(GeneratedCodeError, NameError):
    """Generated code uses or makes a global name."""


def _shorten(value: object, limit: int = 200) -> str:
    """The value's ``repr`` (a path's text), cut to ``limit`` characters."""
    text = f"'{value}'" if hasattr(value, "__fspath__") else repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
