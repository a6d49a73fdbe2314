"""Once, on an H100: PYTHONPATH=$PWD python /tmp/skinny_block_bench.py [--skip-decode] [--seconds 480] [--out DIR]
Checks SkinnyBlock against the eager block at 1.3B, times it per kernel and per block, tries other tiles,
then `gsa bench decode` with and without it. --dry: tiny, on a CPU (TRITON_INTERPRET=1), to see that this file runs."""
import argparse, os, statistics, sys, time, traceback
from contextlib import contextmanager
ap = argparse.ArgumentParser()
ap.add_argument("--dry", action="store_true"); ap.add_argument("--skip-decode", action="store_true")
ap.add_argument("--seconds", type=float, default=540.0, help="nothing begins after it but what is under way")
ap.add_argument("--out", default=os.environ.get("OUT", "")); ap.add_argument("--rows", type=int, nargs="+", default=[64, 8])
A = ap.parse_args()
T0 = time.monotonic()
if A.dry: os.environ["TRITON_INTERPRET"] = "1"
import torch
from gsa.generation import skinny_block as sb
from gsa.generation.step import Head, StepBlock
from gsa.layers.token_layout import TokenLayout
from gsa.model import GSAConfig, GSAForCausalLM
from gsa.ops.triton import skinny_linear as sk, step
from gsa.ops.triton.thin_linear import Weights
DEV, DT = ("cpu", torch.float16) if A.dry else ("cuda", torch.bfloat16)
D, H, V, M, F, W, LAYERS = (64, 2, 32, 8, 72, 100, 2) if A.dry else (2048, 4, 512, 64, 5632, 32000, 24)

def say(*a): print(f"[{time.monotonic() - T0:5.0f} s]", *a, flush=True)
def attempt(name, f, *a):
    if time.monotonic() - T0 > A.seconds: say(name, "left out: time"); return None
    try: return f(*a)
    except Exception as e:
        say(name, "FAILED:", type(e).__name__, str(e)[:300]); traceback.print_exc(limit=-4)
        return None

def timed(f, turns=7):
    """µs of f in a graph, median of turns (each of some replays)."""
    with torch.no_grad():
        if A.dry: f(); return 1.0
        s = torch.cuda.Stream(); s.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(s): f(); f()
        torch.cuda.current_stream().wait_stream(s); torch.cuda.synchronize()
        g = torch.cuda.CUDAGraph()
        with torch.cuda.graph(g): keep = f()
        for _ in range(3): g.replay()
        torch.cuda.synchronize(); out = []
        for _ in range(turns):
            a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            a.record()
            for _ in range(5): g.replay()
            b.record(); torch.cuda.synchronize(); out.append(a.elapsed_time(b) * 200)
        del g, keep
        return statistics.median(out)

torch.manual_seed(0)
with torch.device(DEV):
    config = GSAConfig(vocab_size=W, hidden_size=D, num_hidden_layers=LAYERS, num_heads=H, num_slots=M, intermediate_size=F,
                       max_position_embeddings=4096, eos_token_id=None, pad_token_id=0)
    model = GSAForCausalLM(config).to(DT).eval().requires_grad_(False)
say(torch.cuda.get_device_name() if not A.dry else "dry", "torch", torch.__version__, "triton", __import__("triton").__version__,
    f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f}M", [*model.model.layers[0].attn.empty_state(1, 1)["memory"].shape])
LAYER = model.model.layers

