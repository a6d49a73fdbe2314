"""Low-rank adapters: nothing at first, a product of two thin matrices later, none in the end."""

import torch

from gsa.model import GSAConfig, GSAForCausalLM
from gsa.recipes import tiny
from gsa.training.adapters import SCALE, adapt, is_adapted, merged

OPTIONS = {**tiny().model, "vocab_size": 258, "qkv_bias": True}
OPTIONS |= {"attn": [{"layers": [1], "num_heads": 2}]}


def test_adapters_change_nothing_at_first_and_are_merged_in_the_end():
    torch.manual_seed(0)
    model = GSAForCausalLM(GSAConfig(**OPTIONS)).double()
    ids = torch.randint(258, (1, 20))
    before = model(ids).logits
    adapt(model, rank=3, seed=1)
    assert torch.equal(model(ids).logits, before)
    trained = {name for name, p in model.named_parameters() if p.requires_grad and ".attn." in name}
    assert sum("lora_" in name for name in trained) == 2 * 4 * model.config.num_hidden_layers
    frozen = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "q_proj.bias")
    assert not any(name.endswith(frozen) for name in trained)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_up"):
            torch.nn.init.normal_(parameter, std=0.1)
    with_adapters = model(ids).logits
    assert (with_adapters - before).abs().max() > 1e-3
    tensors = model.state_dict()
    plain = merged(tensors)
    assert is_adapted(tensors) and not is_adapted(plain)
    owner = "model.layers.0.attn.o_proj."
    product = tensors[f"{owner}lora_up"] @ tensors[f"{owner}lora_down"]
    torch.testing.assert_close(
        plain[f"{owner}weight"] - tensors[f"{owner}weight"], SCALE * product, rtol=1e-5, atol=1e-6
    )
    fresh = GSAForCausalLM(GSAConfig(**OPTIONS)).double()
    fresh.load_state_dict(plain)
    torch.testing.assert_close(fresh(ids).logits, with_adapters, rtol=1e-4, atol=1e-5)


def test_weights_without_adapters_stay_themselves():
    tensors = {"a.weight": torch.ones(2, 2), "b": torch.ones(1)}
    assert merged(tensors) == tensors and merged(tensors)["a.weight"] is tensors["a.weight"]
