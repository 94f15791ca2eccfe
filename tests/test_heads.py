"Every pool and every registered head: numbers against literal forms, and all the ways in which they are used."
import copy
import inspect
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attnpool.heads import AvgAttnPoolHead, AvgPoolHead, HEADS, PoolHead, start_linear
from attnpool.layers import drop_path, make_norm, TokenBatchNorm
from attnpool.pooling.attention import AttentionPool2d
from attnpool.registry import BadInput, Registry

POOLS = list(dict.fromkeys(type(head(16, 2)[0]) for head in HEADS.values() if hasattr(head(16, 2)[0], "attn")))   # the blog's
C = 16


def randomized(m):
    "Weights away from their initial values, so that no branch is negligible."
    g = torch.Generator().manual_seed(2)
    for p in m.parameters(): p.data = torch.randn(p.shape, generator=g, dtype=torch.float64).to(p) * (p.shape[-1]**-.5 if p.ndim > 1 else 1)
    return m


def literal(pool, x):
    "The blog's equations, one by one, on torch's own attention."
    t = x.flatten(2).transpose(1, 2)
    a, query = pool.attn, pool.query
    n = a.norm(t)
    attn = a.proj(F.scaled_dot_product_attention(a.q(query).expand(len(x), 1, -1), a.k(n), a.v(n), scale=a.scale).squeeze(1))
    mean, name = t.mean(1), type(pool).__name__
    if name == "LearnedAggregation":
        y = query + pool.gamma_1 * attn
        return y + pool.gamma_2 * pool.ffn[2](F.gelu(pool.ffn[0](pool.norm(y))))
    def sandwich(y): return pool.ffn[3](pool.ffn[2](F.gelu(pool.ffn[0](y))))
    if name == "LearnedAggregationSandwich":
        y = query + pool.gamma_1 * pool.norm1(attn)
        return y + pool.gamma_2 * sandwich(pool.norm2(y))
    if name == "AvgAttnPooling2d":
        y = pool.norm(mean + attn)
        return y + sandwich(y)
    if name == "AvgAttnPooling2dS": return F.gelu(pool.norm(mean + attn))
    if name == "AvgAttnConcatPooling2d":
        y = query + pool.norm1(attn)
        y = y + sandwich(pool.norm2(y))
        return F.gelu(torch.cat([pool.norm4(mean), pool.norm3(y)], 1))
    raise NotImplementedError(f"the literal form of {name}")


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm, TokenBatchNorm])
def test_pool_equals_the_equations(pool, norm):
    pool = randomized(pool(C, norm=norm).double())
    x = torch.randn(4, C, 3, 5, dtype=torch.float64)
    out = pool(x)
    assert out.shape == (4, pool.c_out)
    assert (out - literal(pool, x)).abs().max() <= 1e-12 * out.abs().max()


@pytest.mark.parametrize("pool", POOLS)
def test_initialised_as_printed(pool):
    pool = pool(256)
    for m in pool.modules():
        if isinstance(m, nn.Linear):
            assert m.weight.std().item() == pytest.approx(.02, rel=.05)
            assert m.bias.abs().max() == 0
    assert pool.query.shape == (1, 256) and pool.query.std().item() == pytest.approx(.02, rel=.25)
    for name in ("gamma_1", "gamma_2"):
        if hasattr(pool, name): assert torch.equal(getattr(pool, name), torch.full((256,), 1e-4))


