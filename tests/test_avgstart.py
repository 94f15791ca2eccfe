"The pools that start as average pooling: the start itself, a literal form, gradients, mixture, bad input."
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attnpool import chunks
from attnpool.fold import gather_own
from attnpool.forms import form, forms_used
from attnpool.heads import AvgPoolHead, AvgStartAttnPoolHead, ClassQueryPoolHead, fold
from attnpool.maps.compute import find_pools
from attnpool.pooling.start import AvgStartAttnPooling2d, ClassQueryPooling2d
from attnpool.registry import BadInput

STARTS = [AvgStartAttnPoolHead, ClassQueryPoolHead]


def seeded(cls, *args, **kwargs):
    torch.manual_seed(4)
    return cls(*args, **kwargs)


def weights(pool, x):
    t = F.layer_norm(x.flatten(2).mT, (x.shape[1],))
    return (t @ pool.query.mT).softmax(1).mT   # (b, k, n)


def literal(pool, x, a):
    "A loop over queries, each on its own channels."
    step = x.shape[1] // len(pool.query)
    return torch.cat([(x.flatten(2)[:, i * step:(i + 1) * step] * a[:, None, i]).sum(-1) for i in range(len(pool.query))], 1)


@pytest.mark.parametrize("head", STARTS)
@pytest.mark.parametrize("b", [2, 40])   # below and above the size from which the work is done in chunks
def test_starts_as_average_pooling_with_its_gradients(head, b):
    ours, avg = seeded(head, 128, 10), seeded(AvgPoolHead, 128, 10)
    x = torch.randn(b, 128, 6, 5)
    outs, grads = [], []
    for h in (ours, avg):
        X = x.clone().requires_grad_()
        outs.append(h(X))
        F.cross_entropy(outs[-1], torch.arange(b) % 10).backward()
        grads.append(X.grad)
    assert (outs[0] - outs[1]).abs().max() <= 2e-6 * outs[1].abs().max()
    assert (grads[0] - grads[1]).abs().max() <= 2e-6 * grads[1].abs().max()
    linear = ours[-1] if head is AvgStartAttnPoolHead else ours[0].linear
    torch.testing.assert_close(linear.weight.grad, avg[-1].weight.grad)
    torch.testing.assert_close(linear.bias.grad, avg[-1].bias.grad)
    assert ours[0].query.grad.abs().max() > 0   # there is something to learn from the first step


def test_parameters():
    def count(m): return sum(p.numel() for p in m.parameters())
    assert count(AvgStartAttnPoolHead(256, 10)) - count(AvgPoolHead(256, 10)) == 8 * 256
    assert count(ClassQueryPoolHead(256, 10)) - count(AvgPoolHead(256, 10)) == 10 * 256


