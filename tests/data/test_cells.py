"""Cells as tables have them: gaps, numbers, arrays, images; from files, pandas frames and lists of rows."""

import logging

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset, Image, List

from unsloth import standardize_sharegpt, to_sharegpt
from unsloth.core.errors import DataError
from unsloth.data.encode import PrepareOptions
from unsloth.data.prepare import prepare

OPTIONS = PrepareOptions(max_length=None, train_on="responses")
TALK = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A cat."}]
GAPS = {"instruction": ["a", "b"], "input": [np.nan, "x"], "output": ["y", np.nan]}


def read(kind, tmp_path):
    frame = pd.DataFrame(GAPS)
    if kind == "frame":
        return frame
    if kind == "list":
        return frame.to_dict("records")
    if kind == "dataset":
        return Dataset.from_pandas(frame)
    path = tmp_path / f"rows.{kind}"
    {
        "csv": lambda: frame.to_csv(path, index=False, na_rep="NaN"),
        "parquet": lambda: frame.to_parquet(path),
        "jsonl": lambda: path.write_text(
            "\n".join(map(str, frame.to_dict("records"))).replace("'", '"').replace("nan", "NaN")
        ),
    }[kind]()
    return path


@pytest.mark.parametrize("kind", ["frame", "list", "dataset", "csv", "parquet", "jsonl"])
def test_a_gap_is_no_text_wherever_it_comes_from(kind, tmp_path, tokenizer):
    """In an optional column it is nothing, in the answer's it names the row, and never the word nan."""
    with pytest.raises(DataError, match="row 1: column 'output' must hold non-empty text: got (None|nan).*filter"):
        prepare(read(kind, tmp_path), tokenizer, OPTIONS)
    GAPS["output"][1] = "z"
    try:
        dataset, report = prepare(read(kind, tmp_path), tokenizer, OPTIONS)
    finally:
        GAPS["output"][1] = np.nan
    assert report.rows == 2
    assert "nan" not in tokenizer.decode(dataset[0]["input_ids"]).lower()


def test_numbers_are_the_text_they_are(tmp_path, tokenizer):
    (tmp_path / "a.csv").write_text("instruction;output\n2+2;4\n1/2;0.5\n")
    expected = [{"instruction": "2+2", "output": "4.0"}, {"instruction": "1/2", "output": "0.5"}]
    assert prepare(tmp_path / "a.csv", tokenizer, OPTIONS)[0][:] == prepare(expected, tokenizer, OPTIONS)[0][:]
    assert prepare([{"prompt": 2, "completion": 4}], tokenizer, OPTIONS)[1].trained_tokens > 0
    with pytest.raises(DataError, match="row 0"):
        prepare([{"instruction": "a", "output": True}], tokenizer, OPTIONS)


def test_frames_and_rows_of_different_columns_become_conversations(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("unsloth"), "propagate", True)
    frame = pd.DataFrame({"q": ["a", None], "age": [1, np.nan], "answer": [1, 0]})
    made = to_sharegpt(frame, merged_prompt="{q}[[ at {age}]]", output_column_name="answer")["conversations"]
    assert [talk[0]["value"] for talk in made] == ["a at 1", ""]
    assert "1 rows have an empty prompt, such as row 1" in caplog.text
    rows = [{"messages": TALK}, {"messages": TALK, "tools": "[]"}]
    assert standardize_sharegpt(rows)["tools"][:] == [None, "[]"]
    with pytest.raises(DataError, match="column 'x' holds values of different kinds"):
        standardize_sharegpt([{"messages": TALK, "x": 1}, {"messages": TALK, "x": "one"}])


def test_lists_that_are_arrays_are_lists(tokenizer):
    rows = [{"messages": np.array(TALK, dtype=object)}]
    assert prepare(rows, tokenizer, OPTIONS)[0][:] == prepare([{"messages": TALK}], tokenizer, OPTIONS)[0][:]


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("many", [False, True])
def test_images_for_a_text_model_name_the_row_also_if_they_do_not_load(broken, many, tokenizer):
    image = {"bytes": b"no image" if broken else None, "path": None if broken else "cat.png"}
    column, value, feature = ("images", [image], List(Image())) if many else ("image", image, Image())
    dataset = Dataset.from_dict({"messages": [TALK, TALK], column: [None, value]}).cast_column(column, feature)
    with pytest.raises(DataError, match=f"row 1: column '{column}' holds images.*FastVisionModel.*remove_columns"):
        prepare(dataset, tokenizer, OPTIONS)
    assert prepare(dataset.remove_columns(column), tokenizer, OPTIONS)[1].rows == 2