@pytest.mark.parametrize("pool", POOLS)
def test_options_reach_the_layers(pool):
    p = pool(C, attn_bias=False, norm=nn.RMSNorm, act_cls=nn.ReLU, drop_path_rate=.5, scale=.5, num_heads=4, attn_drop=.1, proj_drop=.2)
    assert p.attn.q.bias is p.attn.k.bias is p.attn.v.bias is None and p.attn.proj.bias is not None
    assert not any(isinstance(m, (nn.LayerNorm, nn.GELU)) for m in p.modules())
    assert any(isinstance(m, nn.ReLU) for m in p.modules())
    assert (p.attn.scale, p.attn.num_heads, p.attn.attn_drop, p.attn.proj_drop.p, p.drop_path.drop_prob) == (.5, 4, .1, .2, .5)
    if "ffn_expand" in inspect.signature(pool).parameters: assert pool(C, ffn_expand=.5).ffn[0].out_features == C // 2
    x = torch.randn(8, C, 3, 3)
    p.train()
    assert not torch.equal(p(x), p(x))   # the drops are at work
    p.eval()
    assert torch.equal(p(x), p(x))


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("heads", [1, 4])
def test_attention_map_is_what_the_forward_pass_used(pool, heads):
    pool = randomized(pool(C, num_heads=heads).double())
    x = torch.randn(3, C, 4, 7, dtype=torch.float64)
    maps = pool.attention_map(x)
    assert maps.shape == (3, heads, 4, 7)
    assert torch.allclose(maps.sum((2, 3)), torch.ones(3, heads, dtype=maps.dtype))
    a = pool.attn
    v = a.v(a.norm(x.flatten(2).transpose(1, 2))).unflatten(-1, (heads, -1))
    by_hand = a.proj(torch.einsum("bhn,bnhd->bhd", maps.flatten(2), v).flatten(1))
    assert torch.allclose(by_hand, a(x, pool.query), rtol=1e-10)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("shape", [(2, 5, 3), (1, 1, 1), (3, 7, 7), (0, 4, 4), (2, 1, 9)])
def test_head_forward_and_backward(name, shape):
    b, h, w = shape
    head = HEADS[name](C, 5)
    head.train(b > 1 or not any(isinstance(m, nn.BatchNorm1d) for m in head))   # which needs two pictures to train
    x = torch.randn(b, C, h, w, requires_grad=True)
    out = head(x)
    assert out.shape == (b, 5)
    out.sum().backward()
    assert x.grad.shape == x.shape and x.grad.isfinite().all()
    for n, p in head.named_parameters():
        assert p.grad is not None, n   # DDP waits for each of them
        assert p.grad.isfinite().all(), n


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_head_dtypes_and_memory_formats(name, dtype):
    head = randomized(HEADS[name](C, 5)).eval()
    x = torch.randn(2, C, 6, 4)
    exact = copy.deepcopy(head).double()(x.double())
    largest = exact.abs().max()
    for same in (x, x.to(memory_format=torch.channels_last)): assert (head(same) - exact).abs().max() <= 4e-6 * largest
    out = head.to(dtype)(x.to(dtype))
    assert out.dtype == dtype
    # the weights are rounded too: several roundings of the dtype, each of the size of eps
    assert (out - exact).abs().max() <= 12 * torch.finfo(dtype).eps * largest


@pytest.mark.parametrize("name", HEADS)
def test_head_on_the_meta_device(name):
    with torch.device("meta"): assert HEADS[name](C, 5)(torch.randn(2, C, 6, 4)).shape == (2, 5)


@pytest.mark.parametrize("name", HEADS)
def test_head_saves_copies_slices_and_traces(name, tmp_path):
    head, x = HEADS[name](C, 5).eval(), torch.randn(2, C, 6, 4)
    expected = head(x)
    torch.save(head.state_dict(), tmp_path / "head.pt")
    other = HEADS[name](C, 5).eval()
    other.load_state_dict(torch.load(tmp_path / "head.pt", weights_only=True))
    for same in (other, copy.deepcopy(head), pickle.loads(pickle.dumps(head)), nn.Sequential(head[:-1], head[-1])):
        assert torch.equal(same(x), expected)
    assert type(head[:-1]) is nn.Sequential
    torch._dynamo.reset()   # it counts how often a forward is compiled, for all heads together, and stops
    compiled = torch.compile(head, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), expected, atol=1e-6)


@pytest.mark.parametrize("name", HEADS)
def test_head_signature_is_complete(name):
    parameters = inspect.signature(HEADS[name]).parameters
    assert list(parameters)[:2] == ["ni", "n_out"]
    assert not any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters.values())
    with pytest.raises(TypeError): HEADS[name](C, 5, no_such_option=1)
    with pytest.raises(BadInput, match="n_out: expected at least 1 output, got 0"): HEADS[name](C, 0)


