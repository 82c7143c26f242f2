"""GGUF files for llama.cpp and the programs built on it, written, quantized and proven without a checkout of it."""
