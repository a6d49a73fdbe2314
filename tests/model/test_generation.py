"""`generate()` with the cache gives what `generate()` without it gives, in every mode."""

import pytest
import torch

from gsa.model import GSACache

pytestmark = pytest.mark.filterwarnings("ignore")


def run(model, ids, **options):
    mask = options.pop("attention_mask", torch.ones_like(ids))
    return model.generate(ids, attention_mask=mask, max_new_tokens=10, **options)


def argmax_loop(model, ids, tokens):
    with torch.no_grad():
        for _ in range(tokens):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids


def test_greedy_equals_a_loop_of_full_forward_passes(model, token_ids):
    ids = token_ids(2, 7)
    expected = argmax_loop(model, ids, 10)
    assert torch.equal(run(model, ids, do_sample=False), expected)
    assert torch.equal(run(model, ids, do_sample=False, use_cache=False), expected)
    assert len(set(expected[:, 7:].flatten().tolist())) > 3, "a constant continuation tests nothing"


def test_sampling_with_a_seed(model, token_ids):
    ids, drawn = token_ids(3, 6), []
    for use_cache in (True, False):
        torch.manual_seed(5)
        drawn.append(run(model, ids, do_sample=True, top_k=0, use_cache=use_cache))
    assert torch.equal(*drawn)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
def test_beam_search(model, token_ids, options):
    ids = token_ids(2, 6)
    cached = run(model, ids, do_sample=False, **options)
    assert torch.equal(cached, run(model, ids, do_sample=False, use_cache=False, **options))


def test_several_samples_of_one_prompt(model, token_ids):
    ids, drawn = token_ids(1, 6), []
    for use_cache in (True, False):
        torch.manual_seed(1)
        options = {"do_sample": True, "num_return_sequences": 3, "use_cache": use_cache}
        drawn.append(run(model, ids, **options))
    assert torch.equal(*drawn) and len({tuple(row.tolist()) for row in drawn[0]}) == 3


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_left_padded_batch_equals_each_row_alone(model, token_ids, num_beams):
    short, long = token_ids(1, 4), token_ids(1, 9, seed=1)
    ids = torch.cat([torch.cat([torch.zeros_like(long[:, :5]), short], 1), long])
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    both = run(model, ids, attention_mask=mask, do_sample=False, num_beams=num_beams)
    for b, prompt in enumerate((short, long)):
        alone = run(model, prompt, do_sample=False, num_beams=num_beams)
        assert torch.equal(both[b, 9:], alone[0, prompt.shape[1] :])


@pytest.mark.parametrize("chunk", [1, 4])
def test_prefill_in_chunks(model, token_ids, chunk):
    ids = token_ids(2, 9)
    whole = run(model, ids, do_sample=False)
    assert torch.equal(run(model, ids, do_sample=False, prefill_chunk_size=chunk), whole)


def test_continuing_from_a_cache_that_has_read_the_prompt(model, token_ids):
    ids = token_ids(1, 9)
    with torch.no_grad():
        cache = model(ids[:, :6], use_cache=True).past_key_values
    whole = run(model, ids, do_sample=False)
    assert torch.equal(run(model, ids, do_sample=False, past_key_values=cache), whole)


def test_prompt_lookup(model, token_ids):
    ids = token_ids(1, 5).repeat(1, 3)
    plain = run(model, ids, do_sample=False)
    assert torch.equal(run(model, ids, do_sample=False, prompt_lookup_num_tokens=3), plain)


@pytest.mark.parametrize("kin", [True, False], ids=["accepts some", "accepts few"])
def test_assisted_decoding(variant, tiny, token_ids, kin):
    """A kindred assistant has part of its drafts accepted: the cache is cut in mid-draft."""
    model, ids = tiny(**variant), token_ids(1, 7)
    assistant = tiny(**variant) if kin else tiny(seed=1)
    if kin:
        with torch.no_grad():
            for parameter in assistant.parameters():
                parameter.add_(0.08 * parameter.std() * torch.randn_like(parameter))
    plain = run(model, ids, do_sample=False)
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(run(model, ids, do_sample=False, assistant_model=assistant), plain)
    handle.remove()
    assert not kin or len(calls) < 10, "no draft was ever accepted"


def test_decoding_reads_one_token_at_a_time_and_never_the_prompt_again(tiny, token_ids):
    model, ids = tiny(), token_ids(2, 12)
    widths = []
    handle = model.model.layers[0].attn.register_forward_pre_hook(
        lambda module, inputs: widths.append(inputs[0].shape[1])
    )
    run(model, ids, do_sample=False)
    handle.remove()
    assert widths == [12] + [1] * 9


def test_stopping_at_the_end_token_pads_the_rest(tiny, token_ids):
    model, ids = tiny(), token_ids(2, 6)
    free = run(model, ids, do_sample=False)
    end = int(free[0, 8])
    stopped = run(model, ids, do_sample=False, eos_token_id=end)
    first = (free[0, 6:] == end).nonzero()[0].item()
    assert torch.equal(stopped[0, : 7 + first], free[0, : 7 + first])
    assert (stopped[0, 7 + first :] == model.config.pad_token_id).all()


def test_other_caches_are_refused(tiny, token_ids):
    from transformers import DynamicCache

    model, ids = tiny(), token_ids(1, 4)
    with pytest.raises(ValueError, match="cache_implementation"):
        run(model, ids, cache_implementation="static")
    with pytest.raises(ValueError, match=r"expected a gsa\.model\.GSACache"):
        run(model, ids, past_key_values=DynamicCache())
    assert isinstance(
        run(model, ids, return_dict_in_generate=True).past_key_values,
        GSACache,
    )


def test_a_cache_of_other_rows_and_no_tokens_at_all_are_refused(model, token_ids):
    with pytest.raises(ValueError, match=r"at least one token a row, got shape \[2, 0\]"):
        model(token_ids(2, 0))
    cache = GSACache(model.config)
    model(token_ids(1, 4), past_key_values=cache)
    longer = torch.cat([token_ids(1, 4), token_ids(1, 1, seed=1)], 1)
    with pytest.raises(ValueError, match=r"a cache of 3 rows, .* got 1; batch_repeat"):
        run(model, longer, past_key_values=cache, num_beams=3)
    cache.batch_repeat_interleave(3)
    beams = dict(num_beams=3, do_sample=False)
    went_on = run(model, longer, past_key_values=cache, **beams)
    assert torch.equal(went_on, run(model, longer, **beams))