def test_what_stands_after_the_pool():
    after = {n: [type(m).__name__ for m in list(HEADS[n](C, 5))[1:]] for n in HEADS}
    normed = ["LayerNorm", "Linear"]
    seeds = dict(avg=["Flatten", "Linear"], learned=normed, sandwich=normed, avgattn=normed, slim=["Linear"],
                 concat=["Linear"], avgstart=["Linear"], classquery=[],
                 maxstart=["BatchNorm1d", "Dropout", "Linear", "ReLU", "BatchNorm1d", "Dropout", "Linear"])
    assert {n: after[n] for n in seeds} == seeds
    assert [type(m).__name__ for m in AvgAttnPoolHead(C, 5, final_act=nn.GELU)][1:] == ["LayerNorm", "GELU", "Linear"]


@pytest.mark.parametrize("name", [name for name, head in HEADS.items() if head.start == "blog" and not head.own])
def test_last_linear_starts_as_in_the_authors_notebooks(name):
    last = HEADS[name](256, 1000)[-1]
    assert last.weight.std().item() == pytest.approx(.02, rel=.02) and last.weight.abs().max() <= 2 and last.bias.abs().max() == 0
    assert (last.weight.abs() > .04).float().mean().item() == pytest.approx(.0455, abs=.004)   # a normal distribution's tails
    if "final_act" in inspect.signature(HEADS[name]).parameters:   # there the notebooks keep PyTorch's own start, uniform
        last = HEADS[name](256, 1000, final_act=nn.GELU)[-1]
        ni = last.in_features
        assert last.weight.abs().max() <= ni**-.5 and last.weight.std().item() == pytest.approx((3 * ni)**-.5, rel=.02)
        assert last.bias.any()


def test_a_head_is_a_row():
    assert {"learned", "sandwich", "avgattn", "slim", "concat"} <= {n for n, head in HEADS.items() if head.start == "blog"}
    class Max(nn.AdaptiveMaxPool2d):
        def __init__(self, ni, power=1):
            super().__init__(1)
            self.c_out, self.power = ni, power
        def forward(self, x): return super().forward(x).flatten(1)
    class MaxHead(PoolHead): pool, norm_after, start = Max, True, "torch"
    head, x = MaxHead(C, 5, power=3, final_act=nn.ReLU), torch.randn(2, C, 3, 4)
    assert [type(m).__name__ for m in head] == ["Max", "LayerNorm", "ReLU", "Linear"] and head[0].power == 3
    assert torch.equal(head(x), head[3](F.relu(F.layer_norm(x.amax((2, 3)), (C,)))))
    assert list(inspect.signature(MaxHead).parameters) == ["ni", "n_out", "final_act", "classifier", "power"]
    for harm in (dict(norm=nn.RMSNorm), dict(strength=1)):
        with pytest.raises(TypeError): MaxHead(C, 5, **harm)
    class Both(Max):   # a pool that widens the map
        def __init__(self, ni):
            super().__init__(ni)
            self.c_out = 2 * ni
        def forward(self, x): return torch.cat([super().forward(x), x.mean((2, 3))], 1)
    class BothHead(PoolHead): pool, norm_after = Both, True
    assert BothHead(C, 5)(x).shape == (2, 5) and BothHead(C, 5)[-1].in_features == 2 * C
    class Written(PoolHead):   # one that is written out
        pool = Max
        def __init__(self, ni, n_out): super().__init__(ni, n_out, power=7)
    assert Written(C, 5)[0].power == 7
    class Mine(HEADS["learned"]):   # a head made from a head: its own signature
        def __init__(self, ni, n_out): super().__init__(ni, n_out, gamma=1.)
    assert list(inspect.signature(Mine).parameters) == ["ni", "n_out"] and Mine(C, 5)[0].gamma_1[0] == 1


@pytest.mark.parametrize("start, std", [("blog", .02), ("xresnet", (2 / 256)**.5), ("torch", (3 * 256)**-.5)])
def test_starts_of_a_linear_layer(start, std):
    linear = start_linear(nn.Linear(256, 1000), start)
    assert linear.weight.std().item() == pytest.approx(std, rel=.02) and linear.bias.any() == (start == "torch")


def test_average_head_is_fastxtends():
    from fastxtend.vision.models.xresnet import ResBlock, XResNet
    theirs = XResNet(ResBlock, 1, [1, 1, 1, 1], n_out=1000)[-1]
    ours = AvgPoolHead(512, 1000)[-1]
    assert ours.weight.std().item() == pytest.approx(theirs.weight.std().item(), rel=.02)
    assert ours.bias.abs().max() == theirs.bias.abs().max() == 0


