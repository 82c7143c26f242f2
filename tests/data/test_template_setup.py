import copy

import pytest
from transformers import AutoTokenizer

from unsloth.chat_templates import CHAT_TEMPLATES, get_chat_template
from unsloth.core.errors import ConfigError, TokenizerError

SHAREGPT = {"role": "from", "content": "value", "user": "human", "assistant": "gpt"}
OPENAI_ROWS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SHAREGPT_ROWS = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
# The document's own example of a custom template, with its tags restored.
CUSTOM = (
    "{{ bos_token }}{{ 'You are a helpful assistant to the user\n' }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '>>> User: ' + message['content'] + '\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ '>>> Assistant: ' + message['content'] + eos_token + '\n' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '>>> Assistant: ' }}{% endif %}"
)


@pytest.fixture
def fresh(tokenizer):
    return copy.deepcopy(tokenizer)


@pytest.mark.parametrize("name", list(CHAT_TEMPLATES))
def test_a_mapping_lets_a_template_read_both_spellings(name, fresh):
    plain = get_chat_template(copy.deepcopy(fresh), name).apply_chat_template(OPENAI_ROWS, tokenize=False)
    mapped = get_chat_template(fresh, name, mapping=SHAREGPT)
    assert mapped.apply_chat_template(SHAREGPT_ROWS, tokenize=False) == plain
    assert mapped.apply_chat_template(OPENAI_ROWS, tokenize=False) == plain


def test_a_stop_word_the_vocabulary_lacks_takes_the_id_of_the_end_of_text(fresh, tmp_path):
    eos_id, size = fresh.eos_token_id, len(fresh)
    tokenizer = get_chat_template(fresh, "llama-3")
    assert tokenizer is fresh
    assert (tokenizer.eos_token, tokenizer.eos_token_id, len(tokenizer)) == ("<|eot_id|>", eos_id, size)
    assert tokenizer("x<|eot_id|>")["input_ids"][-1] == eos_id
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert (again.eos_token, again.eos_token_id, again.chat_template) == ("<|eot_id|>", eos_id, tokenizer.chat_template)
    ids = [t.apply_chat_template(OPENAI_ROWS, return_dict=False) for t in (again, tokenizer)]
    assert ids[0] == ids[1] and ids[0].count(eos_id) == 2


def test_a_stop_word_of_the_vocabulary_becomes_the_end_of_text(fresh):
    fresh.eos_token, fresh.pad_token = "<|endoftext|>", "<|im_end|>"
    tokenizer = get_chat_template(fresh, "chatml")
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"


def test_without_mapping_the_end_of_text_stays(fresh):
    assert get_chat_template(fresh, "llama-3", map_eos_token=False).eos_token == "<|im_end|>"
    assert "<|eot_id|>" not in fresh.get_vocab()


def test_tokens_of_gemma_are_renamed_for_chatml(fresh):
    get_chat_template(fresh, "gemma")  # makes <|im_end|> the <end_of_turn>
    start = fresh.convert_tokens_to_ids("<|im_start|>")
    tokenizer = get_chat_template(fresh, "gemma_chatml")
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.convert_tokens_to_ids("<|im_start|>") == start


def test_a_custom_template_of_the_document(fresh):
    tokenizer = get_chat_template(fresh, chat_template=(CUSTOM, "eos_token"), mapping=SHAREGPT, map_eos_token=True)
    text = tokenizer.apply_chat_template(SHAREGPT_ROWS, tokenize=False)
    assert text == "You are a helpful assistant to the user\n>>> User: Hi\n>>> Assistant: Hello<|im_end|>\n"


@pytest.mark.parametrize("name", ["chatml", "qwen-2.5", "gpt-oss", "gemma-3", "alpaca"])
def test_a_system_message_for_conversations_that_bring_none(name, fresh):
    message = 'It\'s "so" \\ here\n{{ x }} 漢'
    text = get_chat_template(fresh, name, system_message=message).apply_chat_template(OPENAI_ROWS, tokenize=False)
    assert text.count(message) == 1
    own = [{"role": "system", "content": "Mine."}, *OPENAI_ROWS]
    assert message not in fresh.apply_chat_template(own, tokenize=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"chat_template": "lama-3"}, "Did you mean 'llama-3'"),
        ({"chat_template": ("{{ messages }}", "</s>")}, "never writes its eos_token"),
        ({"chat_template": ("no template", "eos_token")}, "template in Jinja"),
        ({"chat_template": (CUSTOM, "eos_token"), "system_message": "S"}, "no place for system_message"),
        ({"mapping": {"rolle": "from"}}, "rolle"),
    ],
)
def test_refusals_name_the_remedy(arguments, message, fresh):
    with pytest.raises(ConfigError, match=message):
        get_chat_template(fresh, **arguments)


def test_a_tokenizer_without_an_end_is_refused(fresh):
    fresh.eos_token = None
    with pytest.raises(TokenizerError, match="eos_token"):
        get_chat_template(fresh, "zephyr")
