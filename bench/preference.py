"""DPO of a QLoRA model, ours and TRL's: tokens/s, and peak memory beside the static memory.

python bench/preference.py [--dry-run] [--layers N] [--pairs 4] [--length 1024] [--steps 6]

A Llama of 8B width with a few layers and random weights in NF4, r = 32 on all linear layers, the same rows and seed for
both. Static memory is what is allocated before the first step, which is weights and adapters; the optimizer's states
and gradients come on top, and are counted by their size. Each run is in a process of its own, and adds a row to
bench/results/preference.csv. --dry-run: tiny, on the CPU, without the row.
"""

import argparse
import csv
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch
import transformers
import trl
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TrainerCallback

RESULTS = Path(__file__).parent / "results" / "preference.csv"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
COLUMNS = ["date", "gpu", "torch", "transformers", "trl", "trainer", "layers", "pairs", "length"]
COLUMNS += ["tokens_per_s", "static_gib", "peak_gib", "over_gib"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--trainer", choices=["unsloth", "trl"])
    given = parser.parse_args()
    if given.dry_run:
        given.layers, given.pairs, given.length, given.steps = 2, 2, 32, 3
    return given


def build(given: argparse.Namespace) -> torch.nn.Module:
    width = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    if given.dry_run:
        width = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        **width,
        num_hidden_layers=given.layers,
        vocab_size=512 if given.dry_run else 128256,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        pad_token_id=0,
    )
    dtype = torch.float32 if given.dry_run else torch.bfloat16
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        device = "cpu" if given.dry_run else 0
        model = LlamaForCausalLM.from_pretrained(
            folder, dtype=dtype, quantization_config=quantization, device_map={"": device}
        )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return get_peft_model(model, LoraConfig(r=32, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM"))


def rows(given: argparse.Namespace) -> "list[dict[str, list[int]]]":
    generator = torch.Generator().manual_seed(1)
    half = given.length // 2

    def draw() -> list[int]:
        return torch.randint(4, 500, (half,), generator=generator).tolist()

    count = given.pairs * given.steps
    return [{"prompt_ids": draw(), "chosen_ids": draw(), "rejected_ids": draw()} for _ in range(count)]


class Clock(TrainerCallback):
    """Times the steps after the first two."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())


def run(given: argparse.Namespace) -> dict[str, object]:
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    if given.trainer == "unsloth":
        from unsloth.train.dpo import DPOConfig, DPOTrainer
    else:
        from trl.trainer.dpo_config import DPOConfig
        from trl.trainer.dpo_trainer import DPOTrainer

        # TRL tokenizes text; these rows are tokens already
        DPOTrainer = type("DPOTrainer", (DPOTrainer,), {"_prepare_dataset": lambda self, dataset, *args: dataset})
    words = {"<pad>": 0, "<eos>": 1}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<pad>")), pad_token="<pad>", eos_token="<eos>"
    )
    model, clock = build(given), Clock()
    on_gpu = not given.dry_run
    with tempfile.TemporaryDirectory() as folder:
        args = DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=given.pairs,
            max_length=given.length,
            max_steps=given.steps,
            bf16=on_gpu,
            use_cpu=not on_gpu,
            gradient_checkpointing=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = DPOTrainer(
            model=model,
            args=args,
            train_dataset=Dataset.from_list(rows(given)),
            processing_class=tokenizer,
            callbacks=[clock],
        )
        static = torch.cuda.memory_allocated() if on_gpu else 0
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    size = max(p.element_size() for p in model.parameters() if p.requires_grad)
    static += trained * 3 * size  # gradients and the two moments of AdamW
    steps = len(clock.times) - 2
    speed = given.pairs * 2 * given.length * steps / (clock.times[-1] - clock.times[1])
    gib = [round(value / 2**30, 3) for value in (static, peak, peak - static)]
    gpu = torch.cuda.get_device_name() if on_gpu else "CPU"
    versions = [torch.__version__, transformers.__version__, trl.__version__]
    figures = [given.trainer, given.layers, given.pairs, given.length, round(speed, 1), *gib]
    return dict(zip(COLUMNS, [date.today().isoformat(), gpu, *versions, *figures], strict=True))


def main() -> None:
    given = arguments()
    if given.trainer is None:
        for trainer in ("trl", "unsloth"):
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--trainer", trainer], check=True)
        return
    row = run(given)
    print(*(f"{name}={value}" for name, value in row.items()))
    if given.dry_run:
        return
    fresh = not RESULTS.exists()
    with RESULTS.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if fresh:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main()