# ---- 1. one block (and the head) against the eager block, bf16 and fp32 -----------------------------------------------
def err(a, b): a, b = a.double(), b.double(); return float((a - b).norm() / b.norm()), float((a - b).abs().max() / b.abs().max())
@torch.no_grad()
def check(rows):
    from copy import deepcopy
    torch.manual_seed(rows)
    x = torch.randn(rows, 1, D, device=DEV).to(DT); mem = [torch.randn(rows, H, M, 2 * V, device=DEV) for _ in range(2)]
    asleep = (torch.arange(rows, device=DEV) == 1)[:, None]; lay = TokenLayout(torch.full((rows, 1), 7, device=DEV), asleep)
    def go(blocks, head, x):
        mm = [m.clone() for m in mem]
        for b, m in zip(blocks, mm): x = b(x, lay, {"memory": m})
        return [head(x), *mm]
    if rows not in cache: cache[rows] = [sb.SkinnyBlock(b, rows) for b in LAYER[:2]]
    ours = go(cache[rows], sb.SkinnyHead(model), x)
    again = go(cache[rows], sb.SkinnyHead(model), x)
    eager = go([StepBlock(b) for b in LAYER[:2]], Head(model), x)
    wide = deepcopy(LAYER[:2]).float(); head = deepcopy(torch.nn.ModuleList([model.model.norm, model.lm_head])).float()
    truth = go([StepBlock(b) for b in wide], lambda x: head[1](head[0](x))[:, 0], x.float())
    worst = max(e / (2 * y + torch.finfo(DT).eps) for a, b, c in zip(ours, truth, eager) for e, y in zip(err(a, b), err(c, b)))
    perm = torch.randperm(rows, device=DEV); mem = [m[perm] for m in mem]; asleep = asleep[perm]; lay = TokenLayout(lay.positions, asleep)
    moved = go(cache[rows], sb.SkinnyHead(model), x[perm])
    same = all(torch.equal(a[perm], b) for a, b in zip(ours, moved)); rep = all(torch.equal(a, b) for a, b in zip(ours, again))
    say(f"check rows {rows:2d}: {'ok' if worst <= 1 and same and rep else 'WRONG'}; logits error ours {err(ours[0], truth[0])[0]:.2e} eager {err(eager[0], truth[0])[0]:.2e}; "
        f"of the budget {worst:.2f}; moved rows same bits {same}; again same bits {rep}; at rest same {torch.equal(moved[1][perm.argsort()][1], mem[0][perm.argsort()][1])}")
cache = {}
for rows in (2, 8, 16, 17, 33, 64): attempt(f"check {rows}", check, rows)
cache.clear()

# ---- 2. per kernel, per block ------------------------------------------------------------------------------------------
class Rig:
    """All layers at so many rows."""
    def __init__(self, rows):
        self.rows = rows
        self.blocks = [sb.SkinnyBlock(b, rows) for b in LAYER]; self.head = sb.SkinnyHead(model)
        self.mem = [torch.randn(rows, H, M, 2 * V, device=DEV) for _ in LAYER]
        self.arrivals = [torch.zeros(rows, H, dtype=torch.int32, device=DEV) for _ in LAYER]
        self.lay = TokenLayout(torch.full((rows, 1), 7, device=DEV), torch.zeros(rows, 1, dtype=torch.bool, device=DEV))
        self.x = torch.randn(rows, 1, D, device=DEV).to(DT)
    def all(self, head=True):
        x = self.x
        for b, m in zip(self.blocks, self.mem): x = b(x, self.lay, {"memory": m})
        return self.head(x) if head else x
    def together(self, on):
        for b, a in zip(self.blocks, self.arrivals): b.arrivals = a if on else None

@contextmanager
def patched(obj, **kw):
    old = {n: getattr(obj, n) for n in kw}
    for n, v in kw.items(): setattr(obj, n, v)
    try: yield
    finally:
        for n, v in old.items(): setattr(obj, n, v)

