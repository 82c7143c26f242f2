"""Loading in 4 bits never holds the 16-bit model: the peak stays near the size of the result."""

import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

MEASURE = """
import re, sys, threading, time
import torch, transformers, bitsandbytes
from unsloth import FastLanguageModel

def anonymous():  # bytes; the mapped weight file does not count
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read()).group(1)) * 1024

FastLanguageModel.from_pretrained(sys.argv[2], max_seq_length=64)  # what libraries allocate once
start = anonymous()
peak, stop = start, threading.Event()

def watch():
    global peak
    while not stop.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
model, _ = FastLanguageModel.from_pretrained(sys.argv[1], max_seq_length=64, dtype=torch.bfloat16)
stop.set(), thread.join()
print(peak - start, model.get_memory_footprint())
"""


pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def peak_and_size(folder, warm_up):
    """Peak of private memory while loading, and size of the loaded model, in bytes."""
    result = subprocess.run([sys.executable, "-c", MEASURE, str(folder), str(warm_up)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return map(int, result.stdout.split()[-2:])


@pytest.mark.model
def test_smollm2_peaks_near_its_quantized_size(tiny, smollm2):
    peak, size = peak_and_size(smollm2, tiny())
    layer = 2 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)  # bytes of one block in 16 bits
    assert peak < 1.2 * size + layer


def test_the_16_bit_model_is_never_held(tiny, tokenizer, tmp_path):
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=16,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=True,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    peak, size = peak_and_size(tmp_path / "model", tiny())
    # On the CPU, bitsandbytes quantizes a matrix with about 22 bytes of working memory a weight.
    working_memory = 24 * 1024 * 4096
    assert peak < 1.05 * size + working_memory
