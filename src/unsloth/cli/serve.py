"""`unsloth serve`: the OpenAI interface on a model."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unsloth.api import FastLanguageModel
from unsloth.cli import screen
from unsloth.cli.options import precision_switch
from unsloth.core import settings
from unsloth.core.errors import ConfigError
from unsloth.serve.options import ServeOptions

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class ServeCommand:
    """What to serve and how.

    Attributes:
        model: Folder, adapter folder or hub id.
        name: What the model is called in requests; None takes the last part of ``model``.
        adapters: Each NAME=FOLDER.
        host: Address to listen on.
        port: Port to listen on.
        key_file: File with the API key; None: the environment's, or a new one.
        no_key: Ask for no key.
        allowed_hosts: Further host names of this server.
        adapter_folder: Where requests may load adapters from.
        max_seq_length: Longest sequence in tokens, prompt and answer together.
        max_requests: Completions in flight.
        drain_seconds: How long requests in flight may go on at the end.
        memory: Share of the GPU's memory to use.
        precision: ``"4bit"``, ``"8bit"`` or ``"16bit"``; None means the library's default, 4 bits.
        trust_remote_code: Whether the model's repository may run code.
    """

    model: str
    name: str | None = None
    adapters: Sequence[str] = ()
    host: str = "127.0.0.1"
    port: int = 8000
    key_file: str | None = None
    no_key: bool = False
    allowed_hosts: Sequence[str] = ()
    adapter_folder: str | None = None
    max_seq_length: int = 4096
    max_requests: int = 1024
    drain_seconds: float = 30.0
    memory: float = 0.85
    precision: str | None = None
    trust_remote_code: bool = False


def serve(command: ServeCommand) -> None:
    """Load the model and answer requests until the process is told to end.

    Raises:
        UnslothError: The options make no sense, the port is taken, or the model or an adapter cannot be loaded.
    """
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError(
            "serving needs packages that are not installed", got=error.name, do="pip install 'unsloth[serve]'"
        ) from error
    from unsloth.serve import app, server

    named = [_named(text) for text in command.adapters]
    folder = _adapter_folder(command.adapter_folder)
    key, where = _key(command)
    options = ServeOptions(
        model_name=command.name or Path(command.model).name,
        api_key=key,
        host=command.host,
        port=command.port,
        allowed_hosts=tuple(command.allowed_hosts),
        adapter_folder=folder,
        max_requests=command.max_requests,
        drain_seconds=command.drain_seconds,
    )
    listener = server.listen(options)  # before the model is loaded: a taken port is said at once
    with listener:
        engine, defaults = _load(command, named)
        address = listener.getsockname()
        built = app.build(engine, options, defaults)
        server.run(built, engine, options, listener, lambda: _say(options, address[1], where))


def _load(command: ServeCommand, named: Sequence[tuple[str, str]]) -> tuple[Any, dict[str, Any]]:
    model, _ = FastLanguageModel.from_pretrained(
        command.model,
        max_seq_length=command.max_seq_length,
        fast_inference=True,
        gpu_memory_utilization=command.memory,
        trust_remote_code=command.trust_remote_code,
        **precision_switch(command.precision),
    )
    FastLanguageModel.for_inference(model)
    config = model.generation_config
    found = {name: getattr(config, name, None) for name in _SAMPLING} if config.do_sample else {}
    return model.make_async_engine(dict(named)), {name: value for name, value in found.items() if value is not None}


def _named(text: str) -> tuple[str, str]:
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise ConfigError("an adapter is given as NAME=FOLDER", got=text, do="For example --adapter support=runs/a.")
    return name, folder


def _adapter_folder(given: str | None) -> Path | None:
    if given is None:
        return None
    folder = Path(given).expanduser().resolve()
    if not folder.is_dir():
        raise ConfigError("no such folder for adapters", got=given, do="Make it, or name another.")
    return folder


def _key(command: ServeCommand) -> tuple[str | None, str]:
    """The API key, and words that say where it is."""
    from unsloth.serve import server

    if command.no_key:
        if command.key_file is not None:
            raise ConfigError("a key file and --no-api-key exclude each other", got=command.key_file)
        return None, "none is asked for"
    if command.key_file is not None:
        path = Path(command.key_file).expanduser()
        return server.read_key(path), f"the first line of {path}"
    given = settings.api_key()
    if given is not None:
        return given, "the environment variable UNSLOTH_API_KEY"
    path = settings.cache_folder() / f"serve-{command.port}.key"
    return server.make_key(path), f"new, in {path}: export OPENAI_API_KEY=$(cat {shlex.quote(os.fspath(path))})"


def _say(options: ServeOptions, port: int, where: str) -> None:
    host = f"[{options.host}]" if ":" in options.host else options.host
    rows = {"Address": f"http://{host}:{port}/v1", "Model": options.model_name, "API key": where}
    if options.adapter_folder is not None:
        rows["Adapters from"] = str(options.adapter_folder)
    screen.console().print(screen.facts("Serving. Ctrl-C ends.", rows), soft_wrap=True)
