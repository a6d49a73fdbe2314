"""What only a GPU shows: the captured and the compiled step, and that nothing waits for a host."""

from copy import deepcopy

import pytest
import torch
from numerics import assert_bit_equal, assert_within_budget
from tiny_models import SLOTS, VARIANTS, build_tiny

from gsa.generation import Decoder, ModelState, Sampling
from gsa.generation.step import Head, StepBlock
from gsa.layers.token_layout import TokenLayout

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]
GREEDY = Sampling(greedy=True, max_new_tokens=20)
CHOICES = [
    GREEDY, Sampling(seed=3, max_new_tokens=20), Sampling(seed=4, top_k=5, max_new_tokens=9),
    Sampling(greedy=True, repetition_penalty=2.0, max_new_tokens=15),
    Sampling(seed=5, top_p=0.7, max_new_tokens=20), Sampling(seed=6, max_new_tokens=1),
]  # fmt: skip


def on_gpu(dtype=torch.float32, **variant):
    return build_tiny(**variant).to(dtype).cuda()


def wide(dtype=torch.bfloat16, **form):
    """Of sizes for which kernels take their fast paths."""
    sizes = dict(hidden_size=256, num_heads=2, num_slots=64, intermediate_size=512, vocab_size=1000)
    return on_gpu(dtype, **(sizes | form))


def test_greedy_is_transformers_generate(prompts):
    for name, variant in (VARIANTS | {"slots": SLOTS}).items():
        model = on_gpu(**variant)
        decoder = Decoder(model)
        assert decoder.is_thin == (name in ("paper", "slots"))
        for prompt in prompts(3):
            ids = torch.tensor([prompt], device="cuda")
            mask = torch.ones_like(ids)
            made = model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False)
            text = list(decoder.write(decoder.prefill(prompt), GREEDY))
            assert text == made[0, len(prompt) :].tolist()


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_the_graph_writes_what_the_step_writes(prompts, compile):
    """A captured pool against the function run by hand, token by token, texts coming and going."""
    model = on_gpu(**VARIANTS["converted"])
    plain = Decoder(model, rows=3)
    plain._on_cuda, plain.lag = False, 0
    states = [plain.prefill(prompt) for prompt in prompts(6)]
    expected = plain.write_all(states, CHOICES)
    torch._dynamo.reset()
    decoder = Decoder(model, rows=3, compile=compile)
    assert decoder.write_all(states, CHOICES) == expected
    assert len(decoder._graphs) > 1


def test_a_row_is_the_same_wherever_it_stands_and_whoever_is_beside_it(prompts):
    model = wide()
    decoder = Decoder(model, rows=4)
    states = [decoder.prefill(prompt) for prompt in prompts(6)]
    there = decoder.write_all(states, CHOICES)
    back = decoder.write_all(states[::-1], CHOICES[::-1])
    assert there == back[::-1]
    assert [list(decoder.write(s, c)) for s, c in zip(states, CHOICES, strict=True)] == there


@torch.no_grad()
@pytest.mark.parametrize(
    ("rows", "form"), [(8, {}), (64, {}), (8, SLOTS | {"head_dim": 64}), (33, SLOTS)], ids=str
)
def test_a_captured_pool_is_within_the_budget_of_the_eager_step(rows, form):
    """Logits and memories after a token of each row, one at rest; fp32 is the truth."""
    model = wide(**form)
    decoder = Decoder(model, rows=rows)
    hopper = torch.cuda.get_device_capability()[0] == 9
    assert decoder.is_skinny == (hopper and form is not SLOTS)  # whose heads of 6 fill no 16 bytes
    rng = torch.Generator("cuda").manual_seed(0)
    asleep = (torch.arange(rows, device="cuda") == 3)[:, None]
    layout = TokenLayout(torch.full((rows, 1), 7, device="cuda"), asleep)
    token = model.model.embeddings(torch.arange(rows, device="cuda")[:, None]).detach()
    before = [torch.randn(pool["memory"].shape, generator=rng, device="cuda")
              for pool in decoder.pool.layers]  # fmt: skip

    def step(blocks, head, memories, x):
        for block, memory in zip(blocks, memories, strict=True):
            x = block(x, layout, {"memory": memory})
        return {"output": head(x)} | {f"memory {i}": m for i, m in enumerate(memories)}

    memories, stream = [m.clone() for m in before], torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(decoder.blocks, decoder.head, memories, token)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step(decoder.blocks, decoder.head, memories, token)
    seen = []
    for _ in range(3):
        for memory, first in zip(memories, before, strict=True):
            memory.copy_(first)
        graph.replay()
        seen.append({name: x.clone() for name, x in got.items()})
    assert_bit_equal(seen[0], seen[1])
    assert_bit_equal(seen[0], seen[2])
    assert all(torch.equal(m[3], first[3]) for m, first in zip(memories, before, strict=True))
    eager, exact = (
        step([StepBlock(b) for b in m.model.layers], Head(m), [b.clone() for b in before], x)
        for m, x in ((model, token), (deepcopy(model).float(), token.float()))
    )
    assert_within_budget(seen[0], exact, eager, torch.bfloat16, "triton")


@pytest.mark.parametrize(
    ("rows", "form"), [(2, {}), (1, SLOTS | {"head_dim": 64})], ids=["pool", "one slots"]
)
def test_the_step_never_waits_for_the_host(prompts, rows, form):
    decoder = Decoder(wide(**form), rows=rows)
    for prompt, sampling in zip(prompts(rows), CHOICES[1:], strict=False):
        decoder.start(decoder.prefill(prompt), sampling)
    needs = CHOICES[1].needs | CHOICES[2].needs
    decoder.step(needs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        decoder.step(needs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("rows", [1, 2])
def test_a_second_gpu_writes_what_the_first_does(prompts, rows):
    texts = []
    for device in ("cuda:1", "cuda:0"):
        decoder = Decoder(wide().to(device), rows=rows)
        texts.append(decoder.write_all([decoder.prefill(p) for p in prompts(4)], CHOICES[:4]))
    assert texts[0] == texts[1]


def test_rows_at_rest_stay_as_they_are_to_the_bit(prompts):
    decoder = Decoder(wide(), rows=2)
    row = decoder.start(decoder.prefill(prompts(1)[0]), CHOICES[2])
    while not decoder.idle:
        decoder.advance()
    before = decoder.take(row)
    decoder.start(decoder.prefill(prompts(2)[1]), GREEDY)
    while not decoder.idle:
        decoder.advance()
    after = decoder.take(row)
    assert all(torch.equal(after.tensors[name], t) for name, t in before.tensors.items())


def test_a_state_comes_back_from_its_file(prompts, tmp_path):
    decoder = Decoder(wide())
    state = decoder.prefill(prompts(1)[0] * 20)
    text = list(decoder.write(state, CHOICES[1]))
    state.save(tmp_path / "s.safetensors")
    assert list(decoder.write(ModelState.load(tmp_path / "s.safetensors"), CHOICES[1])) == text
    assert Decoder(wide()).fingerprint == decoder.fingerprint
    assert Decoder(wide().cpu()).fingerprint == decoder.fingerprint
