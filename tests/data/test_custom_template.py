import copy
import re

import pytest
from tokenizers.processors import TemplateProcessing

from unsloth.chat_templates import CHAT_TEMPLATES, apply_chat_template, construct_chat_template, get_chat_template
from unsloth.core.errors import ConfigError, DataError, TokenizerError
from unsloth.data import ollama
from unsloth.data.conversation import Conversation
from unsloth.data.render import ChatRenderer

PLAIN = (
    "Do the task.\n\n### Question:\n{INPUT}\n\n### Answer:\n{OUTPUT}\n\n### Question:\n{INPUT}\n\n### Answer:\n{OUTPUT}"
)
CHATML = (
    "<|im_start|>system\n{SYSTEM}<|im_end|>\n"
    + "<|im_start|>user\n{INPUT}<|im_end|>\n<|im_start|>assistant\n{OUTPUT}<|im_end|>\n" * 2
)
TALK = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d"},
]


@pytest.fixture
def fresh(tokenizer):
    return copy.deepcopy(tokenizer)


def test_an_example_in_plain_text(fresh):
    rows = apply_chat_template([{"messages": TALK}], fresh, chat_template=PLAIN)
    assert rows[0]["text"] == (
        "Do the task.\n\n### Question:\na\n\n### Answer:\nb<|im_end|>\n\n### Question:\nc\n\n### Answer:\nd<|im_end|>"
    )
    assert fresh.apply_chat_template(TALK[:1], tokenize=False, add_generation_prompt=True).endswith("### Answer:\n")
    made = construct_chat_template(fresh, PLAIN)
    assert (made.input_part, made.output_part) == ("\n\n### Question:\n", "\n\n### Answer:\n")


def test_an_example_with_a_system_message(fresh):
    rows = apply_chat_template([{"conversations": TALK}], fresh, chat_template=CHATML, default_system_message="S.")
    expected = "<|im_start|>system\nS.<|im_end|>\n" + "".join(
        f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in TALK
    )
    assert rows[0]["text"] == expected
    own = [{"role": "system", "content": "Mine."}, *TALK]
    assert apply_chat_template([{"messages": own}], fresh)[0]["text"] == expected.replace("S.", "Mine.")


def test_a_begin_of_text_is_written_once(fresh):
    begin_with(fresh, "<|endoftext|>")
    made = construct_chat_template(fresh, "<|endoftext|>" + CHATML)
    text = ChatRenderer(fresh, template=made.jinja_template).render(Conversation(TALK), 0).text
    assert text.startswith("<|endoftext|><|im_start|>system") and text.count("<|endoftext|>") == 1
    assert "<|endoftext|>" not in made.modelfile


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ("{INPUT}", "INPUT"),
        ("{INPUT} {OUTPUT} {SYSTEM}", "SYSTEM"),
        ("Q:{INPUT} A:{OUTPUT} Q:{INPUT} B:{OUTPUT}", "differ"),
    ],
)
def test_examples_that_cannot_be_used(example, message, fresh):
    with pytest.raises(ConfigError, match=message):
        construct_chat_template(fresh, example)
    with pytest.raises(DataError, match="row 0.*no {SYSTEM}"):
        apply_chat_template([{"messages": [{"role": "system", "content": "S"}, *TALK]}], fresh, chat_template=PLAIN)


def as_ollama_does(modelfile, messages):
    """Apply a Modelfile's template to each pair of prompt and response, the system message with the first."""
    template = re.search(r'TEMPLATE """(.*?)"""', modelfile, re.DOTALL)[1]
    default = re.search(r'SYSTEM """(.*?)"""', modelfile, re.DOTALL)
    system = default[1] if default else ""
    if messages[0]["role"] == "system":
        system, messages = messages[0]["content"], messages[1:]
    text = ""
    for prompt, response in zip(messages[::2], messages[1::2], strict=True):
        turn = template
        inner = re.compile(r"\{\{ if \.System \}\}(.*?)\{\{ end \}\}", re.DOTALL)
        turn = inner.sub(lambda found, system=system: found[1] if system else "", turn)
        turn = re.sub(r"\{\{ if \.Prompt \}\}(.*?)\{\{ end \}\}", lambda found: found[1], turn, flags=re.DOTALL)
        for name, value in ((".System", system), (".Prompt", prompt["content"]), (".Response", response["content"])):
            turn = turn.replace("{{ " + name + " }}", value)
        text, system = text + turn, ""
    return text


def begin_with(tokenizer, token):
    """Let the tokenizer put a token before every text, as Ollama then does by itself."""
    tokenizer.bos_token = token
    special = [(token, tokenizer.convert_tokens_to_ids(token))]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{token} $A", special_tokens=special)


@pytest.mark.parametrize("name", [name for name in CHAT_TEMPLATES if "oss" not in name])
@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be kind."}]])
def test_ollama_writes_what_was_trained(name, system, fresh):
    tokenizer = get_chat_template(fresh, name)
    begin_with(tokenizer, "<|endoftext|>")
    modelfile = ollama.modelfile(tokenizer)
    expected = ChatRenderer(tokenizer).render(Conversation([*system, *TALK]), 0).text
    if name in ("qwen-3", "qwen3"):
        expected = expected.replace("<think>\n\n</think>\n\n", "")  # only the last answer shows its thoughts
    if name.startswith("llama") and not system and "{{ if .System }}" in modelfile and "Today Date" in expected:
        expected = expected[expected.index("<|start_header_id|>user") :]  # without a message there is no system turn
    assert as_ollama_does(modelfile, [*system, *TALK]) == expected.replace("<|endoftext|>", "")
    assert f'PARAMETER stop "{tokenizer.eos_token}"' in modelfile


def test_a_first_token_that_only_the_template_writes_stays_in_it(fresh):
    """SmolLM2's first token also begins every turn, and its tokenizer does not add it."""
    tokenizer = get_chat_template(fresh, "chatml")
    tokenizer.bos_token = "<|im_start|>"
    modelfile = ollama.modelfile(tokenizer)
    expected = ChatRenderer(tokenizer).render(Conversation(TALK), 0).text
    assert as_ollama_does(modelfile, TALK) == expected
    assert '"user' not in modelfile  # no stop word out of half a header


@pytest.mark.parametrize("example", [PLAIN, CHATML])
def test_the_ollama_file_of_an_example_writes_the_same(example, fresh):
    rows = apply_chat_template([{"messages": TALK}], fresh, chat_template=example)
    assert as_ollama_does(fresh._ollama_modelfile, TALK) == rows[0]["text"]


def test_a_format_that_ollama_cannot_write_is_refused(fresh):
    with pytest.raises(TokenizerError, match="Ollama"):
        ollama.modelfile(get_chat_template(fresh, "gpt-oss"))
