"""Many tasks on one engine: every request is answered, whatever some of them do."""

import asyncio

import pytest

from unsloth.core.errors import AdapterError, ConfigError, GenerationError
from unsloth.generate.async_engine import AsyncEngine
from unsloth.generate.sampling import SamplingParams


def drawn(seed, tokens=12):
    return SamplingParams(seed=seed, max_tokens=tokens, ignore_eos=True)


def test_streams_answers_and_cancellations(make_engine):
    prompts = [[5 + i] * (1 + i % 7) for i in range(24)]
    expected = [
        output.outputs[0].token_ids
        for output in make_engine().generate(prompts, [drawn(i) for i in range(len(prompts))])
    ]

    async def read(engine, i):
        tokens, text = [], ""
        async for output in engine.generate(prompts[i], drawn(i)):
            tokens += output.outputs[0].new_token_ids
            text += output.outputs[0].new_text
            if i % 5 == 0:
                await asyncio.sleep(0.01)  # a slow reader
            if i % 6 == 1 and len(tokens) > 3:
                return None  # leaves early
        assert text == output.outputs[0].text
        return tokens

    async def main():
        engine = AsyncEngine(make_engine())
        tasks = [asyncio.create_task(read(engine, i)) for i in range(len(prompts))]
        await asyncio.sleep(0)
        tasks[9].cancel()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        answer = await engine.answer(prompts[2], drawn(2))
        assert answer.finished and answer.outputs[0].token_ids == expected[2]
        for i, tokens in enumerate(found):
            if i == 9:
                assert isinstance(tokens, asyncio.CancelledError)
            else:
                assert tokens == (None if i % 6 == 1 else expected[i])
        while engine.stats().running or engine.stats().waiting:
            await asyncio.sleep(0.01)
        assert engine.stats().free_pages == engine.stats().pages
        await engine.shutdown()

    asyncio.run(asyncio.wait_for(main(), 60))


def test_errors_reach_their_task_and_no_other(make_engine):
    async def main():
        engine = AsyncEngine(make_engine())
        good = asyncio.create_task(engine.answer([5, 6], drawn(1)))
        with pytest.raises(ConfigError, match="prompt is empty"):
            await engine.answer([], drawn(1))
        with pytest.raises(AdapterError, match="no adapter of that name"):
            await engine.answer([5], drawn(1), lora="nobody")
        with pytest.raises(AdapterError, match="no such adapter folder"):
            await engine.load_adapter("a", "/nowhere")
        assert len((await good).outputs[0].token_ids) == 12
        assert not await engine.abort("nothing") and engine.adapters() == []
        await engine.shutdown()

    asyncio.run(asyncio.wait_for(main(), 60))


def test_shutting_down_finishes_or_rejects_what_is_in_flight(make_engine):
    async def main(drain):
        engine = AsyncEngine(make_engine(max_num_seqs=1))
        short = asyncio.create_task(engine.answer([5, 6], drawn(1, 4)))
        long = asyncio.create_task(engine.answer([7], drawn(1, 60)))
        await asyncio.sleep(0.02)
        await engine.shutdown(drain=drain)
        with pytest.raises(GenerationError, match="shut down"):
            await engine.answer([5], drawn(1))
        return [output.outputs[0].finish_reason for output in await asyncio.gather(short, long)]

    assert asyncio.run(asyncio.wait_for(main(30), 60)) == ["length", "length"]
    assert "abort" in asyncio.run(asyncio.wait_for(main(0), 60))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_dies_leaves_nobody_waiting(make_engine, monkeypatch):
    async def main():
        inner = make_engine()
        engine = AsyncEngine(inner)
        monkeypatch.setattr(inner, "step", lambda: 1 / 0)
        with pytest.raises(GenerationError, match="has stopped"):
            await engine.answer([5, 6], drawn(1))
        await asyncio.to_thread(engine._thread.join)  # so that its warning comes within this test

    asyncio.run(asyncio.wait_for(main(), 60))
