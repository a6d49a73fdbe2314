"""Passes with room for sequences that are not there, and passes recorded on a GPU.

Run the second part with `pytest -m gpu tests/training/test_training_passes.py`.
"""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import VARIANTS, build_tiny

from gsa.data import Batch
from gsa.training import RunError, train
from gsa.training.distributed import Team
from gsa.training.objective import next_token
from gsa.training.passes import fits, fixed_batch, refill
from gsa.training.setup import check_team

CPU = torch.device("cpu")


def batch_of(*lengths, seed=0, longest=8):
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    ids = torch.randint(1, 40, (1, int(bounds[-1])), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[0, bounds[:-1].long()] = -100
    return Batch(ids, labels, bounds, longest)


def loss_and_gradients(model, batch):
    model.zero_grad()
    loss = next_token(model, batch)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_empty_sequences_at_the_end_change_nothing(variant):
    model = build_tiny(**VARIANTS[variant])
    batch, other = batch_of(5, 8, 1, 7), batch_of(3, 8, 8, 2, seed=1)
    fixed = fixed_batch(other, CPU)
    refill(fixed, batch)
    assert len(fixed.cu_seqlens) == 33
    assert fixed.cu_seqlens[4:].eq(21).all()
    for got, wanted in zip(
        loss_and_gradients(model, fixed), loss_and_gradients(model, batch), strict=True
    ):
        assert torch.equal(got, wanted)


def test_what_fits_where_another_batch_was():
    fixed = fixed_batch(batch_of(5, 8, 1, 7), CPU)
    assert fits(batch_of(8, 8, 5), fixed)
    assert not fits(batch_of(8, 8, 4), fixed)
    assert not fits(batch_of(*[1] * 33), fixed_batch(batch_of(8, 8, 8, 8, 1), CPU))
    assert not fits(batch_of(8, 8, 5, longest=9), fixed)
    with pytest.raises(ValueError, match="cu_seqlens"):
        refill(fixed, batch_of(8, 8, 5)._replace(cu_seqlens=torch.tensor([0, 9, 8, 21])))


def test_what_cannot_be_recorded_is_refused(make_config):
    with pytest.raises(ValueError, match="cuda_graph: expected false on device cpu"):
        make_config(cuda_graph=True)
    config = make_config(cuda_graph=True, device="cuda")
    check_team(config, Team())
    with pytest.raises(ValueError, match="cuda_graph: expected false with 2 processes"):
        check_team(config, Team(world=2, mesh=object()))  # pyright: ignore[reportArgumentType]


class Settings:
    """One small run on a GPU, in a folder for each way of making it."""

    def __init__(self, make_config, tmp_path, **settings):
        self.base = make_config(device="cuda", **settings)
        self.tmp_path = tmp_path

    def run(self, name, start="auto", **more):
        """(losses and norms of the steps, final weights); `memory` is that of the last step."""
        folder = self.tmp_path / name
        train(replace(self.base, out=str(folder), **more), resume=start)
        lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
        self.memory = [x["memory_gib"] for x in lines if "loss" in x][-1]
        steps = [(x["loss"], x["grad_norm"]) for x in lines if "loss" in x]
        return steps, load_file(folder / "model.safetensors")


def assert_same(one, other):
    assert one[0] == other[0]
    assert all(torch.equal(one[1][name], other[1][name]) for name in one[1])


@pytest.mark.gpu
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"accumulation": 3, "rows": 2},
        {"dtype": "bf16", "compile": True, "lean": True},
        {"dtype": "bf16", "model": {"attn": {"layers": [1], "num_heads": 2}}},
        {"dtype": "bf16", "recompute": 1, "lora": 2},
    ],
    ids=str,
)
def test_recorded_passes_give_the_bits_of_passes_as_they_come(make_config, tmp_path, settings):
    """Losses, norms and weights; also when a run goes on from a checkpoint of recorded passes."""
    runs = Settings(make_config, tmp_path, keep_checkpoints=3, **settings)
    losses, weights = runs.run("as-they-come")
    memory = runs.memory
    assert_same(runs.run("recorded", cuda_graph=True), (losses, weights))
    assert runs.memory >= memory  # that of the graph counts
    start = tmp_path / "recorded" / "checkpoints" / "step-00000005"
    assert_same(runs.run("going-on", str(start), cuda_graph=True), (losses[5:], weights))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_second_gpu_trains_as_the_first(make_config, tmp_path):
    """Recorded and as they come; nothing is made current for it by hand."""
    settings = {"dtype": "bf16", "compile": True, "lean": True, "accumulation": 2}
    runs = Settings(make_config, tmp_path, **settings)
    first = runs.run("first", device="cuda:0")
    assert_same(runs.run("second", device="cuda:1"), first)
    assert_same(runs.run("second recorded", device="cuda:1", cuda_graph=True), first)


@pytest.mark.gpu
def test_more_sequences_than_there_is_room_for(make_config, tmp_path, monkeypatch):
    """It begins anew, with more."""
    runs = Settings(make_config, tmp_path)
    wanted = runs.run("as-they-come")

    def tight(batch, device):
        ids, labels, bounds = (torch.zeros_like(x, device=device) for x in batch[:3])
        return Batch(ids, labels, bounds, batch.max_seqlen)

    monkeypatch.setattr("gsa.training.passes.fixed_batch", tight)
    monkeypatch.setattr("gsa.training.passes.WARM_UP", 1)
    assert_same(runs.run("recorded", cuda_graph=True), wanted)


@pytest.mark.gpu
def test_a_pass_that_waits_for_the_host_cannot_be_recorded(make_config, tmp_path):
    def waits(model, batch):
        loss = next_token(model, batch)
        return loss * float(loss.detach() > 0)

    config = replace(make_config(device="cuda"), cuda_graph=True)
    with pytest.raises(RunError, match="cuda_graph: this pass cannot be recorded"):
        train(config, objective=waits)
