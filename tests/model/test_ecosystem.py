"""The model among the tools people use: Auto classes, pipeline, Trainer, PEFT, checkpointing."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)

import gsa
from gsa.model import GSACache, GSAConfig, GSAForCausalLM, GSAModel, register_auto

pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_auto_classes_know_the_model_when_it_is_imported_before_them():
    """Through a room of the house; through gsa itself: `test_published_checkpoints.py`."""
    program = """
import gsa.layers, sys
assert not {'transformers', 'triton'} & set(sys.modules), 'layers need neither'
import gsa.model
from transformers import AutoConfig, AutoModelForCausalLM
config = AutoConfig.for_model('gsa', vocab_size=9, hidden_size=8, num_hidden_layers=1,
                              num_heads=2, intermediate_size=4)
assert type(AutoModelForCausalLM.from_config(config)).__module__ == 'gsa.model.modeling'
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(gsa.__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_registering_again_wins_over_another_owner_of_the_name():
    class OtherConfig(PreTrainedConfig):
        model_type = "gsa"

    try:
        AutoConfig.register("gsa", OtherConfig, exist_ok=True)
        assert type(AutoConfig.for_model("gsa")) is OtherConfig
    finally:
        register_auto()
    assert type(AutoConfig.for_model("gsa")) is GSAConfig


def test_auto_classes_load_a_saved_folder(tiny, tmp_path):
    tiny().save_pretrained(tmp_path)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is GSAForCausalLM
    assert type(AutoModel.from_pretrained(tmp_path)) is GSAModel


def letters():
    """A tokenizer of single letters, 40 in all."""
    signs = ["<pad>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz .,;:!?'-()"]
    model = models.WordLevel({sign: i for i, sign in enumerate(signs)}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **special)


def test_text_generation_pipeline_batched_equals_one_by_one(tiny, tmp_path):
    tiny().save_pretrained(tmp_path)
    letters().save_pretrained(tmp_path)
    generate = pipeline("text-generation", model=str(tmp_path), dtype=torch.float64)
    assert type(generate.model) is GSAForCausalLM
    prompts = ["to be, or", "once more unto the breach"]
    options = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    together = generate(prompts, batch_size=2, **options)
    alone = [generate(prompt, **options) for prompt in prompts]
    assert together == alone
    assert all(len(text[0]["generated_text"]) > 4 for text in together)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(model, token_ids, reentrant):
    ids, grads = token_ids(2, 11), []
    model.train()
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        calls = []
        norm = model.model.layers[0].attn_norm
        handle = norm.register_forward_hook(lambda *_, c=calls: c.append(1))
        model(ids, labels=ids).loss.backward()
        handle.remove()
        assert len(calls) == 1 + checkpointing, "the block was (not) computed again"
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
        model.zero_grad()
    with pytest.raises(ValueError, match="past_key_values: expected None while training"):
        model(ids, past_key_values=GSACache(model.config))
    for name, grad in grads[0].items():
        assert grad.abs().sum() > 0, name
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-9, atol=1e-12)


class Rows(torch.utils.data.Dataset):
    """Four rows of unequal numbers of labels."""

    def __init__(self, ids):
        self.ids = ids

    def __len__(self):
        return 4

    def __getitem__(self, i):
        labels = self.ids[i].clone()
        labels[: 2 * i] = -100
        return {"input_ids": self.ids[i], "labels": labels}


def train(model, folder, rows, accumulate):
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=4 // accumulate,
        gradient_accumulation_steps=accumulate,
        learning_rate=0.1,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        optim="sgd",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Rows(rows))
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(
        trainer.train_dataset
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_two_steps_and_accumulation_weighs_every_token_alike(tiny, token_ids, tmp_path):
    rows, weights, losses = token_ids(4, 12), [], []
    for accumulate in (1, 4):
        model = tiny().train()
        losses.append(train(model, tmp_path, rows, accumulate))
        weights.append(model.state_dict())
    assert len(losses[0]) == 2 and losses[0][1] < losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-6, atol=1e-7)
        assert not torch.equal(weight, tiny().state_dict()[name]), f"{name} was not trained"


def test_peft_lora_two_steps(tiny, token_ids, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    base, ids = tiny(), token_ids(2, 9)
    frozen = {name: weight.clone() for name, weight in base.state_dict().items()}
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "f_proj"]
    lora = LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(base, lora).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[2] < losses[1] < losses[0]
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny(), tmp_path).eval()
    assert all(torch.equal(weight, frozen[name]) for name, weight in tiny().state_dict().items())
    with torch.no_grad():
        plain = tiny()(ids).logits
        torch.testing.assert_close(again(ids).logits, model(ids).logits)
        assert (again(ids).logits - plain).abs().max() > 1e-4
    generated = again.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, model.generate(input_ids=ids, max_new_tokens=4, do_sample=False))
