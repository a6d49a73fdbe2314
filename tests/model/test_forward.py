"""The language model's forward pass: loss, splits, padding, packing, options of the call."""

from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from gsa.model import GSACache

TINY = 1e-9


def test_loss_is_the_mean_cross_entropy_of_the_next_token_without_masked_labels(tiny, token_ids):
    model, ids = tiny(), token_ids(2, 9)
    labels = ids.clone()
    labels[0, :4] = -100
    output = model(ids, labels=labels)
    log_p = output.logits.log_softmax(-1)
    terms = [
        -log_p[b, t, ids[b, t + 1]] for b in range(2) for t in range(8) if labels[b, t + 1] != -100
    ]
    assert len(terms) == 5 + 8
    torch.testing.assert_close(output.loss, torch.stack(terms).mean())
    assert model(ids, labels=torch.full_like(ids, -100)).loss == 0
    summed = model(ids, labels=labels, num_items_in_batch=torch.tensor(5)).loss
    torch.testing.assert_close(summed, torch.stack(terms).sum() / 5)


def test_loss_is_taken_in_fp32_for_half_precision_models(tiny, token_ids):
    model, ids = tiny().bfloat16(), token_ids(1, 12)
    output = model(ids, labels=ids)
    assert output.logits.dtype == torch.bfloat16 and output.loss.dtype == torch.float32
    expected = F.cross_entropy(output.logits[0, :-1].float(), ids[0, 1:])
    torch.testing.assert_close(output.loss, expected)


@pytest.mark.parametrize("split", [1, 2, 7, 12, (3, 4), (1, 2, 3, 5)])
def test_any_split_with_the_cache_carried_equals_the_whole(model, token_ids, split):
    ids = token_ids(2, 13)
    cuts = [0, *(split if isinstance(split, tuple) else (split,)), 13]
    with torch.no_grad():
        whole = model(ids).logits
        cache, parts = GSACache(model.config), []
        for start, end in pairwise(cuts):
            parts.append(model(ids[:, start:end], past_key_values=cache).logits)
    assert (torch.cat(parts, 1) - whole).abs().max() < TINY
    assert cache.get_seq_length() == 13


def test_the_future_never_leaks_and_the_past_is_used(model, token_ids):
    ids = token_ids(1, 12)
    changed = ids.clone()
    changed[0, 6] = 2
    with torch.no_grad():
        before, after = model(ids).logits, model(changed).logits
    assert torch.equal(before[:, :6], after[:, :6])
    assert (before[:, 7:] - after[:, 7:]).abs().max() > 1e-4