def test_token_batchnorm_normalises_channels():
    ours, theirs = TokenBatchNorm(4), nn.BatchNorm1d(4)
    x = torch.randn(8, 6, 4) * 3 + 1
    assert torch.allclose(ours(x), theirs(x.transpose(1, 2)).transpose(1, 2), atol=1e-6)
    assert torch.allclose(ours.running_var, theirs.running_var, atol=1e-6)
    assert ours.state_dict().keys() == theirs.state_dict().keys()


@pytest.mark.parametrize("make, error, words", [
    (lambda: AttentionPool2d(0), BadInput, "ni: expected the number of channels"),
    (lambda: AttentionPool2d(C, num_heads=3), BadInput, "num_heads: 3 does not divide the 16 channels"),
    (lambda: AttentionPool2d(C, attn_drop=1.5), BadInput, "attn_drop: expected a rate in [0, 1), got 1.5"),
    (lambda: POOLS[0](C, ffn_expand=0), BadInput, "ffn_expand: expected a factor above 0"),
    (lambda: POOLS[4](C, ffn_expand=-1), BadInput, "ffn_expand: expected a factor above 0"),
    (lambda: POOLS[1](C, drop_path_rate=-.1), BadInput, "drop_path_rate: expected a rate in [0, 1), got -0.1"),
    (lambda: HEADS["learned"](C, 5, norm=None), TypeError, "norm: expected layer, batch, rms, or a class or callable"),
    (lambda: make_norm(nn.BatchNorm1d, C), BadInput, "Use norm=attnpool.layers.TokenBatchNorm"),
    (lambda: make_norm("layr", C), ValueError, "norm: 'layr' is unknown. Did you mean 'layer'?"),
    (lambda: POOLS[0](C)(torch.randn(2, C, 4)), BadInput, "x: expected a map of shape (b, c, h, w), got (2, 16, 4)"),
    (lambda: POOLS[0](C)(torch.randn(2, 8, 4, 4)), BadInput, "x: expected 16 channels, got 8"),
    (lambda: AttentionPool2d(C)(torch.randn(2, C, 4, 4), torch.randn(C)), BadInput, "query: expected shape (queries, 16), got (16,)"),
    (lambda: HEADS["conct"], BadInput, "head: 'conct' is unknown. Did you mean 'concat'?"),
    (lambda: HEADS.register("avg")(AvgAttnPoolHead), BadInput, "head: 'avg' is taken"),
    (lambda: Registry("thing")["x"], BadInput, "thing: 'x' is unknown."),
])
def test_bad_input(make, error, words):
    with pytest.raises(error) as e: make()
    assert words in str(e.value)


@pytest.mark.parametrize("name", HEADS)
def test_head_on_fake_tensors(name):
    from torch._subclasses.fake_tensor import FakeTensorMode
    head = HEADS[name](64, 5)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.randn(4, 64, 32, 32, requires_grad=True)
        out = head(x)
        out.sum().backward()
        assert out.shape == (4, 5) and x.grad.shape == x.shape


def test_registries_are_dicts_that_never_lose_a_name():
    table = Registry("thing")
    table["a"] = 1
    for harm in (lambda: table.update(a=2), lambda: table.__setitem__("a", 2)):
        with pytest.raises(BadInput, match="thing: 'a' is taken by 1"): harm()
    assert table.setdefault("a", 2) == 1 and table.get("b") is None and table == {"a": 1} and "b" not in table
    assert HEADS.register("avg")(AvgPoolHead) is AvgPoolHead   # a cell that is run again
    table["f"] = lambda: 1
    with pytest.raises(BadInput, match="taken"): table["f"] = lambda: 2
    table["p"] = partial(AvgPoolHead, n_out=3)
    table["p"] = partial(AvgPoolHead, n_out=3)
    with pytest.raises(BadInput, match="taken"): table["p"] = partial(AvgPoolHead, n_out=4)


def test_drop_path_keeps_the_mean():
    x = torch.ones(10000, 1)
    dropped = drop_path(.25)(x)
    assert dropped.unique().tolist() == pytest.approx([0, 4 / 3])
    assert dropped.mean().item() == pytest.approx(1, abs=.03)
