"The fold against the plain form, the plain form against torch's own attention in float64; Mish against torch's."
import subprocess
import sys
import threading
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from attnpool import chunks, fold, functional, layers
from attnpool.chunks import clear_scratch
from attnpool.fold import gather, gather_own, gather_plain
from attnpool.forms import form, form_asked_for, forms_used, is_traced
from attnpool.functional import attention_pool, attention_pool_plain, attention_scores
from attnpool.layers import Mish, mish, TokenBatchNorm
from attnpool.registry import BadInput

TOL = 1e-12
NORMS = dict(none=lambda c: None, layer=nn.LayerNorm, plain_layer=lambda c: nn.LayerNorm(c, elementwise_affine=False),
             unbiased_layer=lambda c: nn.LayerNorm(c, bias=False), rms=nn.RMSNorm, rms_eps=lambda c: nn.RMSNorm(c, eps=1e-3),
             batch=TokenBatchNorm, group=lambda c: Tokens(nn.GroupNorm(4, c)))


@pytest.fixture(autouse=True, scope="module")
def every_map_is_large():
    "These maps are small; the fold and its chunks are what is tested."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "SMALL", 0)
        patch.setattr(functional, "FEW", -(1 << 62))
        yield


class Tokens(nn.Module):
    "A norm of maps, called on (b, n, c): somebody's own, which cannot be folded."
    def __init__(self, norm):
        super().__init__()
        self.norm = norm
    def forward(self, x): return self.norm(x.transpose(1, 2)).transpose(1, 2)


def problem(b=2, c=12, h=3, w=5, queries=1, norm="layer", bias=True, dtype=torch.float64, offset=0.):
    g = torch.Generator().manual_seed(1)
    def r(*s): return torch.randn(*s, generator=g, dtype=torch.float64).to(dtype)
    def linear(): return r(c, c) / c**.5, (r(c) if bias else None)
    x, query = r(b, c, h, w) + offset, r(queries, c)
    layer = NORMS[norm](c)
    if layer is not None:
        layer = layer.to(dtype)
        for p in layer.parameters(): p.data = r(*p.shape) + 1
    return x, query, [linear() for _ in range(4)], layer


def with_gradients(f, x, query, affine, norm, **kw):
    flat = [x, query, *(t for pair in affine for t in pair)]
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in flat]
    extra = [] if norm is None else list(norm.parameters())
    out = f(leaves[0], leaves[1], *(tuple(leaves[i:i + 2]) for i in range(2, 10, 2)), norm=norm, **kw)
    asked = [t for t in leaves if t is not None] + extra
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return out.detach(), torch.autograd.grad((out * weight).sum(), asked)


def agree(a, b, tol=TOL): assert (a - b).abs().max() <= tol * b.abs().max()


@settings(max_examples=80, deadline=None)
@given(b=st.integers(0, 3), h=st.integers(1, 5), w=st.integers(1, 5), queries=st.integers(1, 20), heads=st.sampled_from([1, 2, 3, 12]),
       norm=st.sampled_from(sorted(NORMS)), bias=st.booleans(), scale=st.sampled_from([1., .25, 3.]), channels_last=st.booleans())
def test_fold_equals_plain(b, h, w, queries, heads, norm, bias, scale, channels_last):
    if norm == "batch" and b * h * w < 2: b, w = 2, 2   # BatchNorm has no statistics of one value
    x, query, affine, layer = problem(b, 12, h, w, queries, norm, bias)
    if channels_last: x = x.to(memory_format=torch.channels_last)
    kw = dict(scale=scale, num_heads=heads)
    ours, g1 = with_gradients(attention_pool, x, query, affine, layer, **kw)
    plain, g2 = with_gradients(attention_pool_plain, x, query, affine, layer, **kw)
    assert ours.shape == plain.shape == (b, queries, 12)
    if b == 0: return
    agree(ours, plain)
    largest = max(g.abs().max() for g in g2)
    assert max((i - j).abs().max() for i, j in zip(g1, g2)) <= TOL * largest


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("queries", [1, 3])
def test_plain_equals_torch(heads, queries):
    x, query, affine, _ = problem(c=16, queries=queries)
    mha = nn.MultiheadAttention(16, heads, batch_first=True, dtype=x.dtype)
    mha.in_proj_weight.data = torch.cat([w for w, _ in affine[:3]])
    mha.in_proj_bias.data = torch.cat([b for _, b in affine[:3]])
    mha.out_proj.weight.data, mha.out_proj.bias.data = affine[3]
    tokens = x.flatten(2).transpose(1, 2)
    expected, weights = mha(query.expand(len(x), -1, -1), tokens, tokens, average_attn_weights=False)
    kw = dict(scale=(16 / heads)**-.5, num_heads=heads)
    agree(attention_pool_plain(x, query, *affine, **kw), expected)
    agree(attention_pool(x, query, *affine, **kw), expected)
    ours = attention_scores(x, query, *affine[:2], **kw).softmax(-1)
    agree(ours.unflatten(1, (queries, heads)).transpose(1, 2), weights)


