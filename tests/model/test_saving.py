"""Save, load, tie, untie, resize, initialise: weights end up where they should or nowhere."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from gsa.model import GSAConfig, GSAForCausalLM, GSAModel
from gsa.model.modeling import token_layout

pytestmark = pytest.mark.filterwarnings("ignore")


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(ids).logits


def assert_same_logits(model, other, ids):
    """Equal to the last few bits: where a weight lies in memory decides how products are summed."""
    assert (logits(model, ids) - logits(other, ids)).abs().max() < 1e-12


def test_save_and_load_is_bit_exact(model, token_ids, tmp_path):
    model.save_pretrained(tmp_path)
    again = GSAForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
    assert_same_logits(model, again, token_ids(2, 9))
    assert not list(tmp_path.glob("*.bin"))


def test_blocks_without_mlp(tiny, token_ids, tmp_path):
    """intermediate_size 0: the mixers are all there is, saved, loaded and generating."""
    model, ids = tiny(intermediate_size=0), token_ids(2, 9)
    with torch.no_grad():
        x = model.model.embeddings(ids)
        layout = token_layout(x, None, None, None, None)
        for block in model.model.layers:
            x = x + block.attn(block.attn_norm(x), layout, None).output
        assert torch.equal(model.lm_head(model.model.norm(x)), model(ids).logits)
    model.save_pretrained(tmp_path)
    again = GSAForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert_same_logits(model, again, ids)
    cached = again.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(cached, again.generate(ids, max_new_tokens=5, use_cache=False))


def test_save_and_load_in_shards(tiny, token_ids, tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    again = GSAForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert_same_logits(model, again, token_ids(1, 9))


def test_the_base_model_loads_from_a_language_model_and_not_the_reverse(tiny, tmp_path, token_ids):
    model, ids = tiny(), token_ids(1, 6)
    model.save_pretrained(tmp_path / "whole")
    base = GSAModel.from_pretrained(tmp_path / "whole", dtype=torch.float64)
    with torch.no_grad():
        hidden = base(ids).last_hidden_state
        assert (model.lm_head(hidden) - logits(model, ids)).abs().max() < 1e-12
    base.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"no weight in the checkpoint for lm_head\.weight"):
        GSAForCausalLM.from_pretrained(tmp_path / "base")


@pytest.mark.parametrize("change", ["missing", "left over", "shape"])
def test_weights_that_do_not_fit_are_named(tiny, tmp_path, change):
    tiny().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.attn.f_proj.weight"
    if change == "missing":
        del weights[name]
    elif change == "left over":
        name = "model.layers.1.attn.g_proj.weight"
        weights[name] = torch.zeros(3)
    else:
        weights[name] = torch.zeros(3, 16)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=name):
        GSAForCausalLM.from_pretrained(tmp_path)


def test_pickled_weights_are_not_read(tiny, tmp_path):
    tiny().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        GSAForCausalLM.from_pretrained(tmp_path)


def test_tie_save_load_untie_save_load(tiny, token_ids, tmp_path):
    ids = token_ids(1, 8)
    tied = tiny(tie_word_embeddings=True)
    tied.save_pretrained(tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    loaded = GSAForCausalLM.from_pretrained(tmp_path / "tied", dtype=torch.float64)
    assert loaded.lm_head.weight is loaded.model.embeddings.weight
    assert_same_logits(loaded, tied, ids)

    loaded.untie_weights()
    before = logits(loaded, ids)
    assert_same_logits(loaded, tied, ids)
    with torch.no_grad():
        loaded.lm_head.weight.mul_(2)
    torch.testing.assert_close(logits(loaded, ids), 2 * before)
    loaded.save_pretrained(tmp_path / "untied")
    again = GSAForCausalLM.from_pretrained(tmp_path / "untied", dtype=torch.float64)
    assert again.config.tie_word_embeddings is False
    assert_same_logits(again, loaded, ids)

    again.config.tie_word_embeddings = True
    again.tie_weights()
    assert again.lm_head.weight is again.model.embeddings.weight


def test_a_config_that_contradicts_the_stored_head_is_an_error(tiny, tmp_path):
    tiny(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        GSAForCausalLM.from_pretrained(tmp_path / "tied", tie_word_embeddings=False)
    tiny().save_pretrained(tmp_path / "untied")
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        GSAForCausalLM.from_pretrained(tmp_path / "untied", tie_word_embeddings=True)


@pytest.mark.parametrize("tied", [True, False])
def test_resizing_the_vocabulary_keeps_the_old_tokens(tiny, token_ids, tmp_path, tied):
    model, ids = tiny(tie_word_embeddings=tied), token_ids(1, 8)
    before = logits(model, ids)
    model.resize_token_embeddings(47)
    after = logits(model, ids)
    assert after.shape[-1] == model.config.vocab_size == 47
    assert (after[..., :40] - before).abs().max() < 1e-12
    assert (model.lm_head.weight is model.model.embeddings.weight) == tied
    model.save_pretrained(tmp_path)
    again = GSAForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert_same_logits(again, model, ids)
    assert again.generate(ids, max_new_tokens=3).shape == (1, 11)


def test_initialisation_leaves_loaded_weights_alone_and_follows_the_seed(model, variant, tiny):
    same, other = tiny(**variant), tiny(seed=1, **variant)
    drawn = 0
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, same.state_dict()[name])
        drawn += not torch.equal(weight, other.state_dict()[name])
    assert drawn >= 10
    with torch.device("meta"):
        empty = GSAForCausalLM(model.config)
    assert all(weight.is_meta for weight in empty.parameters())


def test_static_gates_start_apart():
    config = dict(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_heads=2, num_slots=4)
    model = GSAForCausalLM(GSAConfig(**config, gate="data_independent"))
    assert model.model.layers[0].attn.f_proj.logits.tolist() == [[0, 2, 4, 6]] * 2
