"The fold against the plain form, and the plain form against torch's own attention, in float64."
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

from attnpool.functional import attention_pool, attention_pool_plain, attention_scores
from attnpool.layers import TokenBatchNorm

TOL = 1e-12
NORMS = dict(none=lambda c: None, layer=nn.LayerNorm, plain_layer=lambda c: nn.LayerNorm(c, elementwise_affine=False), unbiased_layer=lambda c: nn.LayerNorm(c, bias=False),
             rms=nn.RMSNorm, rms_eps=lambda c: nn.RMSNorm(c, eps=1e-3), batch=TokenBatchNorm, group=lambda c: Tokens(nn.GroupNorm(4, c)))


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


def test_second_derivatives():
    x, query, affine, layer = problem(b=1, c=4, h=2, w=2)
    leaves = [t.requires_grad_() for t in (x, query, *(t for pair in affine for t in pair))]
    def f(x, query, *ws): return attention_pool(x, query, *(tuple(ws[i:i + 2]) for i in range(0, 8, 2)), norm=layer)
    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves)


@pytest.mark.parametrize("offset", [0, 100, 1000])
def test_a_common_offset_costs_no_more_digits_than_in_the_plain_form(offset):
    x, query, affine, layer = problem(b=8, c=256, h=7, w=7, offset=offset)
    exact = attention_pool_plain(x, query, *affine, norm=layer)
    def to(t): return t.float()
    low = [tuple(map(to, pair)) for pair in affine]
    def error(f): return (f(to(x), to(query), *low, norm=layer.float()) - exact).abs().max()
    ours, plain = error(attention_pool), error(attention_pool_plain)
    assert ours <= 5 * plain


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


def test_large_fp16_maps_stay_finite():
    x, query, affine, layer = problem(b=2, c=64, dtype=torch.float32)
    x = (x / x.abs().max() * 1e4).half()
    out = attention_pool(x, query.half(), *[tuple(t.half() for t in pair) for pair in affine], norm=layer.half())
    assert out.isfinite().all()


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
    (dict(x=torch.randn(12, 3, 5)), ValueError, "x: expected a map of shape (b, c, h, w), got (12, 3, 5)"),
    (dict(x=torch.randn(2, 7, 3, 5)), ValueError, "x: expected 12 channels, got 7"),
    (dict(x=torch.randn(2, 12, 0, 5)), ValueError, "no positions"),
    (dict(query=torch.randn(12)), ValueError, "query: expected shape (queries, 12), got (12,)"),
    (dict(query=torch.randn(1, 9)), ValueError, "query: expected shape (queries, 12), got (1, 9)"),
    (dict(num_heads=5), ValueError, "num_heads: 5 does not divide the 12 channels"),
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
