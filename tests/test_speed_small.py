"Small maps: how many operations a call takes, and that the quick ways through them are exact."
import copy
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from attnpool import chunks, functional
from attnpool.chunks import centred, clear_scratch, dots, is_near, mean_square, read_chunk, with_mean
from attnpool.fold import gather, gather_own, gather_own_plain, gather_plain
from attnpool.forms import form
from attnpool.heads import HEADS
from attnpool.pooling.attention import AttentionPool2d

VIEWS = {"promote_types", "view", "_unsafe_view", "expand", "slice", "select", "t", "transpose", "unsqueeze", "squeeze", "detach", "alias",
         "as_strided", "permute", "split", "unbind"}
SIZES = [(256, 5, 5), (256, 8, 8), (512, 7, 7)]


class Counted(TorchDispatchMode):
    "Operations that compute or copy, by name."
    def __init__(self):
        super().__init__()
        self.ops = Counter()
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in VIEWS: self.ops[name] += 1
        return func(*args, **(kwargs or {}))


def counted(call):
    call()   # scratch memory is there from now on
    with Counted() as count: call()
    return count.ops


def layer_and_map(shape, b=32, fmt=torch.contiguous_format, **options):
    c = shape[0]
    attn, query = AttentionPool2d(c, **options), nn.Parameter(torch.randn(1, c) * .02)
    return attn, torch.randn(b, *shape).relu().contiguous(memory_format=fmt), query