@pytest.mark.parametrize("norm", ["layer", "rms", "batch", "none"])
@pytest.mark.parametrize("heads", [1, 3])
def test_scores_equal_their_definition(norm, heads):
    x, query, affine, layer = problem(queries=2, norm=norm)
    t = x.flatten(2).transpose(1, 2)
    if layer is not None: t = layer(t)
    q = F.linear(query, *affine[0]).view(2, heads, -1)
    k = F.linear(t, *affine[1]).view(len(x), -1, heads, 12 // heads)
    expected = torch.stack([2. * (k[:, :, h] * q[i, h]).sum(-1) for i in range(2) for h in range(heads)], 1)   # query-major
    agree(attention_scores(x, query, *affine[:2], layer, scale=2., num_heads=heads), expected)


def test_dropout_of_weights_counts_in_the_biases():
    x, query, affine, layer = problem(b=64)
    def run(f):
        torch.manual_seed(3)   # the same weights are dropped in both forms
        return f(x, query, *affine, norm=layer, dropout_p=.5)
    agree(run(attention_pool), run(attention_pool_plain))
    assert (run(attention_pool) - attention_pool(x, query, *affine, norm=layer)).abs().max() > .1


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(15)), st.sampled_from(["layer", "rms", "batch"]))
def test_order_of_positions_does_not_matter(order, norm):
    x, query, affine, layer = problem(norm=norm)
    shuffled = x.flatten(2)[:, :, list(order)].view_as(x)
    agree(attention_pool(shuffled, query, *affine, norm=layer), attention_pool(x, query, *affine, norm=layer))


def test_constant_map_and_one_position_give_the_value_itself():
    x, query, affine, layer = problem()
    one = x[:, :, :1, :1]
    value = F.linear(F.linear(layer(one.flatten(1)), *affine[2]), *affine[3])[:, None]
    agree(attention_pool(one, query, *affine, norm=layer), value)
    agree(attention_pool(one.expand_as(x), query, *affine, norm=layer), value)


def test_key_bias_gets_a_gradient_of_exactly_zero():
    x, query, affine, layer = problem()
    _, grads = with_gradients(attention_pool, x, query, affine, layer)
    assert torch.equal(grads[5], torch.zeros_like(grads[5]))


@pytest.mark.parametrize("norm, options", [("layer", {}), ("layer", dict(return_mean=True)), ("layer", dict(dropout_p=.4)), ("layer", dict(num_heads=2)),
                                           ("rms", dict(return_mean=True)), ("none", {})])
def test_second_derivatives(norm, options):
    x, query, affine, layer = problem(b=1, c=4, h=2, w=2, norm=norm)
    leaves = [t.requires_grad_() for t in (x, query, *(t for pair in affine for t in pair))]
    def f(x, query, *ws):
        torch.manual_seed(5)   # the same weights are dropped every time
        return attention_pool(x, query, *(tuple(ws[i:i + 2]) for i in range(0, 8, 2)), norm=layer, **options)
    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves)


def test_second_derivatives_of_a_layer_on_a_frozen_body():
    x, query, affine, norm = problem()   # the map, and so the mean, has no gradient
    out, mean = attention_pool(x, query.requires_grad_(), *affine, norm=norm, return_mean=True)
    g, = torch.autograd.grad((out.squeeze(1) + mean).square().sum(), query, create_graph=True)
    with form("plain"): plain, mean = attention_pool(x, query, *affine, norm=norm, return_mean=True)
    exact, = torch.autograd.grad((plain.squeeze(1) + mean).square().sum(), query, create_graph=True)
    second, wanted = (torch.autograd.grad(t.square().sum(), query)[0] for t in (g, exact))
    assert (second - wanted).abs().max() <= TOL * wanted.abs().max()


