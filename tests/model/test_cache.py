"""The cache as an object: its size, rows, snapshots, forks, and going back."""

import copy

import pytest
import torch

from gsa.model import GSACache

EXACT = 1e-10


@torch.no_grad()
def read(model, ids, cache=None):
    """Reads tokens into a (new) cache; returns it and the last logits."""
    output = model(ids, past_key_values=cache, use_cache=True)
    return output.past_key_values, output.logits[:, -1]


def held(cache):
    """Bytes of storage the state keeps alive."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage() for t in cache.tensors().values()
    }
    return sum(storage.nbytes() for storage in storages.values())


def apart(a, b):
    """The largest difference between two states, which must have the same tensors."""
    left, right = a.tensors(), b.tensors()
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def test_size_does_not_depend_on_length(model, token_ids):
    sizes = []
    for tokens in (8, 64):
        cache, _ = read(model, token_ids(2, tokens))
        sizes.append(held(cache))
        for t in range(3):
            cache, _ = read(model, token_ids(2, 1, seed=t), cache)
        sizes.append(held(cache))
    has_full_attention = "full_attention" in model.config.layer_types
    assert (len(set(sizes)) > 1) == has_full_attention
    options = model.config.mixer_options(0)
    if model.config.mixer != "gsa" and model.config.attn is None:
        numbers = options.kv_heads * options.key_width * options.value_width
        numbers += options.hidden_size if model.config.mixer == "rwkv6" else 0
        if model.config.mixer == "mamba":
            numbers += (options.conv_size - 1) * options.channels
        assert sizes[0] == 2 * 2 * 8 * numbers
    elif model.config.gate == "data_dependent" and model.config.attn is None:
        numbers = options.slots * (options.key_width + options.value_width) * options.kv_heads
        tails = 3 * (options.num_heads + 2 * options.kv_heads) * options.key_width
        tails = tails if options.use_short_conv else 0
        if options.window_branch is not None:  # keys, values and a position of each token in sight
            tails = (options.window_branch - 1) * (options.kv_heads * 2 * options.key_width + 1)
        assert sizes[0] == 2 * 2 * 8 * (numbers + tails)


def test_rows_can_be_reordered_repeated_and_selected(model, token_ids):
    ids, more = token_ids(3, 8), token_ids(3, 2, seed=1)
    rows = {
        "reorder_cache": (torch.tensor([2, 0, 0]), torch.tensor([2, 0, 0])),
        "batch_select_indices": (torch.tensor([1, 2]), torch.tensor([1, 2])),
        "batch_repeat_interleave": (2, torch.tensor([0, 0, 1, 1, 2, 2])),
    }
    for method, (argument, order) in rows.items():
        cache, _ = read(model, ids)
        getattr(cache, method)(argument)
        next_ids = more[: len(order)] if len(order) <= 3 else more.repeat(2, 1)
        _, logits = read(model, next_ids, cache)
        _, expected = read(model, torch.cat([ids[order], next_ids], 1))
        assert (logits - expected).abs().max() < EXACT, method


def test_a_snapshot_stays_and_can_be_gone_back_to(model, token_ids):
    cache, _ = read(model, token_ids(2, 7))
    snapshot = cache.snapshot()
    before = {name: t.clone() for name, t in cache.tensors().items()}
    _, first = read(model, token_ids(2, 4, seed=1), cache)
    assert cache.get_seq_length() == 11
    cache.restore(snapshot)
    assert cache.get_seq_length() == 7
    assert all(torch.equal(t, before[name]) for name, t in cache.tensors().items())
    _, again = read(model, token_ids(2, 4, seed=1), cache)
    assert torch.equal(first, again)
    with pytest.raises(ValueError, match="snapshot: expected one of 1 layers, got 2"):
        GSACache(model.config.from_dict({"num_hidden_layers": 1})).restore(snapshot)


def test_forks_go_their_own_ways(model, token_ids):
    cache, _ = read(model, token_ids(1, 7))
    fork, twin = cache.fork(), copy.deepcopy(cache)
    _, one = read(model, token_ids(1, 3, seed=1), fork)
    _, other = read(model, token_ids(1, 3, seed=2), cache)
    _, twins = read(model, token_ids(1, 3, seed=1), twin)
    assert not torch.equal(one, other) and torch.equal(one, twins)
    whole = torch.cat([token_ids(1, 7), token_ids(1, 3, seed=2)], 1)
    assert (other - read(model, whole)[1]).abs().max() < EXACT


@pytest.mark.parametrize("remove", [0, 1, 4, 5, 9, 14])
def test_going_back_by_any_number_of_recorded_tokens(model, token_ids, remove):
    """Recorded: a long step, two single ones, a long one; cut inside each and before the first."""
    ids = token_ids(2, 17)
    cache, _ = read(model, ids[:, :3])
    cache.activate_past_recording()
    for start, end in [(3, 8), (8, 9), (9, 10), (10, 17)]:
        read(model, ids[:, start:end], cache)
    cache.crop(-remove)
    expected, _ = read(model, ids[:, : 17 - remove])
    assert cache.get_seq_length() == 17 - remove
    assert apart(cache, expected) < EXACT
    after, logits = read(model, ids[:, :4], cache)
    again = torch.cat([ids[:, : 17 - remove], ids[:, :4]], 1)
    assert (logits - read(model, again)[1]).abs().max() < EXACT
    after.crop(17 - remove + 1)
    assert apart(after, read(model, again[:, : 17 - remove + 1])[0]) < EXACT


def test_going_back_over_padding(model, token_ids):
    ids = token_ids(2, 10)
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, [0, 1, 5]] = 0
    mask[1, [4, 7]] = 0
    with torch.no_grad():
        cache = GSACache(model.config)
        cache.activate_past_recording()
        model(ids[:, :3], attention_mask=mask[:, :3], past_key_values=cache)
        model(ids[:, 3:], attention_mask=mask, past_key_values=cache)
        cache.crop(-4)
        expected = model(ids[:, :6], attention_mask=mask[:, :6], use_cache=True).past_key_values
        follow = [
            model(
                ids[:, 6:],
                attention_mask=mask,
                past_key_values=c,
            ).logits
            for c in (cache, expected)
        ]
    assert (follow[0] - follow[1]).abs().max() < EXACT


def test_going_back_from_the_empty_state_to_it(model, token_ids):
    cache = GSACache(model.config)
    cache.activate_past_recording()
    read(model, token_ids(1, 6), cache)
    cache.crop(-6)
    assert cache.get_seq_length() == 0 and cache.tensors() == {} and cache.batch_size == -1
    _, logits = read(model, token_ids(1, 4, seed=1), cache)
    assert torch.equal(logits, read(model, token_ids(1, 4, seed=1))[1])


def test_what_was_not_recorded_cannot_be_cut(model, token_ids):
    cache, _ = read(model, token_ids(1, 6))
    with pytest.raises(ValueError, match="tokens_to_remove: expected at most the 0 tokens"):
        cache.crop(-2)
    cache.activate_past_recording()
    read(model, token_ids(1, 3), cache)
    with pytest.raises(ValueError, match="at most the 3 tokens"):
        cache.crop(-4)
    assert cache.get_seq_length() == 9, "a refused crop must change nothing"


def test_recording_ends_with_each_crop_and_is_not_inherited_by_forks(tiny, token_ids):
    model = tiny()
    cache = GSACache(model.config)
    cache.activate_past_recording()
    read(model, token_ids(1, 40), cache)
    assert cache.layers[0].steps and not cache.fork().record_past
    cache.crop(0)
    assert cache.layers[0].steps == [] and cache.layers[0].base is None


def test_reset_forgets_everything(model, token_ids):
    cache, first = read(model, token_ids(1, 6))
    cache.reset()
    assert not cache.has_previous_state()
    assert torch.equal(read(model, token_ids(1, 6), cache)[1], first)


def test_what_transformers_asks_of_a_cache(tiny, token_ids):
    model = tiny(attn={"layers": [1], "num_heads": 2, "window_size": 3})
    cache, _ = read(model, token_ids(3, 6))
    assert cache.batch_size == 3 and cache.is_initialized and not cache.is_compileable
    assert cache.is_linear == [True, False] and cache.is_sliding == [False, True]
    assert cache.get_max_length() == -1 and len(cache) == 2
    assert model.config.layer_types == ["linear_attention", "sliding_attention"]
    assert cache.layers[0].memory.shape == (3, 4, 5, 8) and cache.layers[1].memory is None
    with pytest.raises(ValueError, match="GSA models only"):
        cache.update(torch.zeros(1), torch.zeros(1), 0)
