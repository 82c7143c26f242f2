"""A real server on a tiny model, in a thread: the clients of these tests talk to it through a socket."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from unsloth.generate.async_engine import AsyncEngine
from unsloth.generate.engine import Engine
from unsloth.generate.options import EngineOptions
from unsloth.serve import app, server
from unsloth.serve.options import ServeOptions

KEY = "the-key"


@dataclass
class Running:
    """A server that runs."""

    port: int
    engine: AsyncEngine
    model: torch.nn.Module
    tokenizer: object
    options: ServeOptions
    stop: Callable[[], None]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, key: str = KEY) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)


def start(folder: Path, **options: object) -> Running:
    """Start a server on the model in ``folder``."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    engine = AsyncEngine(Engine(model, tokenizer, EngineOptions(page_size=4, max_num_seqs=8)))
    settings = ServeOptions(**{"model_name": "tiny", "api_key": KEY, "port": 0, "drain_seconds": 2.0, **options})
    listener = server.listen(settings)
    ready = threading.Event()
    made = server.make(app.build(engine, settings), engine, settings, ready.set)
    thread = threading.Thread(target=made.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    assert ready.wait(60)

    def stop() -> None:
        made.should_exit = True
        thread.join(60)
        assert not thread.is_alive()

    return Running(listener.getsockname()[1], engine, model, tokenizer, settings, stop)


@pytest.fixture(scope="module")
def adapters(tiny, tmp_path_factory) -> Path:
    """A folder with two adapters of the tiny model, ``first`` and ``second``, and one of another width, ``wrong``."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(tiny())
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
        get_peft_model(model, config).save_pretrained(folder / name)
    torch.manual_seed(0)
    smaller = AutoModelForCausalLM.from_pretrained(tiny())
    smaller.config.hidden_size = 32
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(type(smaller)(smaller.config), config).save_pretrained(folder / "wrong")
    return folder


@pytest.fixture(scope="module")
def running(tiny, adapters) -> Iterator[Running]:
    """A server that takes adapters from :func:`adapters`."""
    made = start(tiny(), adapter_folder=adapters)
    yield made
    made.stop()


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Wait for something that other threads bring about."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
