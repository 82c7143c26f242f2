import pytest
import torch

from unsloth import FastLanguageModel, UnslothTrainer, UnslothTrainingArguments
from unsloth.core.errors import ConfigError


def trainer(folder, rows, output, *, full=False, trained=("embed_tokens", "lm_head"), **changes):
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=96, dtype=torch.float32, load_in_16bit=not full, full_finetuning=full
    )
    model = FastLanguageModel.get_peft_model(model, r=4, modules_to_save=list(trained) or None)
    args = UnslothTrainingArguments(
        output_dir=str(output),
        **{
            "max_steps": 2,
            "learning_rate": 1e-2,
            "save_strategy": "no",
            "lr_scheduler_type": "linear",
            "optim": "adamw_torch",
            "disable_tqdm": True,
            **changes,
        },
    )
    return UnslothTrainer(model=model, tokenizer=tokenizer, train_dataset=rows, args=args)


@pytest.mark.parametrize("full", [False, True])
def test_embeddings_have_a_rate_of_their_own(tiny, conversations, tmp_path, full):
    run = trainer(tiny("llama", tied=False), conversations, tmp_path, full=full, embedding_learning_rate=1e-3)
    run.create_optimizer_and_scheduler(num_training_steps=4)
    names = {id(parameter): name for name, parameter in run.model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in run.optimizer.param_groups for p in group["params"]}
    assert set(rates) == {name for name, p in run.model.named_parameters() if p.requires_grad}
    for name, rate in rates.items():
        assert rate == (1e-3 if "embed_tokens" in name or "lm_head" in name else 1e-2), name
    assert sum(rate == 1e-3 for rate in rates.values()) == 2
    for _ in range(2):
        run.lr_scheduler.step()
    halved = {group["lr"] for group in run.optimizer.param_groups if group["params"]}
    assert halved == {5e-4, 5e-3}


def test_the_rate_is_what_the_embedding_moves_by(tiny, conversations, tmp_path):
    """Adam's first step has the size of the learning rate, whatever the gradient."""
    run = trainer(
        tiny("llama", tied=False),
        conversations,
        tmp_path,
        embedding_learning_rate=1e-3,
        lr_scheduler_type="constant",
        max_steps=1,
    )
    head = run.model.get_output_embeddings().weight
    before = head.detach().clone()
    run.train()
    assert (head - before).abs().max().item() == pytest.approx(1e-3, rel=0.02)


def test_a_rate_without_trained_embeddings_is_refused(tiny, conversations, tmp_path):
    run = trainer(tiny(), conversations, tmp_path, trained=(), embedding_learning_rate=1e-3)
    with pytest.raises(ConfigError, match="neither embed_tokens nor lm_head.*target_modules"):
        run.train()
