"""The launch table: what it takes, what it is asked, and that any row of it computes the same."""

import json
import threading

import pytest
import torch
from numerics import assert_bit_equal, check, cotangents, evaluate, make_inputs

pytest.importorskip("triton", reason="the kernels need triton: Linux, and the dev extra")

from gsa.ops import gated_slot_attention
from gsa.ops.triton import table
from gsa.ops.triton.plan import Plan, shared_memory, walk_tile
from gsa.ops.triton.table import Row

CPU = torch.device("cpu")
GOOD = Row("sm90", "expand", "bf16", 512, 64, 1, 128, 8, 3)


def plan(H=4, G=2, K=40, V=24, M=5, B=1, T=70, dtype=torch.float32):
    inputs = make_inputs(B=B, T=T, H=H, G=G, K=K, V=V, M=M, dtype=dtype)
    return Plan(**inputs, write=None, cu_seqlens=None)


def rows(p, block, warps=4, stages=1):
    """A row for every key that a call asks for."""
    arch, dtype = table.architecture(p.q.device), table.DTYPES[p.q.dtype]
    return [
        Row(arch, kernel, dtype, width, p.recipe.slots, p.H // p.G, block, warps, stages)
        for kernel in table.KERNELS
        for width in {p.K, p.V}
    ]


def test_the_committed_table_is_sound_and_knows_no_batch():
    found = table.read(table.PATH)
    assert table.text(found) == table.PATH.read_text()
    assert Row._fields[:6] == ("arch", "kernel", "dtype", "width", "slots", "heads")
    assert all(row.arch.startswith("sm") for row in found)


def test_a_row_is_found_by_its_whole_key():
    row = GOOD._replace(arch="cpu")
    key = {"device": CPU, "kernel": "expand", "dtype": torch.bfloat16, "width": 512, "slots": 64}
    key |= {"heads": 1}
    with table.using([row]):
        assert table.find(**key) == (128, 8, 3)
        for name, other in (
            ("kernel", "scan"),
            ("dtype", torch.float16),
            ("width", 511),
            ("slots", 32),
            ("heads", 2),
        ):
            assert table.find(**{**key, name: other}) is None, name
        assert table.find(**{**key, "dtype": torch.float64}) is None
    with table.using([GOOD]):
        assert table.find(**key) is None, "a row of another architecture"


def test_architectures(monkeypatch):
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert table.architecture(cuda) == "sm90"
    monkeypatch.setattr(torch.version, "cuda", None)  # ROCm's (9, 0) is not NVIDIA's
    with table.using([GOOD]):
        assert table.architecture(cuda) == "cuda"
        assert table.find(cuda, "expand", torch.bfloat16, 512, 64, 1) is None


def test_using_ends_with_its_block_and_reaches_other_threads():
    def find():
        return table.find(CPU, "expand", torch.bfloat16, 512, 64, 1)

    row = GOOD._replace(arch="cpu")
    other = row._replace(block=32)
    assert find() is None
    with pytest.raises(RuntimeError), table.using([row]):
        with table.using([other]):
            assert find() == (32, 8, 3)
            seen = []
            thread = threading.Thread(target=lambda: seen.append(find()))
            thread.start()
            thread.join()
            assert seen == [(32, 8, 3)]
        with table.using([]):
            assert find() is None
        assert find() == (128, 8, 3)
        raise RuntimeError
    assert find() is None


@pytest.mark.usefixtures("kernels")
def test_the_plan_takes_a_row_else_the_formula():
    p = plan()
    formula = {
        (kernel, width): walk_tile(kernel, width, p.M, 2, torch.float32, shared_memory(p.q.device))
        for kernel in table.KERNELS
        for width in (p.K, p.V)
    }
    with table.using([]):
        tile_of = plan().recipe.tile
        assert all(tile_of(*key) == tile for key, tile in formula.items())
    row = next(row for row in rows(p, 16, 8, 2) if row[1:4] == ("expand", "fp32", 40))
    with table.using([row]):
        for key, tile in formula.items():
            assert plan().recipe.tile(*key) == ((16, 8, 2) if key == ("expand", 40) else tile)
        for same in (plan(B=3, T=9), plan(H=2, G=1), plan(M=16)):
            assert same.recipe.tile("expand", 40) == (16, 8, 2), (
                "batch, length, heads of equal share"
            )
        for other in (plan(M=17), plan(H=2, G=2), plan(K=41)):
            assert other.recipe.tile("expand", other.K) != (16, 8, 2)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("block", [16, 64])
def test_any_tile_computes_the_operator(block):
    inputs = make_inputs(B=2, T=70, H=2, G=1, K=40, V=40, M=5, write=True, memory=2)
    d = cotangents(inputs)
    with table.using(rows(plan(H=2, G=1, V=40), block)):
        both = check("triton", inputs, d)
        one = {name: x[1:] for name, x in inputs.items()}
        alone = evaluate(gated_slot_attention, one, tuple(x[1:] for x in d), impl="triton")
        assert_bit_equal(alone, {name: x[1:] for name, x in both.items()})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"arch": "h100"}, "arch: expected sm and a compute capability, got 'h100'"),
        ({"kernel": "step"}, "kernel: expected one of contract, expand"),
        ({"dtype": "fp64"}, "dtype: expected one of bf16"),
        ({"width": 0}, "width: expected a whole number above 0, got 0"),
        ({"heads": 1.0}, "heads: expected a whole number above 0, got 1.0"),
        ({"slots": 40}, "slots: expected a power of two from 16 on, got 40"),
        ({"block": 48}, "block: expected a power of two from 16 on, got 48"),
        ({"block": 8}, "block: expected a power of two from 16 on, got 8"),
        ({"width": 40, "block": 128}, "block: expected at most 64"),
        ({"slots": 512}, "block: expected at most 64"),
        ({"warps": 2}, "warps: expected 4 or 8, got 2"),
        ({"stages": 6}, "stages: expected 1 to 5, got 6"),
        ({"batch": 8}, "expected an object of arch, kernel"),
    ],
)
def test_a_bad_row_is_named(change, words, tmp_path):
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"rows": [GOOD._asdict(), {**GOOD._asdict(), **change}]}))
    with pytest.raises(ValueError) as caught:
        table.read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: row 2, {{") and words in message


def test_what_is_no_table_is_refused(tmp_path):
    path = tmp_path / "table.json"
    for text, words in (
        ("{", "expected JSON"),
        ("[]", "expected a launch table"),
        ('{"rows": 3}', "expected a launch table"),
        (table.text([GOOD, GOOD._replace(block=32)]), "row 2, .*expected one row of a key"),
        ('{"rows": ["sm90"]}', 'row 1, "sm90": expected an object'),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            table.read(path)


def test_tables_are_written_sorted_and_read_back(tmp_path):
    path = tmp_path / "table.json"
    made = [GOOD, GOOD._replace(width=64, block=64), GOOD._replace(kernel="contract")]
    path.write_text(table.text(made))
    assert table.read(path) == tuple(sorted(made))
    assert len(path.read_text().splitlines()) == 5
    path.write_text(table.text([]))
    assert table.read(path) == ()
