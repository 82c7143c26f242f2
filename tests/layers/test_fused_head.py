"""A model with a fused head gives the losses and gradients it gave before, and nothing else about it changes."""

import copy
import inspect
import io
import pickle
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from unsloth import FastLanguageModel
from unsloth.core.errors import ModelError
from unsloth.layers import fused_head
from unsloth.layers.lazy_logits import LazyLogits
from unsloth.memory.budget import Assignment
from unsloth.memory.keeper import Keeper
from unsloth.models import record
from unsloth.models.plan import plan


@pytest.fixture
def model(tiny):
    return AutoModelForCausalLM.from_pretrained(tiny(tied=False), dtype=torch.float32)


def batch(masked=8):
    torch.manual_seed(3)
    ids = torch.randint(4, 260, (2, 24))
    labels = ids.clone()
    labels[:, :masked] = -100
    return {"input_ids": ids, "labels": labels}


def step(model, **more):
    """(logits, loss, gradients) of one forward and backward."""
    model.zero_grad()
    output = model(**{**batch(), **more})
    output.loss.backward()
    return output.logits, output.loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def is_fused(logits):
    return isinstance(logits, LazyLogits) and logits.is_pending


def assert_same(found, expected):
    assert found[1] == pytest.approx(expected[1], rel=1e-6)
    assert found[2].keys() == expected[2].keys()
    for name, gradient in expected[2].items():
        assert (found[2][name] - gradient).norm() <= 1e-5 * gradient.norm().clamp(min=1e-3), name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("more", [{}, {"num_items_in_batch": torch.tensor(50)}], ids=["mean", "items"])
def test_full_training_is_the_same(tiny, tied, more):
    model = AutoModelForCausalLM.from_pretrained(tiny(tied=tied), dtype=torch.float32)
    plain = step(model, **more)
    assert fused_head.install(model).applies
    fused = step(model, **more)
    assert is_fused(fused[0]) and not is_fused(plain[0])
    assert_same(fused, plain)
    assert model.get_output_embeddings().weight.grad is not None
    assert torch.equal(fused[0], plain[0])


def test_a_head_with_a_bias(model):
    model.lm_head.bias = torch.nn.Parameter(torch.randn(260))
    plain = step(model)
    fused_head.install(model)
    fused = step(model)
    assert is_fused(fused[0])
    assert_same(fused, plain)
    assert "lm_head.bias" in fused[2]


def test_the_logits_come_when_asked_for(model, monkeypatch):
    plain = step(model)
    fused_head.install(model)
    for asked in ({"return_logits": True}, {"labels": None}):
        output = model(**{**batch(), **asked})
        assert type(output.logits) is torch.Tensor
        assert torch.equal(output.logits, plain[0])
    assert model(**batch(), return_logits=True).loss.item() == plain[1]
    monkeypatch.setenv("UNSLOTH_RETURN_LOGITS", "1")
    assert not is_fused(model(**batch()).logits)
    assert is_fused(model(**batch(), return_logits=False).logits)


def test_labels_may_be_positional(model):
    fused_head.install(model)
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    values = batch()
    output = model(*[values.get(name) for name in names[: names.index("labels") + 1]])
    assert is_fused(output.logits)


def test_a_forward_that_failed_leaves_nothing_on(model):
    fused_head.install(model)
    down = model.model.layers[0].mlp.down_proj
    original, down.forward = down.forward, lambda x: (_ for _ in ()).throw(torch.OutOfMemoryError("no memory"))
    with pytest.raises(torch.OutOfMemoryError):
        model(**batch())
    down.forward = original
    assert type(model.lm_head(torch.randn(1, 2, 64))) is torch.Tensor
    assert type(model(input_ids=batch()["input_ids"]).logits) is torch.Tensor


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_is_fused_with_its_own_head(model, how):
    fused_head.install(model)
    plain = step(model)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, buffer := io.BytesIO())
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    found = step(twin)
    assert is_fused(found[0])
    assert_same(found, plain)
    with torch.no_grad():
        twin.lm_head.weight.mul_(0.5)
    assert step(twin)[1] != pytest.approx(plain[1])
    assert step(model)[1] == pytest.approx(plain[1])
    fused_head.remove(twin)
    assert not is_fused(step(twin)[0]) and is_fused(step(model)[0])


