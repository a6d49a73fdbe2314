"""The loss of next tokens without holding all logits: the plain loss, its gradients, its memory."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from gsa.model import GSAConfig, GSAForCausalLM
from gsa.model import loss as losses
from gsa.model.loss import IGNORE, linear_cross_entropy, linear_kl


def problem(N=37, D=8, W=50, dtype=torch.float64):
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=rng, dtype=torch.float64).to(dtype)
    head = torch.randn(W, D, generator=rng, dtype=torch.float64).to(dtype)
    targets = torch.randint(W, (N,), generator=rng)
    targets[::5] = IGNORE
    return hidden.requires_grad_(), head.requires_grad_(), targets


def plain(hidden, head, targets):
    return F.cross_entropy(hidden @ head.mT, targets, ignore_index=IGNORE, reduction="sum")


def results(function, hidden, head, targets):
    total = function(hidden, head, targets)
    return total.detach(), *torch.autograd.grad(total * 0.5, (hidden, head))


@pytest.mark.parametrize("tokens", [1, 10, 37, 1000])
def test_equals_the_plain_loss_in_any_chunks(tokens, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 50 * tokens)
    x = problem()
    for found, expected in zip(results(linear_cross_entropy, *x), results(plain, *x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens", [1, 10, 1000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_divergence_from_a_teacher_in_any_chunks(tokens, dtype, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 50 * tokens)
    hidden, head, targets = problem(dtype=dtype)
    teacher, teacher_head = torch.randn(37, 6, dtype=dtype), torch.randn(50, 6, dtype=dtype)
    counts = targets != IGNORE

    def ours(hidden, head, _):
        return linear_kl(hidden, head, teacher, teacher_head, counts)

    def plain(hidden, head, _):
        p, q = (teacher @ teacher_head.T).log_softmax(1), (hidden @ head.T).log_softmax(1)
        return F.kl_div(q[counts], p[counts], reduction="sum", log_target=True)

    eps = 64 * torch.finfo(dtype).eps
    found, expected = (results(f, hidden, head, targets) for f in (ours, plain))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=eps, atol=eps)
    alone = linear_kl(teacher, teacher_head, teacher, teacher_head, counts)
    assert abs(alone.item()) < 37 * eps, "none from itself"


def test_targets_that_are_all_left_out():
    hidden, head, targets = problem()
    total, d_hidden, d_head = results(
        linear_cross_entropy, hidden, head, torch.full_like(targets, IGNORE)
    )
    assert total == 0 and not d_hidden.any() and not d_head.any()


def test_gradients_by_differences(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 50 * 7)
    hidden, head, targets = problem(N=20)
    torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, targets), (hidden, head))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounds_no_more_than_the_plain_loss(dtype, monkeypatch):
    """Against fp64 on the same numbers, beside the plain loss with fp32 logits."""
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 50 * 100)
    hidden, head, targets = problem(N=1000, dtype=dtype)
    wide = (hidden.detach().double().requires_grad_(), head.detach().double().requires_grad_())
    exact = results(plain, *wide, targets)

    def of_logits(hidden, head, targets):
        logits = (hidden @ head.mT).float()
        return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")

    def errors(found):
        pairs = zip(found, exact, strict=True)
        return [((a.double() - b).norm() / b.norm()).item() for a, b in pairs]

    ours = errors(results(linear_cross_entropy, hidden, head, targets))
    theirs = errors(results(of_logits, hidden, head, targets))
    eps = torch.finfo(dtype).eps
    assert all(a <= 2 * b + eps for a, b in zip(ours, theirs, strict=True)), (ours, theirs)


def test_in_autocast_products_are_bf16_and_gradients_those_of_the_weights():
    hidden, head, targets = problem(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        total, d_hidden, d_head = results(linear_cross_entropy, hidden, head, targets)
    assert total.dtype == d_hidden.dtype == d_head.dtype == torch.float32
    rounded = results(linear_cross_entropy, hidden.bfloat16(), head.bfloat16(), targets)
    assert torch.equal(total, rounded[0])


def test_without_gradients_there_is_one_product_a_chunk(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 50 * 10)
    hidden, head, targets = problem()
    with torch.no_grad(), Products() as seen:
        linear_cross_entropy(hidden, head, targets)
    assert seen.count == 4, "37 tokens in tens"
    with Products() as seen:
        linear_cross_entropy(hidden, head, targets)
    assert seen.count == 3 * 4


class Products(TorchDispatchMode):
    """How many matrix products there were."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket is torch.ops.aten.mm
        return function(*args, **(kwargs or {}))


class Largest(TorchDispatchMode):
    """The most numbers that any tensor had."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.most = max(self.most, x.numel())
        return out


def test_the_model_gives_its_loss_without_its_logits(monkeypatch):
    torch.manual_seed(0)
    config = GSAConfig(vocab_size=400, hidden_size=16, num_hidden_layers=1, num_heads=2)
    model = GSAForCausalLM(config).double()
    tokens = torch.randint(400, (2, 100))
    labels = tokens.clone()
    labels[0, 3:9] = IGNORE

    def run(**options):
        output = model(input_ids=tokens, labels=labels, **options)
        return output, torch.autograd.grad(output.loss, list(model.parameters()))

    expected, gradients = run()
    few, _ = run(loss_only=True)
    assert few.logits is not None, "so few logits are no matter"
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 400 * 20)
    monkeypatch.setattr("gsa.model.modeling.CHUNK_LOGITS", 400 * 20)
    with Largest() as seen:
        output, found = run(loss_only=True)
    assert output.logits is None and seen.most < 400 * 200
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-12, atol=0)
    for a, b in zip(found, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)
    divided, _ = run(loss_only=True, num_items_in_batch=7)
    targets = int((labels[:, 1:] != IGNORE).sum())
    torch.testing.assert_close(divided.loss * 7, expected.loss * targets, rtol=1e-12, atol=0)
