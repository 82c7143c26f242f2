from datasets import Dataset

from unsloth.data import fingerprint

ROWS = [{"input_ids": list(range(i)), "labels": [i] * i, "name": f"row {i}"} for i in range(1, 9)]


def test_rows_and_their_order_decide():
    found = fingerprint.of(Dataset.from_list(ROWS))
    assert found.rows == 8
    assert fingerprint.of(Dataset.from_list(ROWS)) == found
    assert fingerprint.of(Dataset.from_list([{"input_ids": [0], "labels": [0], "name": ""}, *ROWS]).skip(1)) == found
    assert fingerprint.of(Dataset.from_list(ROWS[::-1]).select(range(7, -1, -1))) == found
    assert fingerprint.of(Dataset.from_list([ROWS[1], ROWS[0], *ROWS[2:]])) != found
    assert fingerprint.of(Dataset.from_list(ROWS[:-1])) != found
    changed = [*ROWS[:-1], {**ROWS[-1], "labels": [8] * 7 + [9]}]
    assert fingerprint.of(Dataset.from_list(changed)) != found


def test_what_cannot_be_read_over_has_no_sum():
    assert fingerprint.of(iter([])) == fingerprint.Fingerprint(None, None)
    assert fingerprint.of([1, 2]) == fingerprint.Fingerprint(2, None)
    assert str(fingerprint.of(iter([]))) == "a stream"
