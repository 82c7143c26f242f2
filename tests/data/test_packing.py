import random

import pytest

from unsloth.data.packing import pack


@pytest.mark.parametrize("seed", range(5))
def test_every_document_is_in_one_row_and_no_row_overflows(seed):
    lengths = [random.Random(seed + i).randint(1, 100) for i in range(300)]
    rows = pack(lengths, 100)
    assert sorted(i for row in rows for i in row) == list(range(300))
    assert all(sum(lengths[i] for i in row) <= 100 for row in rows)
    assert len(rows) <= 1.1 * -(-sum(lengths) // 100)
    assert rows == pack(lengths, 100)


def test_edges():
    assert pack([], 10) == []
    assert pack([10, 10], 10) == [[0], [1]]
    with pytest.raises(ValueError, match="11 tokens"):
        pack([3, 11], 10)
