import copy

import torch
from bitsandbytes.optim import AdamW8bit as Theirs
from transformers import Trainer

from unsloth import SFTConfig
from unsloth.train.adamw_8bit import AdamW8bit
from unsloth.train.optim import faster


def run(optimizer, parameters, seed, steps):
    torch.manual_seed(seed)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()


def make():
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in ((64, 96), (300,), (5000,))]


def test_small_tensors_keep_exact_moments():
    ours, exact = make(), make()
    run(AdamW8bit(ours, lr=0.01, weight_decay=0.1), ours, 1, 5)
    run(torch.optim.AdamW(exact, lr=0.01, weight_decay=0.1), exact, 1, 5)
    assert torch.allclose(ours[1], exact[1], atol=1e-6)
    assert not torch.allclose(ours[0], exact[0], atol=1e-6)
    for a, b, start in zip(ours, exact, make(), strict=True):
        assert (a - b).norm() < 0.15 * (b - start).norm()


def test_a_saved_state_goes_on_where_it_was():
    whole, first = make(), make()
    run(AdamW8bit(whole, lr=0.01), whole, 1, 4)
    optimizer = AdamW8bit(first, lr=0.01)
    run(optimizer, first, 1, 2)
    second = copy.deepcopy(first)
    resumed = AdamW8bit(second, lr=0.01)
    resumed.load_state_dict(optimizer.state_dict())
    torch.manual_seed(1)
    for _ in range(2):  # the gradients that were taken already
        [torch.randn_like(parameter) for parameter in second]
    for _ in range(2):
        for parameter in second:
            parameter.grad = torch.randn_like(parameter)
        resumed.step()
    for a, b in zip(whole, second, strict=True):
        assert torch.equal(a, b)


def test_a_state_of_bitsandbytes_goes_on_with_ours():
    parameters = make()
    theirs = Theirs(parameters, lr=0.01)
    run(theirs, parameters, 1, 2)
    ours = AdamW8bit(copy.deepcopy(parameters), lr=0.01)
    ours.load_state_dict(theirs.state_dict())
    state, expected = ours.state[ours.param_groups[0]["params"][0]], theirs.state[parameters[0]]
    assert torch.equal(state["state1"], expected["state1"]) and torch.equal(state["absmax2"], expected["absmax2"])
    before = ours.param_groups[0]["params"][0].clone()
    run(ours, ours.param_groups[0]["params"], 2, 1)
    assert 0 < (ours.param_groups[0]["params"][0] - before).abs().max() < 0.05


def test_it_takes_what_transformers_gives_its_optimizer(tmp_path):
    args = SFTConfig(output_dir=str(tmp_path), optim="adamw_8bit", learning_rate=3e-4, adam_beta2=0.95)
    found, options = Trainer.get_optimizer_cls_and_kwargs(args)
    assert faster(args.optim, found, options, on_gpu=False) == (found, options)
    chosen, options = faster(args.optim, found, options, on_gpu=True)
    group = chosen(make(), **options).param_groups[0]
    assert chosen is AdamW8bit and (group["lr"], group["betas"]) == (3e-4, (0.9, 0.95))
    assert faster("adamw_bnb_8bit", found, {}, on_gpu=True)[0] is found
