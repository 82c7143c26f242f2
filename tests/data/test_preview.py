from unsloth.data.encode import PrepareOptions
from unsloth.data.preview import preview

ROWS = [{"messages": [{"role": "user", "content": "ü?"}, {"role": "assistant", "content": "漢!"}]}] * 3


def test_trained_stretches_are_told_apart(tokenizer):
    found = preview(ROWS, tokenizer, PrepareOptions(max_length=64, train_on="responses", packing=True), count=2)
    assert [row.number for row in found] == [0, 1]
    assert str(found[0]) == "<|im_start|>user\nü?<|im_end|>\n<|im_start|>assistant\n[[漢!<|im_end|>\n]]"
    assert [span.trained for span in found[0].spans] == [False, True]
    assert (found[0].trained_tokens, found[0].tokens) == (6, 6 + 22)