def test_two_models_do_not_see_each_other(tiny):
    first, second = (AutoModelForCausalLM.from_pretrained(tiny("qwen3"), dtype=torch.float32) for _ in range(2))
    fused_head.install(first)
    assert is_fused(step(first)[0]) and not is_fused(step(second)[0])
    assert_same(step(first), step(second))


def test_removing_leaves_the_model_as_it_was(model):
    before = set(model.__dict__) | {f"head.{name}" for name in model.lm_head.__dict__}
    fused_head.install(model)
    fused_head.install(model)
    fused_head.remove(model)
    fused_head.remove(model)
    assert before == set(model.__dict__) | {f"head.{name}" for name in model.lm_head.__dict__}
    assert not model._forward_hooks and not model._forward_pre_hooks
    assert not is_fused(step(model)[0])


def test_removing_under_a_later_wrapper_is_refused(model):
    fused_head.install(model)
    ours = model.lm_head.forward
    model.lm_head.forward = lambda x: ours(x) * 2
    with pytest.raises(ModelError, match="replaced since"):
        fused_head.remove(model)


def test_what_does_not_fit_is_left_alone_with_a_reason(model, tiny):
    classifier = AutoModelForSequenceClassification.from_pretrained(tiny(), num_labels=2)
    assert "ForSequenceClassificationLoss" in fused_head.install(classifier).text
    model.loss_function = own = lambda logits, labels, **_: logits.sum()
    assert "its loss is <lambda>" in fused_head.install(model).text
    assert model.loss_function is own
    del model._loss_function
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head", "q_proj"], r=2))
    found = fused_head.install(adapted.get_base_model())
    assert not found.applies and found.path == "lm_head"
    assert not is_fused(step(adapted)[0])


def test_peft_by_other_hands_stays_right(model):
    """PEFT puts a copy of a trained head into its wrapper, and LoRA around it; neither may give other values."""
    config = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    on_head = {"r": 2, "target_modules": ["q_proj", "lm_head"], "init_lora_weights": False}
    for settings in (config, on_head):
        results = []
        for fused in (False, True):
            base = copy.deepcopy(model)
            if fused:
                fused_head.install(base)
            torch.manual_seed(0)
            adapted = peft.get_peft_model(base, peft.LoraConfig(**settings))
            results.append(step(adapted))
            with adapted.disable_adapter():
                assert step_loss(adapted) == pytest.approx(step_loss(model), rel=1e-6)
            if fused:
                merged = adapted.merge_and_unload()
                assert step_loss(merged) == pytest.approx(results[0][1], rel=1e-5)
        assert_same(results[1], results[0])


def step_loss(model):
    with torch.no_grad():
        return model(**batch()).loss.item()


@pytest.mark.parametrize("trained", [None, ["lm_head"], ["lm_head", "embed_tokens"]])
@pytest.mark.parametrize("tied", [True, False])
def test_our_models_are_fused_with_and_without_a_trained_head(tiny, trained, tied):
    results = []
    for fused in (False, True):
        model, _ = FastLanguageModel.from_pretrained(
            str(tiny(tied=tied)), max_seq_length=64, dtype=torch.float32, load_in_16bit=True, fused_head=fused
        )
        model = FastLanguageModel.get_peft_model(
            model, r=4, modules_to_save=trained, init_lora_weights=False, use_gradient_checkpointing=fused
        )
        results.append(step(model.train()))
        assert is_fused(results[-1][0]) == fused
    assert_same(results[1], results[0])
    names = [name for name in results[1][2] if "lm_head" in name]
    assert bool(names) == bool(trained)
    with model.disable_adapter():
        assert is_fused(model(**batch()).logits)


def test_saving_and_generating_are_unaffected(model, tmp_path):
    ids = batch()["input_ids"]
    words, state = model.generate(ids, max_new_tokens=5, do_sample=False), set(model.state_dict())
    fused_head.install(model)
    step(model)
    assert set(model.state_dict()) == state
    assert torch.equal(model.eval().generate(ids, max_new_tokens=5, do_sample=False), words)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert step_loss(again) == pytest.approx(step_loss(model), rel=1e-6)