def each(r, f): return timed(lambda: [f(i) for i in range(LAYERS)]) / LAYERS
@torch.no_grad()
def kernels(r):
    rows, B = r.rows, r.blocks
    h = r.x[:, 0].contiguous(); hf = torch.randn(rows, F, device=DEV).to(DT); hv = torch.randn(rows, H * V, device=DEV).to(DT)
    parts = sk.skinny_parts(hv, LAYER[0].attn.o_proj.weight); norm = sb.norm_of(B[0].attn_norm)
    made = sk.skinny_inputs(h, Weights(B[0].inputs, None), B[0].counts, r.lay.pads, 8.0)
    tok = tuple(y[:, None].unflatten(-1, (H, -1)) for y in made)
    advance = lambda i, on: step.launch((*tok, None), r.mem[i], r.mem[i], None, 1.0, "softmax", True, r.arrivals[i] if on else None)
    todo = {
        "rows, residual + parts + norm": (0, lambda i: sk.skinny_rows(h, parts, norm)),
        "rows, slots' swish + norm": (0, lambda i: sk.skinny_rows(hv, None, norm, swish=True)),
        "q,k,v,gate": (B[0].inputs.numel() * 2, lambda i: sk.skinny_inputs(h, Weights(B[i].inputs, None), B[i].counts, r.lay.pads, 8.0)),
        "memory, two kernels": (2 * r.mem[0].numel() * 4, lambda i: advance(i, False)),
        "memory, one kernel": (2 * r.mem[0].numel() * 4, lambda i: advance(i, True)),
        "o": (LAYER[0].attn.o_proj.weight.numel() * 2, lambda i: sk.skinny_parts(hv, LAYER[i].attn.o_proj.weight)),
        "gate+up": (4 * D * F, lambda i: sk.skinny_gate_up(h, LAYER[i].mlp.gate_proj.weight, LAYER[i].mlp.up_proj.weight)),
        "down": (2 * D * F, lambda i: sk.skinny_parts(hf, LAYER[i].mlp.down_proj.weight)),
    }
    for name, (size, f) in todo.items():
        us = attempt(name, each, r, f)
        if us: say(f"rows {rows:2d} {name:32s} {us:7.2f} us {size / us / 1e3:7.0f} GB/s")
    us = attempt("head", timed, lambda: r.head(r.x))
    if us: say(f"rows {rows:2d} {'head with its norm':32s} {us:7.2f} us {W * D * 2 / us / 1e3:7.0f} GB/s")

@torch.no_grad()
def blocks(r):
    whole = attempt("blocks", timed, lambda: r.all(False))
    if not whole: return
    say(f"rows {r.rows:2d} {'a block, of ' + str(LAYERS):32s} {whole / LAYERS:7.2f} us   all {whole / 1e3:.3f} ms, with head {(attempt('all', timed, r.all) or 0) / 1e3:.3f} ms")
    # what each costs where it stands: the chain without it (its results are those of an earlier call)
    def without(obj, name, pick=lambda *a, **k: True):
        f, kept = getattr(obj, name), {}
        def g(*a, **k):
            if not pick(*a, **k): return f(*a, **k)
            key = tuple(x.shape for x in a if torch.is_tensor(x))
            if key not in kept: kept[key] = f(*a, **k)
            return kept[key]
        r.all(False)
        with patched(obj, **{name: g}):
            r.all(False); us = timed(lambda: r.all(False))
        return (whole - us) / LAYERS
    for name, args in {
        "rows, residual + parts + norm x2": (sk, "skinny_rows", lambda *a, **k: a[1] is not None),
        "rows, slots": (sk, "skinny_rows", lambda *a, **k: k.get("swish", False)),
        "q,k,v,gate": (sk, "skinny_inputs"), "memory": (step, "launch"), "gate+up": (sk, "skinny_gate_up"),
        "o": (sk, "skinny_parts", lambda x, w, **k: not k and w.shape[1] == H * V), "down": (sk, "skinny_parts", lambda x, w, **k: not k and w.shape[1] == F),
    }.items():
        us = attempt("without " + name, without, *args)
        if us is not None: say(f"rows {r.rows:2d}   costs there: {name:32s} {us:7.2f} us")