@pytest.mark.parametrize("queries", [1, 4, 16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("offset", [0., 50.])   # the second makes the quick variance unsafe
@pytest.mark.parametrize("b", [3, 90])
def test_avgstart_equals_the_loop_with_gradients(queries, layout, offset, b):
    pool = AvgStartAttnPooling2d(32, queries).double()
    nn.init.normal_(pool.query)
    x = (torch.randn(b, 32, 5, 7, dtype=torch.float64) + offset).to(memory_format=layout).requires_grad_()
    g = torch.randn(b, 32, dtype=torch.float64)
    expected = literal(pool, x, weights(pool, x))
    out = pool(x)
    assert (out - expected).abs().max() <= 1e-12 * expected.abs().max()
    for ours, theirs in zip(torch.autograd.grad(out, (x, pool.query), g), torch.autograd.grad(expected, (x, pool.query), g, retain_graph=True)):
        assert (ours - theirs).abs().max() <= 1e-10 * theirs.abs().max()
    frozen = torch.autograd.grad(pool(x.detach()), pool.query, g)[0]
    torch.testing.assert_close(frozen, torch.autograd.grad(expected, pool.query, g)[0])


def test_gradgradcheck_in_chunks(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK", 4 * 8 * 6 * 2)   # two pictures
    monkeypatch.setattr(chunks, "SMALL", 0)
    u = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    x = torch.randn(5, 8, 6, dtype=torch.float64, requires_grad=True)
    for m in (None, .3, torch.tensor([0., 1, 0, 1, 0], dtype=torch.float64).view(5, 1, 1)):
        for v in (None, torch.randn(2, 8, dtype=torch.float64, requires_grad=True)):
            def f(x, u, v=None): return gather_own(x, u, v, m, 1e-5)
            inputs = (x, u) if v is None else (x, u, v)
            assert torch.autograd.gradcheck(f, inputs) and torch.autograd.gradgradcheck(f, inputs)


@pytest.mark.parametrize("head", STARTS)
def test_forward_mode_and_forms(head):
    pool, x = seeded(head, 128, 10)[0], torch.randn(40, 128, 6, 5)   # large enough for chunks
    nn.init.normal_(pool.query, std=.1)
    exact, dx = copy.deepcopy(pool).double(), torch.randn_like(x)
    with form("plain"), forms_used() as used: out, tangent = torch.func.jvp(exact, (x.double(),), (dx.double(),))
    assert used == {"plain"} and (pool(x) - out).abs().max() <= 3e-6 * out.abs().max()
    with torch.autograd.forward_ad.dual_level():
        dual = pool(torch.autograd.forward_ad.make_dual(x, dx))
        ours = torch.autograd.forward_ad.unpack_dual(dual).tangent
    for t in (ours, torch.func.jvp(pool, (x,), (dx,))[1]): assert (t - tangent).abs().max() <= 1e-5 * tangent.abs().max()
    with forms_used() as used: pool(x)
    assert used == {"folded"}


@pytest.mark.parametrize("dtype, tol", [(torch.bfloat16, .01), (torch.float16, .002)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_half_precision_in_chunks(dtype, tol, layout):
    pool = AvgStartAttnPooling2d(64, 8).to(dtype)
    nn.init.normal_(pool.query)
    x = torch.randn(60, 64, 6, 6).to(dtype).to(memory_format=layout).requires_grad_()
    exact, X = copy.deepcopy(pool).double(), x.detach().double().requires_grad_()
    g = torch.randn(60, 64)
    (a,), (b,) = torch.autograd.grad(pool(x), x, g.to(dtype)), torch.autograd.grad(exact(X), X, g.to(dtype).double())
    assert pool(x).dtype == a.dtype == dtype
    assert (pool(x) - exact(X)).abs().max() <= tol * exact(X).abs().max() and (a - b).abs().max() <= tol * b.abs().max()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("offset", [0., 50.])
@pytest.mark.parametrize("b", [3, 150])
def test_class_query_equals_a_loop_over_classes(layout, offset, b):
    pool = ClassQueryPooling2d(24, 5).double()
    nn.init.normal_(pool.query)
    x = (torch.randn(b, 24, 4, 6, dtype=torch.float64) + offset).to(memory_format=layout).requires_grad_()
    a = weights(pool, x)
    logits = pool.linear(x.flatten(2).mT)   # (b, n, 5)
    expected = torch.stack([(a[:, k] * logits[..., k]).sum(1) for k in range(5)], 1)
    out, g = pool(x), torch.randn(b, 5, dtype=torch.float64)
    assert (out - expected).abs().max() <= 1e-12 * expected.abs().max()
    inputs = x, pool.query, pool.linear.weight, pool.linear.bias
    for ours, theirs in zip(torch.autograd.grad(out, inputs, g), torch.autograd.grad(expected, inputs, g, retain_graph=True)):
        assert (ours - theirs).abs().max() <= 1e-10 * theirs.abs().max()
    assert torch.allclose(pool.attention_map(x).flatten(2), a) and pool.attention_map(x).shape == (b, 5, 4, 6)


def test_mix_trains_on_both_and_tests_on_the_mixture():
    torch.manual_seed(0)
    pool = AvgStartAttnPooling2d(16, 4, mix=.25)
    nn.init.normal_(pool.query)
    x = torch.randn(400, 16, 3, 3)
    a, mean = weights(pool, x), x.mean((2, 3))
    attended = literal(pool, x, a)
    out = pool.train()(x)
    uniform = torch.isclose(out, mean, atol=1e-5).all(1)
    assert torch.allclose(out[~uniform], attended[~uniform], atol=1e-5)
    assert .17 <= uniform.float().mean() <= .33
    assert torch.allclose(pool.eval()(x), .25 * mean + .75 * attended, atol=1e-5)
    assert torch.allclose(pool.attention_map(x).flatten(2), .25 / 9 + .75 * a, atol=1e-6)
    assert torch.allclose(pool.attention_map(x, combined=True), pool.attention_map(x).mean(1, keepdim=True))
    assert torch.allclose(AvgStartAttnPooling2d(16, 4, mix=1).train()(x), mean, atol=1e-6)
    state = torch.get_rng_state()
    AvgStartAttnPooling2d(16, 4).train()(x)
    assert torch.equal(state, torch.get_rng_state())   # without mix no random number is drawn


@pytest.mark.parametrize("head", STARTS)
def test_found_and_folded(head):
    model = nn.Sequential(nn.Conv2d(3, 16, 3), head(16, 4)).eval()
    nn.init.normal_(model[1][0].query)
    x = torch.randn(2, 3, 8, 9)
    assert list(find_pools(model)) == ["1.0"]
    folded = fold(model)
    torch.testing.assert_close(folded(x), model(x))
    assert not any(p.requires_grad for p in folded.parameters())


@pytest.mark.parametrize("make, words", [
    (lambda: AvgStartAttnPooling2d(20), "n_queries: 8 does not divide the 20 channels. Use a divisor of 20"),
    (lambda: AvgStartAttnPoolHead(16, 2, n_queries=0), "n_queries: 0 does not divide"),
    (lambda: AvgStartAttnPooling2d(0), "ni: expected the number of channels"),
    (lambda: AvgStartAttnPooling2d(16, mix=1.5), "mix: expected a share in [0, 1], got 1.5"),
    (lambda: AvgStartAttnPooling2d(16, mix=-.1), "mix: expected a share in [0, 1], got -0.1"),
    (lambda: AvgStartAttnPooling2d(16)(torch.randn(2, 16, 4)), "x: expected a map of shape (b, c, h, w), got (2, 16, 4)"),
    (lambda: AvgStartAttnPooling2d(16)(torch.randn(2, 8, 4, 4)), "x: expected 16 channels, got 8"),
    (lambda: ClassQueryPooling2d(16, 3)(torch.randn(2, 16, 0, 4)), "has no positions to pool"),
    (lambda: ClassQueryPoolHead(16, 0), "n_out: expected at least 1 output, got 0"),
])
def test_bad_input(make, words):
    with pytest.raises(BadInput) as e: make()
    assert words in str(e.value)
