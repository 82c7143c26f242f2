"""D06: a streamed data set that ends early or fails while it is read."""

import pytest
from datasets import IterableDataset

from unsloth import FastLanguageModel, SFTConfig, SFTTrainer
from unsloth.core.errors import DataError
from unsloth.data.encode import PrepareOptions
from unsloth.data.prepare import prepare


def stream(rows, error=None):
    def generate():
        yield from rows
        if error is not None:
            raise error

    return IterableDataset.from_generator(generate)


def test_an_error_names_the_row_it_came_at(tokenizer):
    rows = [{"text": f"row {i}"} for i in range(300)]
    dataset, _ = prepare(stream(rows, OSError("disk gone")), tokenizer, PrepareOptions(max_length=32))
    seen = []
    with pytest.raises(DataError, match="row 300: OSError: disk gone.*resume_from_checkpoint"):
        seen += [row["input_ids"] for row in dataset]
    with pytest.raises(DataError, match="row 0: ValueError: broken"):
        prepare(stream([], ValueError("broken")), tokenizer, PrepareOptions(max_length=32))


def test_a_stream_without_rows_or_without_anything_to_train(tokenizer):
    with pytest.raises(DataError, match="no rows"):
        prepare(stream([]), tokenizer, PrepareOptions(max_length=32))
    asked = [{"messages": [{"role": "user", "content": "q"}]}] * 3
    with pytest.raises(DataError, match="no row has a token to train"):
        prepare(stream(asked), tokenizer, PrepareOptions(max_length=32, train_on="responses"))


def trainer(folder, output, rows, steps, **changes):
    model, tokenizer = FastLanguageModel.from_pretrained(str(folder), max_seq_length=64, load_in_16bit=True)
    model = FastLanguageModel.get_peft_model(model, r=2, use_gradient_checkpointing=False)
    args = SFTConfig(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=1,
        logging_steps=1,
        disable_tqdm=True,
        save_strategy="steps",
        save_steps=8,
        lr_scheduler_type="constant",
        **changes,
    )
    return SFTTrainer(model=model, tokenizer=tokenizer, train_dataset=rows, args=args)


def test_a_stream_that_ends_early_begins_anew(tiny, tmp_path):
    run = trainer(tiny(), tmp_path, stream([{"text": "one"}, {"text": "two"}]), 5)
    assert run.train().global_step == 5


def test_a_run_that_failed_in_the_stream_resumes(tiny, tmp_path):
    rows = [{"text": f"row number {i:02}"} for i in range(24)]
    whole = trainer(tiny(), tmp_path / "whole", stream(rows), 20)
    whole.train()
    broken = trainer(tiny(), tmp_path / "parts", stream(rows[:20], OSError("cut")), 20)
    with pytest.raises(DataError, match="row 20: OSError: cut"):
        broken.train()
    resumed = trainer(tiny(), tmp_path / "parts", stream(rows), 20)
    resumed.train(resume_from_checkpoint=True)
    losses = [[entry["loss"] for entry in run.state.log_history if "loss" in entry][16:] for run in (whole, resumed)]
    assert len(losses[1]) == 4 and losses[0] == pytest.approx(losses[1], rel=1e-5)