@pytest.mark.parametrize("f", ["gather", "gather_own"])
def test_under_activation_checkpointing(f):
    x, u = problem()[0].flatten(2).requires_grad_(), problem(queries=2)[1].requires_grad_()
    def run(x, u): return gather(x, u, centre=True, eps=1e-5).z if f == "gather" else gather_own(x, u)
    exact = torch.autograd.grad(run(x, u).square().sum(), (x, u))
    saved = torch.autograd.grad(checkpoint(run, x, u, use_reentrant=False).square().sum(), (x, u))
    assert all(map(torch.equal, saved, exact))


def test_scores_with_a_norm_in_float32_beside_half_precision():
    x, query, affine, norm = problem(dtype=torch.bfloat16)
    found = attention_scores(x, query, *affine[:2], norm=norm.float()).softmax(-1)
    exact = attention_scores(x.double(), query.double(), *[(w.double(), b.double()) for w, b in affine[:2]], norm=norm.double()).softmax(-1)
    assert (found - exact).abs().max() <= .05


def test_small_maps_take_the_short_way(monkeypatch):
    x, query, affine, layer = problem()
    long, g1 = with_gradients(attention_pool, x, query, affine, layer)
    monkeypatch.setattr(chunks, "SMALL", 1 << 16)
    monkeypatch.setattr(fold, "read_chunk", None)
    short, g2 = with_gradients(attention_pool, x, query, affine, layer)
    agree(short, long)
    assert max((i - j).abs().max() for i, j in zip(g1, g2)) <= TOL * max(g.abs().max() for g in g1)


def core_inputs(b=7, c=128, n=35, k=1, dtype=torch.float64, fmt="contiguous", offset=0.):
    g = torch.Generator().manual_seed(2)
    x = (torch.randn(b, c, n, generator=g, dtype=torch.float64) + offset).to(dtype)
    if fmt == "channels_last": x = x.mT.contiguous().mT
    return x, torch.randn(k, c, generator=g, dtype=torch.float64).to(torch.promote_types(dtype, torch.float32)) / c**.5


