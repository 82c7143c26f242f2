import pytest

from unsloth.core.errors import ConfigError, TokenizerError
from unsloth.data import masking
from unsloth.data.masking import ResponseMarkers

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] }}<|eot_id|>{% endfor %}"
)
MISTRAL = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, ResponseMarkers("<|im_start|>user\n", "<|im_start|>assistant\n")),
        (
            LLAMA3,
            ResponseMarkers(
                "<|start_header_id|>user<|end_header_id|>\n\n", "<|start_header_id|>assistant<|end_header_id|>\n\n"
            ),
        ),
        (MISTRAL, ResponseMarkers("[INST] ", " [/INST] ")),
    ],
)
def test_markers_are_read_off_the_template(tokenizer, template, expected, monkeypatch):
    if template is not None:
        monkeypatch.setattr(tokenizer, "chat_template", template)
    assert masking.find_markers(tokenizer) == expected


def test_a_template_without_markers_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{% for m in messages %}{{ m['content'] }}{% endfor %}")
    with pytest.raises(TokenizerError, match="instruction_part"):
        masking.find_markers(tokenizer)
    with pytest.raises(ConfigError, match="response_part"):
        ResponseMarkers("x", "")


def test_spans_and_labels():
    text = "U:a|A:bc|U:d|A:ef|"
    spans = masking.response_spans(text, ResponseMarkers("U:", "A:"))
    assert [text[a:b] for a, b in spans] == ["bc|", "ef|"]
    offsets = [(i, i + 1) for i in range(len(text))]
    ids = list(range(100, 100 + len(text)))
    labels = masking.label_spans(ids, offsets, spans)
    assert "".join(text[i] for i, label in enumerate(labels) if label != masking.IGNORED) == "bc|ef|"
    assert masking.label_spans([1], [(0, 0)], [(0, 5)]) == [masking.IGNORED]
    assert masking.count_trained([5, masking.IGNORED, 7]) == 1
