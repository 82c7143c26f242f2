"""Batches without padding and with shared prompts once: the same training, from fewer tokens."""

import pytest
import torch

from unsloth import (
    CPOConfig,
    CPOTrainer,
    DPOConfig,
    DPOTrainer,
    FastLanguageModel,
    KTOConfig,
    KTOTrainer,
    ORPOConfig,
    ORPOTrainer,
)
from unsloth.core.errors import ConfigError
from unsloth.layers import packed_attention
from unsloth.train.packed_rows import pack

PAIRS = [
    {"prompt": "a shared beginning " * (1 + i % 3), "chosen": "well " * (1 + i % 4), "rejected": "no " * (1 + i % 3)}
    for i in range(8)
]


def test_rows_end_to_end():
    ids = torch.tensor([[5, 6, 7, 0], [8, 0, 0, 0], [9, 1, 2, 3]])
    found = pack(ids, ids != 0)
    assert found.input_ids.tolist() == [[5, 6, 7, 8, 9, 1, 2, 3]]
    assert found.position_ids.tolist() == [[0, 1, 2, 0, 0, 1, 2, 3]]
    assert found.index.tolist() == [[0, 1, 2, 0], [3, 0, 0, 0], [4, 5, 6, 7]]


def test_pairs_keep_their_prompt_once():
    # prompts [5, 6] and [8], then one whose sides differ from the second token on
    chosen, rejected = [[5, 6, 7, 0], [8, 9, 9, 9], [3, 4, 1, 0]], [[5, 6, 7, 2], [8, 1, 0, 0], [3, 2, 1, 0]]
    ids = torch.tensor(chosen + rejected)
    prompts = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0]] * 2).bool()
    found = pack(ids, ids != 0, prompts)
    assert found.input_ids.tolist() == [[5, 6, 7, 7, 2, 8, 9, 9, 9, 1, 3, 4, 1, 2, 1]]
    assert found.position_ids.tolist() == [[0, 1, 2, 2, 3, 0, 1, 2, 3, 1, 0, 1, 2, 1, 2]]
    again = found.input_ids[0][found.index].masked_fill(ids == 0, 0)
    assert torch.equal(again, ids)


def test_padding_in_front_shares_nothing():
    ids = torch.tensor([[0, 5, 6, 7], [5, 6, 1, 2]])
    found = pack(ids, ids != 0, torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]).bool())
    assert found.input_ids.tolist() == [[5, 6, 7, 5, 6, 1, 2]]
    assert found.index.tolist() == [[0, 0, 1, 2], [3, 4, 5, 6]]


METHODS = {
    "dpo": (DPOTrainer, DPOConfig, {}),
    "dpo beforehand": (DPOTrainer, DPOConfig, {"precompute_ref_log_probs": True}),
    "orpo": (ORPOTrainer, ORPOConfig, {}),
    "simpo": (CPOTrainer, CPOConfig, {"loss_type": "simpo"}),
    "kto": (KTOTrainer, KTOConfig, {}),
}


def trained(folder, output, method, fills=False, **changes):
    """(the trainer after four steps, tokens that the first layer saw in each forward)."""
    trainer_class, config_class, particular = METHODS[method]
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=256, dtype=torch.float32, load_in_16bit=True
    )
    model = FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=False)
    model.set_attn_implementation(packed_attention.NAME)  # as the plan does on a GPU
    seen = []
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].numel()))
    options = {"max_steps": 4, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True}
    options |= {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.1}  # AdamW magnifies rounding near 0
    options |= {"per_device_train_batch_size": 4, "bf16": False, **particular, **changes}
    args = config_class(output_dir=str(output), **options)
    trainer = trainer_class(model=model, tokenizer=tokenizer, train_dataset=PAIRS, args=args)
    trainer._fills = fills  # as on a GPU
    trainer.train()
    return trainer, seen


@pytest.mark.parametrize("method", METHODS)
def test_the_training_is_the_same(tiny, tmp_path, method):
    padded, all_tokens = trained(tiny(), tmp_path, method, packing=False)
    packed, tokens = trained(tiny(), tmp_path, method)
    assert sum(tokens) < 0.8 * sum(all_tokens)
    assert_same(packed, padded)


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_filled_batches_train_the_same(tiny, tmp_path, method):
    packed, _ = trained(tiny(), tmp_path, method)
    filled, tokens = trained(tiny(), tmp_path, method, fills=True)
    assert all(count % 256 == 0 for count in tokens)
    assert_same(filled, packed)


def assert_same(first, second):
    for ours, plain in zip(first.state.log_history[:4], second.state.log_history[:4], strict=True):
        for name in ("loss", "grad_norm", "logps/chosen", "num_tokens"):
            assert ours[name] == pytest.approx(plain[name], rel=1e-4), name
    theirs = dict(second.model.named_parameters())
    for name, parameter in first.model.named_parameters():
        torch.testing.assert_close(parameter, theirs[name], rtol=1e-4, atol=1e-6, msg=name)


def test_asked_for_where_it_cannot_be_done(tiny, tmp_path):
    model, tokenizer = FastLanguageModel.from_pretrained(str(tiny()), max_seq_length=64, load_in_16bit=True)
    model = FastLanguageModel.get_peft_model(model, r=4)
    args = DPOConfig(output_dir=str(tmp_path), packing=True, report_to="none")
    with pytest.raises(ConfigError, match="packing needs a model.*'sdpa'"):
        DPOTrainer(model=model, tokenizer=tokenizer, train_dataset=PAIRS, args=args)


def test_groups_keep_their_prompt_once():
    """Rows 0, 2 and 3 have one prompt, with padding in front; row 1 another; row 4 only calls row 0 its leader."""
    rows = [[0, 5, 6, 7, 0], [8, 9, 4, 1, 2], [0, 5, 6, 8, 9], [0, 5, 6, 0, 0], [0, 7, 6, 1, 0]]
    ids = torch.tensor(rows)
    prompts = torch.tensor([[1, 1, 1, 0, 0]]).bool().expand_as(ids)
    found = pack(ids, ids != 0, prompts, torch.tensor([0, 1, 0, 0, 0]))
    assert found.input_ids.tolist() == [[5, 6, 7, 8, 9, 7, 6, 1, 8, 9, 4, 1, 2]]
    assert found.position_ids.tolist() == [[0, 1, 2, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4]]
    again = found.input_ids[0][found.index].masked_fill(ids == 0, 0)
    assert torch.equal(again, ids)