MASKS = {
    "left": [[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9],
    "right": [[1, 1, 1, 1, 1, 0, 0, 0, 0], [1] * 9],
    "interior": [[1, 1, 0, 1, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 0, 1, 1, 0]],
    "one row": [[0, 0, 1, 1, 0, 1, 1, 1, 0]],
}


@pytest.mark.parametrize("rows", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("garbage", [1e4, float("nan")])
def test_padding_changes_nothing_whatever_stands_there(model, token_ids, rows, garbage):
    """Each row equals itself without padding: outputs, and what follows from the cache."""
    mask = torch.tensor(rows)
    ids, more = token_ids(len(rows), 9), token_ids(len(rows), 3, seed=1)
    embeds = model.get_input_embeddings()(ids).detach()
    embeds = embeds.masked_fill(mask[..., None] == 0, garbage)
    with torch.no_grad():
        padded = model(inputs_embeds=embeds, attention_mask=mask, use_cache=True)
        longer = torch.cat([mask, torch.ones(len(rows), 3, dtype=mask.dtype)], 1)
        cache = padded.past_key_values
        follow = model(more, attention_mask=longer, past_key_values=cache).logits
        for b, kept in enumerate(mask.bool()):
            alone = model(torch.cat([ids[b, kept], more[b]])[None]).logits[0]
            real = int(kept.sum())
            assert (padded.logits[b, kept] - alone[:real]).abs().max() < TINY
            assert (follow[b] - alone[real:]).abs().max() < TINY


def test_padding_inside_a_later_step_changes_nothing(model, token_ids):
    ids = token_ids(2, 10)
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, [1, 6, 8]] = 0
    mask[1, [5, 9]] = 0
    with torch.no_grad():
        cache = GSACache(model.config)
        first = model(ids[:, :5], attention_mask=mask[:, :5], past_key_values=cache).logits
        second = model(ids[:, 5:], attention_mask=mask, past_key_values=cache).logits
        both = torch.cat([first, second], 1)
        for b, kept in enumerate(mask.bool()):
            alone = model(ids[b, kept][None]).logits[0]
            assert (both[b, kept] - alone).abs().max() < TINY


def test_an_all_ones_mask_is_no_mask(model, token_ids):
    ids = token_ids(2, 8)
    with torch.no_grad():
        with_mask = model(ids, attention_mask=torch.ones(2, 8)).logits
        assert (with_mask - model(ids).logits).abs().max() < TINY


def test_packed_documents_do_not_see_each_other(model, token_ids):
    ids = token_ids(1, 14)
    bounds = torch.tensor([0, 1, 6, 6, 14], dtype=torch.int32)
    packed = model(ids, cu_seqlens=bounds, labels=ids)
    apart = [model(ids[:, a:b]).logits for a, b in [(0, 1), (1, 6), (6, 14)]]
    assert (packed.logits - torch.cat(apart, 1)).abs().max() < TINY
    packed.logits[0, 7].sum().backward()
    touched = model.get_input_embeddings().weight.grad.abs().sum(1) > 0
    assert set(touched.nonzero().flatten().tolist()) <= set(ids[0, 6:8].tolist())


def test_a_bound_on_documents_changes_nothing_but_the_time(model, token_ids):
    ids = token_ids(1, 14)
    bounds = torch.tensor([0, 1, 4, 4, 7, 11, 14], dtype=torch.int32)
    plain = model(ids, cu_seqlens=bounds).logits
    for longest in (4, 6, 14):
        bounded = model(ids, cu_seqlens=bounds, max_seqlen=longest).logits
        assert (bounded - plain).abs().max() < TINY
    with pytest.raises(
        ValueError, match=r"max_seqlen: expected no shorter than.*4, and at least 1, got 3"
    ):
        model(ids, cu_seqlens=bounds, max_seqlen=3)
    with pytest.raises(ValueError, match=r"max_seqlen: expected .*at least 1, got 0"):
        model(ids[:, :0], cu_seqlens=torch.tensor([0, 0]), max_seqlen=0)
    with pytest.raises(ValueError, match="max_seqlen: expected None without cu_seqlens"):
        model(ids, max_seqlen=3)


def test_packing_excludes_masks_caches_and_batches(tiny, token_ids):
    model, ids = tiny(), token_ids(2, 6)
    bounds = torch.tensor([0, 2, 6])
    with pytest.raises(ValueError, match=r"cu_seqlens.*B = 2"):
        model(ids, cu_seqlens=bounds)
    with pytest.raises(ValueError, match="B = 1 and cache"):
        model(ids[:1], cu_seqlens=bounds, use_cache=True)
    with pytest.raises(ValueError, match="B = 1 and attention_mask, position_ids"):
        model(ids[:1], cu_seqlens=bounds, attention_mask=bounds, position_ids=bounds)
    with pytest.raises(ValueError, match="never decrease"):
        model(ids[:1], cu_seqlens=torch.tensor([0, 4, 2, 6]))


def test_the_call_refuses_what_it_cannot_honour(tiny, token_ids):
    model, ids = tiny(), token_ids(1, 6)
    with pytest.raises(ValueError, match="output_attentions"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match="logits_to_keep"):
        model(ids, labels=ids, logits_to_keep=2)
    with pytest.raises(ValueError, match="input_ids"):
        model()
    with pytest.raises(ValueError, match=r"attention_mask: expected shape.*\[1, 6\].*\[1, 4\]"):
        model(ids, attention_mask=torch.ones(1, 4))
    with pytest.raises(ValueError, match=r"past_key_values: expected a gsa\.model\.GSACache"):
        from transformers import DynamicCache

        model(ids, past_key_values=DynamicCache())


def test_logits_to_keep_hidden_states_and_tuples(tiny, token_ids):
    model, ids = tiny(), token_ids(2, 6)
    with torch.no_grad():
        full = model(ids, output_hidden_states=True)
        assert torch.equal(model(ids, logits_to_keep=2).logits, full.logits[:, -2:])
        chosen = torch.tensor([1, 4])
        assert torch.equal(model(ids, logits_to_keep=chosen).logits, full.logits[:, chosen])
        states = full.hidden_states
        assert len(states) == 3 and torch.equal(states[0], model.model.embeddings(ids))
        assert torch.equal(model.lm_head(states[-1]), full.logits)
        as_tuple = model(ids, labels=ids, return_dict=False)
        assert torch.equal(as_tuple[1], full.logits)


def test_use_cache_follows_the_config_outside_training(tiny, token_ids):
    ids = token_ids(1, 4)
    assert tiny()(ids).past_key_values.get_seq_length() == 4
    assert tiny(use_cache=False)(ids).past_key_values is None
    assert tiny().train()(ids).past_key_values is None
    assert tiny()(ids, use_cache=False).past_key_values is None


def test_autocast_keeps_gate_and_memory_in_fp32(token_ids, tiny):
    model, ids = tiny(num_kv_heads=2, qk_norm=True, rope_theta=10.0).float(), token_ids(2, 9)
    with torch.no_grad():
        plain = model(ids).logits
        with torch.autocast("cpu", torch.bfloat16):
            output = model(ids, use_cache=True)
            step = model(ids[:, :1], past_key_values=output.past_key_values)
    assert output.past_key_values.layers[0].memory.dtype == torch.float32
    assert step.logits.isfinite().all()
    assert (output.logits.float() - plain).norm() / plain.norm() < 0.05