@pytest.mark.parametrize("fmt", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", SIZES)
def test_speed_of_small_maps_by_the_number_of_operations(shape, fmt):
    attn, x, query = layer_and_map(shape, fmt=fmt)
    with torch.no_grad(): ops = counted(lambda: attn(x, query))
    assert sum(ops.values()) <= 41, ops   # squares in up to eight parts, two operations each
    big = [ops[name] for name in ("bmm", "clone", "copy_", "_to_copy", "embedding_bag")]
    assert big == [2, 0, 0, 0, 0], ops   # scores and mean in one product, the sum in another; no copy of anything
    inputs = [x.requires_grad_(), query, *attn.parameters()]
    ops = counted(lambda: torch.autograd.grad(attn(x, query).sum(), inputs))
    assert sum(ops.values()) <= 90, ops
    assert [ops[name] for name in ("bmm", "clone", "copy_", "_to_copy")] == [5, 0, 0, 0], ops


def test_speed_of_several_chunks_needs_no_more_operations_for_each(monkeypatch):
    attn, x, query = layer_and_map((512, 7, 7))
    with torch.no_grad(): one = sum(counted(lambda: attn(x, query)).values())
    monkeypatch.setattr(chunks, "CHUNK", x.nbytes // 4)
    clear_scratch()
    with torch.no_grad(): four = sum(counted(lambda: attn(x, query)).values())
    assert one < four <= one + 3 * 16 + 8


@pytest.mark.parametrize("fmt", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("offset", [0., 100.])
def test_small_maps_in_float32_against_the_plain_form_in_float64(shape, fmt, offset):
    attn, x, query = layer_and_map(shape, b=8, fmt=fmt, init_std=shape[0]**-.5)
    nn.init.normal_(attn.norm.weight, 1, .1), nn.init.normal_(attn.norm.bias, 0, .1), nn.init.normal_(query)
    x = x + offset
    def run(name, dtype):
        layer, leaves = copy.deepcopy(attn).to(dtype), [t.detach().to(dtype).requires_grad_() for t in (x, query)]
        with form(name): out, mean = layer(*leaves, return_mean=True)
        g = torch.linspace(-1, 1, out.numel(), dtype=dtype).view_as(out)
        return [out, mean, *torch.autograd.grad((out, mean), [*leaves, *layer.parameters()], (g, g))]
    exact, plain, ours = run("plain", torch.float64), run("plain", torch.float32), run("folded", torch.float32)
    assert ours[2].stride() == x.stride()
    for name, e, p, o in zip(("out", "mean", "x", "query", *dict(attn.named_parameters())), exact, plain, ours):
        if name == "k.bias": assert not o.any()   # exactly zero, where the plain form has what rounding leaves
        else: assert (o - e).abs().max() <= max(6 * (p - e).abs().max(), 2e-6 * e.abs().max()), name


@pytest.mark.parametrize("layout", ["positions last", "channels last"])
def test_speed_the_products_of_a_chunk_are_those_of_the_map(layout):
    x, rows, own = torch.randn(5, 12, 7, dtype=torch.float64), torch.randn(3, 12, dtype=torch.float64), torch.randn(5, 3, 12, dtype=torch.float64)
    m = x if layout == "positions last" else x.mT.contiguous().mT
    torch.testing.assert_close(dots(rows, m), rows @ x)
    torch.testing.assert_close(dots(own, m), own @ x)
    torch.testing.assert_close(mean_square(m), x.square().mean(1, keepdim=True))
    torch.testing.assert_close(dots(with_mean(rows), m)[:, :1], x.mean(1, keepdim=True))
    torch.testing.assert_close(centred(rows), rows - rows.mean(-1, keepdim=True))


def test_near_is_asked_of_every_position():
    x = torch.randn(2, 256, 9) + 2.
    mu, square = x.mean(1, keepdim=True), x.square().mean(1, keepdim=True)
    assert is_near(mu, square)
    for bad in (20., float("nan"), float("inf")):
        y = x.clone()
        y[1, :, 4] += bad
        assert not is_near(y.mean(1, keepdim=True), y.square().mean(1, keepdim=True))
    found = read_chunk(x, with_mean(torch.zeros(1, 256)), True, 0.)
    assert not found.far and (found.r**-2 / x.var(1, correction=0, keepdim=True) - 1).abs().max() <= 1e-5


@pytest.mark.parametrize("fmt", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("f", ["gather", "gather_own", "gather_own_v"])
def test_chunks_near_and_far_side_by_side(f, fmt, monkeypatch):
    "Some pictures lose their mean before they are read, others do not; going back, each is read as it was."
    monkeypatch.setattr(chunks, "SMALL", 0)
    monkeypatch.setattr(chunks, "CHUNK", 2 * 4 * 16 * 12)   # two pictures at a time
    x = torch.randn(7, 16, 3, 4, dtype=torch.float64)
    x[2:4] += 300.
    x[6] -= 50.
    x = x.contiguous(memory_format=fmt)
    u, v = torch.randn(2, 16, dtype=torch.float64), torch.randn(2, 16, dtype=torch.float64)
    ways = dict(gather=lambda x, u, ours: (gather if ours else gather_plain)(x, u, centre=True, eps=1e-5).z,
                gather_own=lambda x, u, ours: (gather_own if ours else gather_own_plain)(x, u, None, .3),
                gather_own_v=lambda x, u, ours: (gather_own if ours else gather_own_plain)(x, u, v))
    found = []
    for ours in (True, False):
        X, U = x.clone(memory_format=torch.preserve_format).requires_grad_(), u.clone().requires_grad_()
        out = ways[f](X.flatten(2), U, ours)
        found.append([out.detach(), *torch.autograd.grad(out, (X, U), out.detach().sin())])
    for a, b in zip(*found): assert (a - b).abs().max() <= 1e-10 * b.abs().max()


def test_forward_with_and_without_gradients_agree():
    "Without gradients plain operations are quicker up to larger maps."
    attn, x, query = layer_and_map((64, 7, 7), b=16)
    with torch.no_grad(): without = attn(x, query)
    torch.testing.assert_close(attn(x, query), without, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["slim", "concat", "avgstart"])
def test_heads_on_small_maps_checkpointed_hooked_and_twice(name):
    head, x = HEADS[name](256, 3).double(), torch.randn(4, 256, 5, 5, dtype=torch.float64, requires_grad=True)
    for p in head.parameters(): nn.init.normal_(p, std=.05)
    exact = torch.autograd.grad(head(x).square().sum(), [x, *head.parameters()])
    saved = torch.autograd.grad(checkpoint(head, x, use_reentrant=False).square().sum(), [x, *head.parameters()])
    assert all(map(torch.equal, exact, saved))
    dx = torch.randn_like(x)
    g, = torch.autograd.grad(head(x).square().sum(), x, create_graph=True)
    second, = torch.autograd.grad((g * dx).sum(), x)
    h = 1e-5
    ahead, back = (torch.autograd.grad(head(x + s * dx).square().sum(), x)[0] for s in (h, -h))
    assert (second - (ahead - back) / (2 * h)).abs().max() <= 1e-6 * second.abs().max()
    if name == "avgstart": return
    seen = []
    head[0].attn.k.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    hooked = torch.autograd.grad(head(x).square().sum(), [x, *head.parameters()])
    assert seen == [(4, 25, 256)]
    assert all((a - b).abs().max() <= 1e-9 * max(t.abs().max() for t in exact) for a, b in zip(hooked, exact))


def test_a_bias_of_the_keys_gets_a_gradient_of_zero():
    attn, x, query = layer_and_map((64, 7, 7), b=32)
    attn(x, query).sum().backward()
    assert attn.k.bias.grad is not None and not attn.k.bias.grad.any()
    frozen = attn.requires_grad_(False)(x, query)
    assert torch.autograd.grad(frozen.sum(), query)[0].shape == query.shape


NORMS = dict(layer=nn.LayerNorm, unbiased=lambda c: nn.LayerNorm(c, bias=False), bare=lambda c: nn.LayerNorm(c, elementwise_affine=False), rms=nn.RMSNorm)


def whole(b=32, shape=(64, 7, 7), queries=1, dtype=torch.float64, fmt=torch.contiguous_format, **options):
    "A layer with weights that matter, a map, a query; all of them want gradients."
    attn, x, _ = layer_and_map(shape, b, fmt, **options)
    for p in attn.parameters(): nn.init.normal_(p, std=shape[0]**-.5)
    return attn.to(dtype), x.to(dtype).requires_grad_(), torch.randn(queries, shape[0], dtype=dtype).requires_grad_()


@pytest.mark.parametrize("fmt", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("queries, options", [(1, {}), (3, {}), (1, dict(bias=False)), (2, dict(scale=.3)), *[(2, dict(norm=n)) for n in NORMS.values()]])
@pytest.mark.parametrize("offset", [0., 300.])
def test_small_maps_in_float64_with_every_norm_scale_and_gradient(queries, options, fmt, offset):
    attn, x, query = whole(queries=queries, fmt=fmt, **options)
    x = (x.detach() + offset).requires_grad_()
    leaves = [x, query, *attn.parameters()]
    def run(name):
        with form(name): out, mean = attn(x, query, return_mean=True)
        g = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        return [out.detach(), mean.detach(), *torch.autograd.grad((out, mean), leaves, (g, mean.detach().cos()))]
    found, exact = run("folded"), run("plain")
    largest = max(e.abs().max() for e in exact[2:])
    for i, (a, e) in enumerate(zip(found, exact)): assert (a - e).abs().max() <= 1e-10 * (largest if i > 1 else e.abs().max()), i


@pytest.mark.parametrize("wanted", ["x", "query", "norm", "q k", "v", "proj", "x proj"])
def test_small_maps_gradients_of_what_is_not_frozen_alone(wanted):
    attn, x, query = whole()
    every = dict(x=x, query=query, **dict(attn.named_parameters()))
    its = {n: t for n, t in every.items() if n.split(".")[0] in wanted.split()}
    for n, t in every.items(): t.requires_grad_(n in its)
    found = torch.autograd.grad(attn(x, query).square().sum(), list(its.values()))
    with form("plain"): exact = torch.autograd.grad(attn(x, query).square().sum(), list(its.values()))
    largest = max(e.abs().max() for e in exact)
    assert all((a - e).abs().max() <= 1e-10 * largest for a, e in zip(found, exact))
    if "x" in its: return
    ops = counted(lambda: torch.autograd.grad(attn(x, query).sum(), list(its.values())))
    assert not ops["empty_like"], ops   # no gradient of the map


def test_small_maps_second_and_batched_derivatives_of_the_layer(monkeypatch):
    monkeypatch.setattr(chunks, "SMALL", 0)
    monkeypatch.setattr(functional, "FEW", -1)
    attn, x, query = whole(2, (4, 2, 2), queries=2, scale=.7)
    names, leaves = zip(*attn.named_parameters())
    def f(x, query, *ws): return torch.func.functional_call(attn, dict(zip(names, ws)), (x, query, True))
    assert torch.autograd.gradcheck(f, (x, query, *leaves))
    assert torch.autograd.gradgradcheck(f, (x, query, *leaves))
    out, _ = f(x, query, *leaves)
    basis = torch.eye(out.numel(), dtype=out.dtype).view(-1, *out.shape)
    rows = torch.autograd.grad(out, (x, query, *leaves), basis, is_grads_batched=True, retain_graph=True)
    for i in (0, 5, -1):
        one = torch.autograd.grad(out, (x, query, *leaves), basis[i], retain_graph=True)
        assert all((r[i] - o).abs().max() <= 1e-12 for r, o in zip(rows, one))


def test_small_maps_see_weights_that_changed_behind_the_version_counter():
    "fastai's optimizers write to `.data`: whoever kept something of the weights would not notice."
    attn, x, query = whole()
    attn.eval()
    with torch.no_grad():
        before = attn(x, query)
        for p in (query, *attn.parameters()): p.data.mul_(1.1)
        with form("plain"): exact = attn(x, query)
        after = attn(x, query)
    assert (after - exact).abs().max() <= 1e-12 * exact.abs().max() and (after - before).abs().max() >= 1e-3


def test_small_maps_of_a_subclass_checkpointed_and_as_functions_of_their_weights():
    class Map(torch.Tensor): pass
    attn, x, query = whole()
    exact = attn(x, query)
    assert type(out := attn(x.detach().as_subclass(Map), query)) is torch.Tensor and torch.equal(out, exact)
    params = {n: p.detach() for n, p in attn.named_parameters()}
    def loss(params): return torch.func.functional_call(attn, params, (x, query)).square().sum()
    ours, functions = torch.autograd.grad(exact.square().sum(), list(attn.parameters()), retain_graph=True), torch.func.grad(loss)(params)
    assert all((a - functions[n]).abs().max() <= 1e-10 * max(t.abs().max() for t in ours) for a, n in zip(ours, params))
    saved = checkpoint(lambda x: attn(x, query), x, use_reentrant=False)
    assert all(map(torch.equal, torch.autograd.grad(saved.square().sum(), list(attn.parameters())), ours))
