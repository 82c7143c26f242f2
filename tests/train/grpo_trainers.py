"""GRPO trainers of the tiny model, and rewards for them."""

import torch

from unsloth import FastLanguageModel, GRPOConfig, GRPOTrainer

ROWS = [{"prompt": f"Say {i}:", "answer": str(i)} for i in range(16)]


def adapted(folder, **options):
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=128, dtype=torch.float32, **{"load_in_16bit": True, **options}
    )
    return FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=False), tokenizer


def settings(tmp_path, **changes):
    return {
        "output_dir": str(tmp_path),
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 12,
        "learning_rate": 1e-2,
        "disable_tqdm": True,
        "use_cpu": True,
        **changes,
    }


def share_of_e(completions, **_):
    return [completion.count("e") / max(len(completion), 1) for completion in completions]


def length(completions, **_):
    return [float(len(completion)) for completion in completions]


def trainer_of(tiny, tmp_path, reward_funcs=share_of_e, rows=ROWS, callbacks=None, model=None, more=None, **changes):
    model, tokenizer = model or adapted(tiny())
    args = GRPOConfig(**settings(tmp_path, **changes))
    return GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=reward_funcs,
        args=args,
        train_dataset=rows,
        callbacks=callbacks,
        **(more or {}),
    )


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]