def test_compiled_as_a_whole_it_is_the_plain_model(model):
    plain = step(model)
    fused_head.install(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(
        [None, *step(compiled)[1:2], {n.removeprefix("_orig_mod."): g for n, g in step(compiled)[2].items()}], plain
    )
    assert is_fused(step(model)[0])


def test_autocast_keeps_the_error_of_16_bits(model):
    exact = step(model)[1]
    fused_head.install(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, loss, gradients = step(model)
    assert is_fused(logits)
    assert loss == pytest.approx(exact, rel=2e-2)
    assert all(torch.isfinite(g).all() for g in gradients.values())


def rows(tokenizer):
    texts = [f"Say it {'very ' * (i % 4)}well: {i}" for i in range(12)]
    return [{"input_ids": (ids := tokenizer(t).input_ids), "labels": list(ids)} for t in texts]


def plain_trainer(tiny, tmp_path, fused, **more):
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(tiny()), max_seq_length=64, dtype=torch.float32, load_in_16bit=True, fused_head=fused
    )
    model = FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=False)
    data = rows(tokenizer)
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=4,
            logging_steps=1,
            learning_rate=1e-3,
            gradient_accumulation_steps=2,
            per_device_train_batch_size=2,
            per_device_eval_batch_size=4,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=data,
        eval_dataset=data[:6],
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
        **more,
    )


def test_the_plain_trainer_trains_with_the_fused_loss(tiny, tmp_path, monkeypatch):
    runs, calls = [], []
    original = fused_head.sft.causal_lm_loss
    monkeypatch.setattr(
        fused_head.sft, "causal_lm_loss", lambda *a, **k: calls.append(k["num_items"]) or original(*a, **k)
    )
    for fused in (False, True):
        calls.clear()
        trainer = plain_trainer(tiny, tmp_path, fused)
        trainer.train()
        runs.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        assert len(calls) == (8 if fused else 0)
    assert all(int(items) > 0 for items in calls)
    assert runs[1] == pytest.approx(runs[0], rel=1e-6)


def test_metrics_get_the_logits(tiny, tmp_path):
    def evaluate(fused):
        seen = []
        trainer = plain_trainer(
            tiny,
            tmp_path,
            fused,
            compute_metrics=lambda p: {"hits": float((p.predictions[:, :-1] == p.label_ids[:, 1:]).sum())},
            preprocess_logits_for_metrics=lambda logits, labels: seen.append(logits.shape) or logits.argmax(-1),
        )
        metrics = trainer.evaluate()
        predictions = plain_trainer(tiny, tmp_path, fused).predict(trainer.eval_dataset).predictions
        return metrics["eval_hits"], metrics["eval_loss"], seen, predictions

    plain, fused = evaluate(False), evaluate(True)
    assert fused[0] == plain[0]
    assert fused[1] == pytest.approx(plain[1], rel=1e-6)
    assert fused[2] == plain[2] and fused[2][0][-1] == 260
    assert (fused[3] == plain[3]).all()


def test_the_record_below_peft_is_the_fused_model(tiny):
    model, _ = FastLanguageModel.from_pretrained(str(tiny()), max_seq_length=64)  # NF4
    model = FastLanguageModel.get_peft_model(model, r=2)
    assert fused_head.find(record.transformers_model(model)) is not None
    assert is_fused(step(model)[0])


@pytest.mark.parametrize(("lean", "trained"), [(True, False), (False, False), (True, True)])
def test_fewer_logits_exist_where_memory_is_short(lean, trained):
    keeper, weight = Keeper(2), torch.nn.Parameter(torch.ones(2, 2), requires_grad=trained)
    keeper.assignment = Assignment((), lean=lean)
    expected = fused_head.LEAN_CHUNK_BYTES if lean and not trained else None
    assert fused_head.chunk_bytes(keeper, SimpleNamespace(is_cuda=True), weight) == expected
    assert fused_head.chunk_bytes(None, SimpleNamespace(is_cuda=True), weight) is None


def test_a_planned_model_says_through_its_blocks_whether_memory_is_short(model):
    made = plan(model, whole=True)
    made.apply()
    keeper = next(r.fast.options.keeper for r in made.replacements if r.new.startswith("block"))
    assert fused_head.keeper_of(model) is keeper
    made.undo()
    assert fused_head.keeper_of(model) is None