@torch.no_grad()
def tiles(r):
    """The blocks with other tiles: the change is of a whole block, where it stands."""
    base = attempt("blocks", timed, lambda: r.all(False))
    if not base: return
    plain, plain_split = sk.skinny_tile, sk.skinny_split
    def change(**kw): return lambda L, N, weights=1: (lambda t: t._replace(**{k: (v(t) if callable(v) else v) for k, v in kw.items()}))(plain(L, N, weights))
    def of(which, **kw):
        c = change(**kw)
        return lambda L, N, weights=1: c(L, N, weights) if which(N, weights) else plain(L, N, weights)
    fits = lambda most, st: (lambda t: max(2, min(8, most * 1024 // (2 * st * (t.block + t.rows)))))
    cases = {
        "nothing asked for ahead": dict(skinny_tile=change(ahead=8)),
        "half as much ahead": dict(skinny_tile=change(ahead=lambda t: t.ahead // 2)),
        "twice as much ahead": dict(skinny_tile=change(ahead=lambda t: t.ahead * 2)),
        "step 64": dict(skinny_tile=change(step=64, stages=8)),
        "half the stages": dict(skinny_tile=change(stages=lambda t: max(2, t.stages // 2))),
        "half the stages, not gate+up": dict(skinny_tile=of(lambda N, w: w == 1, stages=lambda t: max(2, t.stages // 2))),
        "step 64, 6 stages, not gate+up": dict(skinny_tile=of(lambda N, w: w == 1, step=64, stages=6)),
        "split 1": dict(skinny_split=lambda N, D: 1),
        "split 4": dict(skinny_split=lambda N, D: 4),
        "split 4, step 64, 6 stages": dict(skinny_split=lambda N, D: 4, skinny_tile=of(lambda N, w: N == D_, step=64, stages=6)),
        "8 warps": dict(WARPS=8),
    }
    D_ = D
    for name, kw in cases.items():
        def run(kw=kw):
            with patched(sk, **kw): return timed(lambda: r.all(False))
        us = attempt(name, run)
        if us: say(f"rows {r.rows:2d}   {name:34s} {us / LAYERS:7.2f} us a block, {(us - base) / LAYERS:+6.2f}")
    for on in (True, False):
        r.together(on); us = attempt("memory", timed, lambda: r.all(False))
        if us: say(f"rows {r.rows:2d}   memory in {'one kernel' if on else 'two kernels':24s} {us / LAYERS:7.2f} us a block, {(us - base) / LAYERS:+6.2f}")
    r.together(r.rows <= sb.TOGETHER)

for rows in A.rows:
    r = attempt(f"rig {rows}", Rig, rows)
    if r is None: continue
    attempt("kernels", kernels, r); attempt("blocks", blocks, r); attempt("tiles", tiles, r)
    del r
    if not A.dry: torch.cuda.empty_cache()
del model, LAYER
if not A.dry: torch.cuda.empty_cache()

# ---- 3. gsa bench decode, with and without --------------------------------------------------------------------------
def decode(name, on):
    from gsa.benchmark.decode import BenchDecodeConfig, bench_decode
    from gsa.cli import _named_models
    import gsa.generation.decoder as dec
    left = A.seconds - (time.monotonic() - T0)
    more = dict(layers=1, vocab_size=64, size="tiny", batch_tokens=2, prefix=4, device="cpu", repeats=1) if A.dry else dict(batch_tokens=128, repeats=3)
    config = BenchDecodeConfig(arch=("gsa",), lengths=(0,), batches=tuple(A.rows[::-1]) if not A.dry else (2,), prefills=(0,), budget_seconds=max(left, 5.0),
                               out=os.path.join(A.out, f"decode-{name}.json") if A.out else "", **more)
    with patched(dec, takes_skinny_blocks=sb.takes_skinny_blocks if on else lambda *_: False):
        say("gsa bench decode", name); doc = bench_decode(config, *_named_models())
    return {row["case"]: row["contenders"].get("gsa", {}) for row in doc["rows"]}
if not A.skip_decode:
    table = {name: attempt(name, decode, name, name == "skinny") or {} for name in ("skinny", "compiled")}
    say("ms a step")
    for case in sorted({c for t in table.values() for c in t}):
        print(f"   {case:10s}", "   ".join(f"{n} {t[case]['ms_per_token']:.3f} ms, {t[case].get('of_floor', 0):.1%} of the limit" for n, t in table.items() if case in t))
say("done")