@pytest.mark.parametrize("fmt", ["contiguous", "channels_last"])
@pytest.mark.parametrize("k", [1, 2, 6])
@pytest.mark.parametrize("centre, eps", [(True, 1e-5), (False, 1e-5), (False, None)])
@pytest.mark.parametrize("mean, dropout", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("offset", [0., 50.])
def test_core_in_chunks_equals_core(monkeypatch, fmt, k, centre, eps, mean, dropout, offset):
    monkeypatch.setattr(chunks, "CHUNK", 3 * 128 * 35 * 4)   # three pictures at a time: the last chunk is smaller
    x, u = core_inputs(k=k, fmt=fmt, offset=offset)
    if not centre: u = u / 10   # without the norm, scores of hundreds
    mask = torch.rand(7, k, 35, dtype=x.dtype) if dropout else None
    results = []
    for f in (gather, gather_plain):
        X, U = x.clone().requires_grad_(), u.clone().requires_grad_()
        outs = [o for o in f(X, U, centre=centre, eps=eps, mask=mask, mean=mean) if o is not None]
        assert len(outs) == 1 + mean + dropout
        weights = [torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view_as(o) for o in outs]
        results.append([o.detach() for o in outs] + list(torch.autograd.grad(outs, (X, U), weights)))
    largest = max(plain.abs().max() for plain in results[1])
    for ours, plain in zip(*results): assert (ours - plain).abs().max() <= 1e-11 * largest
    assert results[0][-2].stride() == x.stride()


@pytest.mark.parametrize("fmt", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [35, 300])
def test_core_of_wide_maps(fmt, dtype, n):
    x, u = core_inputs(b=9, c=512, n=n, dtype=dtype, fmt=fmt)   # long enough for every way of reading
    X, U = x.clone().requires_grad_(), u.clone().requires_grad_()
    exact = x.double().requires_grad_(), u.double().requires_grad_()
    g = torch.randn(9, 1, 512)
    z, _, mean = gather(X, U, centre=True, eps=1e-5, mean=True)
    z2, _, mean2 = gather_plain(*exact, centre=True, eps=1e-5, mean=True)
    ours = torch.autograd.grad((z, mean), (X, U), (g, g[:, 0]))
    plain = torch.autograd.grad((z2, mean2), exact, (g.double(), g[:, 0].double()))
    assert z.dtype == torch.float32 and ours[0].dtype == dtype
    agree(z.double(), z2, 3e-6)
    agree(mean.double(), mean2, 3e-6)
    agree(ours[1].double(), plain[1], 3e-6)
    agree(ours[0].double(), plain[0], 3e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dropout, numbers", [(0., 3), (.3, 4)])
def test_saves_the_map_and_four_numbers_per_position_at_most(dropout, numbers):
    b, c, n = 4, 64, 35
    x, query, affine, layer = problem(b=b, c=c, h=5, w=7)
    x.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        attention_pool(x, query, *affine, norm=layer, dropout_p=dropout, return_mean=True)
    maps = {t.data_ptr() for t in saved if t.numel() >= x.numel()}
    assert maps == {x.data_ptr()}
    assert sum(t.numel() for t in saved if t.ndim == 3 and t.shape[-1] == n and t.numel() < x.numel()) == numbers * b * n


@pytest.mark.parametrize("norm", sorted(NORMS))
@pytest.mark.parametrize("queries", [1, 3, 40])
def test_mean_comes_along(norm, queries):
    x, query, affine, layer = problem(queries=queries, norm=norm)
    pooled, mean = attention_pool(x, query, *affine, norm=layer, return_mean=True)
    agree(mean, x.mean((2, 3)))
    agree(pooled, attention_pool(x, query, *affine, norm=layer))


def test_torch_func_grad_and_vmap():
    x, query, affine, layer = problem(b=3, c=8)
    def loss(x, query): return attention_pool(x, query, *affine, norm=layer).square().sum()
    X, Q = x.clone().requires_grad_(), query.clone().requires_grad_()
    expected = torch.autograd.grad(loss(X, Q), (X, Q))
    for a, e in zip(torch.func.grad(loss, (0, 1))(x, query), expected): agree(a, e)
    single = torch.func.vmap(lambda one: attention_pool(one[None], query, *affine, norm=layer)[0])(x)
    agree(single, attention_pool(x, query, *affine, norm=layer))
    per_sample = torch.func.vmap(torch.func.grad(lambda q, one: loss(one[None], q)), (None, 0))(query, x)
    agree(per_sample.sum(0), expected[1])


def test_forward_mode():
    x, query, affine, layer = problem(b=3, c=8)
    def f(x, query): return attention_pool(x, query, *affine, norm=layer)
    dx, dq, h = torch.randn_like(x), torch.randn_like(query), 1e-6
    tangent = torch.func.jvp(f, (x, query), (dx, dq))[1]
    agree(tangent, (f(x + h * dx, query + h * dq) - f(x - h * dx, query - h * dq)) / (2 * h), 1e-7)
    with torch.autograd.forward_ad.dual_level():
        assert is_traced(x)
        dual = f(*(torch.autograd.forward_ad.make_dual(t, d) for t, d in ((x, dx), (query, dq))))
        agree(torch.autograd.forward_ad.unpack_dual(dual).tangent, tangent)
    assert not is_traced(x)


@pytest.mark.parametrize("queries", [1, 40])   # values behind the sum, and before it
def test_forms_agree_and_say_what_ran(queries):
    x, query, affine, layer = problem(queries=queries)
    found = {}
    for name in (None, "folded", "plain"):
        with form(name) if name else nullcontext(), forms_used() as used:
            assert form_asked_for() == name
            ours, g = with_gradients(attention_pool, x, query, affine, layer)
            scores = attention_scores(x, query, *affine[:2], layer)
        assert used == {name or "folded"} and form_asked_for() is None
        found[name] = ours, scores, *g
    for a, b in zip(found[None], found["plain"]): agree(a, b, 1e-11) if b.abs().max() > 1e-12 else None
    assert torch.equal(found["plain"][0], attention_pool_plain(x, query, *affine, norm=layer))
    assert not torch.equal(found["plain"][0], found[None][0])   # other roundings: it was another form
    with forms_used() as used: attention_pool(x, query, *affine, norm=TokenBatchNorm(12).double())
    assert used == {"plain"}   # what cannot be folded
    with pytest.raises(BadInput, match="name: 'plan' is unknown. Did you mean 'plain'"), form("plan"): pass


def test_forms_belong_to_their_thread():
    seen = []
    def other():
        with forms_used() as used: attention_pool(*args[:2], *args[2], norm=args[3])
        seen.append((form_asked_for(), used))
    args = problem()
    with form("plain"), forms_used() as outer:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        with forms_used() as inner, form("folded"): attention_pool(*args[:2], *args[2], norm=args[3])
        assert form_asked_for() == "plain"
    assert seen == [(None, {"folded"})] and outer == inner == {"folded"}


@pytest.mark.slow
@pytest.mark.parametrize("fmt", [torch.contiguous_format, torch.channels_last])
def test_compiles_into_one_graph(fmt):
    x, query, affine, layer = problem(b=2, c=16, dtype=torch.float32)
    x = x.to(memory_format=fmt)
    ours, g1 = with_gradients(attention_pool, x, query, affine, layer)
    compiled, g2 = with_gradients(torch.compile(attention_pool, fullgraph=True, backend="aot_eager"), x, query, affine, layer)
    agree(compiled, ours, 1e-5)
    largest = max(g.abs().max() for g in g1)
    assert max((i - j).abs().max() for i, j in zip(g1, g2)) <= 1e-5 * largest


def test_a_map_that_needs_no_gradient_and_a_query_that_needs_none():
    x, query, affine, layer = problem()
    full, g = with_gradients(attention_pool, x, query, affine, layer)
    weight = torch.linspace(-1, 1, full.numel(), dtype=full.dtype).view_as(full)
    q = query.clone().requires_grad_()
    agree(torch.autograd.grad((attention_pool(x, q, *affine, norm=layer) * weight).sum(), q)[0], g[1])
    with torch.no_grad(): frozen = [tuple(t.clone() for t in pair) for pair in affine]
    X = x.clone().requires_grad_()
    agree(torch.autograd.grad((attention_pool(X, query, *frozen, norm=layer.requires_grad_(False)) * weight).sum(), X)[0], g[0])


def test_maps_of_any_strides():
    x, query, affine, layer = problem(b=4, c=12, h=6, w=10)
    for view in (x[:, :, ::2], x[::2], x.transpose(2, 3), x.flip(3)[:, :, :, :4], x[:1].expand(3, -1, -1, -1), x[:, :, :1, :1].expand_as(x)):
        X = view.detach().requires_grad_()
        ours, plain = (torch.autograd.grad(f(X, query, *affine, norm=layer).square().sum(), X)[0] for f in (attention_pool, attention_pool_plain))
        agree(ours, plain)


def test_inference_mode_and_scratch_memory_do_not_meet():
    clear_scratch()
    x, query, affine, layer = problem(b=4, c=64, dtype=torch.bfloat16)
    with torch.inference_mode(): first = attention_pool(x, query, *affine, norm=layer)
    X = x.clone().requires_grad_()
    attention_pool(X, query, *affine, norm=layer).sum().backward()
    with torch.no_grad(): agree(attention_pool(x, query, *affine, norm=layer), first, 1e-2)


def offsets(x, where):
    "100 or 1000 everywhere, or on one picture, one position, a few channels."
    x = x.clone()
    if where == "picture": x[1] += 1000
    elif where == "position": x[:, :, 2, 3] += 1000
    elif where == "channels": x[:, :3] += 1000
    else: x += where
    return x


@pytest.mark.parametrize("fmt", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("where", [0, 3, 100, 1000, "picture", "position", "channels"])
def test_a_large_mean_costs_no_more_digits_than_in_the_plain_form(where, fmt):
    x, query, affine, layer = problem(b=8, c=256, h=7, w=7)
    x = offsets(x, where).float().to(memory_format=fmt)   # what float32 holds of it is the map
    low = [tuple(t.float() for t in pair) for pair in affine]
    def run(f, x, query, affine, layer): return with_gradients(f, x, query, affine, layer, scale=.1)
    exact = run(attention_pool_plain, x.double(), query.float().double(), [tuple(t.double() for t in pair) for pair in low], layer)
    layer = layer.float()
    ours, plain = (run(f, x, query.float(), low, layer) for f in (attention_pool, attention_pool_plain))
    def error(a, b): return (a.double() - b).abs().max()
    assert error(ours[0], exact[0]) <= 5 * error(plain[0], exact[0])
    assert error(ours[1][0], exact[1][0]) <= 5 * error(plain[1][0], exact[1][0])   # the gradient of the map
    assert error(ours[1][1], exact[1][1]) <= 5 * error(plain[1][1], exact[1][1])   # and of the query


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_statistics_in_float32(dtype):
    x, query, affine, layer = problem(b=4, c=64, dtype=dtype)
    double = [tuple(t.double() for t in pair) for pair in affine]
    exact = attention_pool_plain(x.double(), query.double(), *double, norm=nn.LayerNorm(64).double().requires_grad_(False))
    layer = nn.LayerNorm(64).to(dtype)
    out = attention_pool(x, query, *affine, norm=layer)
    assert out.dtype == dtype
    agree(out.double(), exact, 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_autocast(norm):
    x, query, affine, layer = problem(b=4, c=64, norm=norm, dtype=torch.float32)
    exact = attention_pool(x, query, *affine, norm=layer, scale=.1)
    with torch.autocast("cpu", torch.bfloat16):
        for inp in (x, x.bfloat16()):
            out = attention_pool(inp, query, *affine, norm=layer, scale=.1)
            assert out.dtype == torch.bfloat16
            agree(out.float(), exact, .03)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["large", "constant", "zero", "one position"])
def test_extreme_maps_stay_finite(kind, dtype, norm):
    x, query, affine, layer = problem(b=2, c=64, norm=norm, dtype=torch.float32)
    x = dict(large=lambda: x / x.abs().max() * 1e4, constant=lambda: torch.full_like(x, 1e4), zero=lambda: x * 0).get(kind, lambda: x[:, :, :1, :1] * 100)()
    low = [tuple(t.to(dtype) for t in pair) for pair in affine]
    for fmt in (torch.contiguous_format, torch.channels_last):
        out, grads = with_gradients(attention_pool, x.to(dtype).to(memory_format=fmt), query.to(dtype), low, layer.to(dtype), scale=.1)
        assert out.isfinite().all() and all(g.isfinite().all() for g in grads)


def test_export_with_any_batch_height_and_width():
    class Pool(nn.Module):
        def __init__(self):
            super().__init__()
            _, query, affine, self.norm = problem()
            self.query = nn.Parameter(query)
            self.ws = nn.ParameterList(t for pair in affine for t in pair)
        def forward(self, x):
            ws = list(self.ws)
            return attention_pool(x, self.query, *(tuple(ws[i:i + 2]) for i in range(0, 8, 2)), norm=self.norm)
    pool, dim = Pool(), torch.export.Dim
    exported = torch.export.export(pool, (problem()[0],), dynamic_shapes=({0: dim("b"), 2: dim("h"), 3: dim("w")},)).module()
    other = problem(b=3, h=6, w=2)[0]
    agree(exported(other), pool(other))


@pytest.mark.parametrize("change, error, words", [
    (dict(x=torch.randn(12, 3, 5)), BadInput, "x: expected a map of shape (b, c, h, w), got (12, 3, 5)"),
    (dict(x=torch.randn(2, 7, 3, 5)), BadInput, "x: expected 12 channels, got 7"),
    (dict(x=torch.randn(2, 12, 0, 5)), BadInput, "no positions"),
    (dict(query=torch.randn(12)), BadInput, "query: expected shape (queries, 12), got (12,)"),
    (dict(query=torch.randn(1, 9)), BadInput, "query: expected shape (queries, 12), got (1, 9)"),
    (dict(num_heads=5), BadInput, "num_heads: 5 does not divide the 12 channels"),
    (dict(query=torch.randn(1, 12).half()), TypeError, "query: it is torch.float16, the weights are torch.float32"),
    (dict(x=torch.randn(2, 12, 3, 5).bfloat16()), TypeError, "x: the map is torch.bfloat16, the weights are torch.float32"),
    (dict(x=torch.randn(2, 12, 3, 5).double()), TypeError, "x: the map is torch.float64, the weights are torch.float32"),
])
def test_bad_input(change, error, words):
    x, query, affine, layer = problem(dtype=torch.float32)
    args = dict(x=x, query=query, num_heads=1) | change
    with pytest.raises(error) as e: attention_pool(args["x"], args["query"], *affine, norm=layer, num_heads=args["num_heads"])
    assert words in str(e.value)


@pytest.mark.cuda
@pytest.mark.parametrize("autocast", [False, True])
def test_on_a_gpu(autocast):
    x, query, affine, layer = problem(b=8, c=256, h=7, w=7, dtype=torch.float32)
    exact = attention_pool(x, query, *affine, norm=layer)
    with torch.autocast("cuda", torch.bfloat16) if autocast else nullcontext():
        out = attention_pool(x.cuda(), query.cuda(), *[tuple(t.cuda() for t in pair) for pair in affine], norm=layer.cuda())
    agree(out.float().cpu(), exact, .03 if autocast else 1e-4)


def both(f, x, g):
    x = x.detach().requires_grad_()
    y = f(x)
    return y.detach(), torch.autograd.grad(y, x, g)[0]


@pytest.mark.parametrize("chunk", [1 << 18, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (2, 3, 4, 5), (2, 3, 2, 4, 5)])
def test_mish_equals_torch(monkeypatch, shape, dtype, chunk):
    monkeypatch.setattr(layers, "_MISH_CHUNK", chunk)
    x, g = (20 * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)
    y, dx = both(mish, x, g)
    y2, dx2 = both(F.mish, x.double(), g.double())
    tol = 4 * torch.finfo(dtype).eps
    assert y.dtype == dx.dtype == dtype and y.shape == x.shape
    assert ((y - y2).abs() <= tol * y2.abs() + 1e-30 + (1e-7 if dtype == torch.float16 else 0)).all()
    assert ((dx - dx2).abs() <= 20 * tol * g.abs()).all()


def test_mish_in_every_memory_format():
    x, g = torch.randn(4, 6, 5, 7), torch.randn(4, 6, 5, 7)
    last = torch.channels_last
    for X in (x, x.to(memory_format=last), x[:, ::2], x.transpose(1, 3), x[:1].expand(4, -1, -1, -1)):
        for G in (torch.randn_like(X), torch.randn(X.shape), torch.randn(X.shape).to(memory_format=last), torch.randn(()).expand(X.shape)):
            for ours, torchs in zip(both(mish, X, G), both(F.mish, X, G)): agree(ours, torchs, 5e-6)
    assert mish(x.to(memory_format=last)).is_contiguous(memory_format=last)


def test_mish_neither_overflows_nor_vanishes_early():
    x = torch.tensor([-torch.inf, -1e30, -100., -80., -15., 0., 15., 80., 100., 1e30, torch.inf, torch.nan])
    y, dx = both(mish, x, torch.ones(12))
    exact, slope = both(F.mish, x[3:9].double(), torch.ones(6, dtype=torch.float64))
    assert ((y[3:9] - exact).abs() <= 1e-6 * exact.abs()).all() and ((dx[3:9] - slope).abs() <= 1e-5 * slope.abs()).all()
    assert y[11].isnan() and y[1:11].isfinite()[:9].all() and y[10] == torch.inf and dx[1:10].isfinite().all()


def test_mish_saves_its_input_only(monkeypatch):
    "Of a large map; what it keeps of a small one is in test_speed_parts."
    monkeypatch.setattr(layers, "_MISH_SLOPE", 0)
    x, saved = torch.randn(3, 4, 5, 6, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t): mish(x)
    assert [t.data_ptr() for t in saved] == [x.data_ptr()]


def test_mish_under_transforms():
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(mish, x) and torch.autograd.gradgradcheck(mish, x)
    def total(x): return mish(x).sum()
    expected = both(F.mish, x, torch.ones_like(x))[1]
    agree(torch.func.grad(total)(x.detach()), expected)
    agree(torch.func.vmap(torch.func.grad(total))(x.detach()), expected)
    agree(torch.export.export(Wrapped(), (x.detach(),)).module()(x.detach()), F.mish(x))


class Wrapped(nn.Module):
    def forward(self, x): return mish(x)


@pytest.mark.parametrize("f", [mish, Mish()])
def test_mish_in_forward_mode(f):
    x, dx = torch.randn(3, 4), torch.randn(3, 4)
    exact = torch.func.jvp(F.mish, (x.double(),), (dx.double(),))[1]
    agree(torch.func.jvp(f, (x,), (dx,))[1].double(), exact, 1e-6)
    with torch.autograd.forward_ad.dual_level():
        tangent = torch.autograd.forward_ad.unpack_dual(f(torch.autograd.forward_ad.make_dual(x, dx))).tangent
    agree(tangent.double(), exact, 1e-6)


def test_functional_needs_torch_alone():
    code = "import sys, attnpool.functional; print(*[m for m in ('fastcore', 'fastai', 'timm', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""
