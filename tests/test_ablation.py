"The options of the blog's ablations: each does what it says, and the defaults are the printed heads."
import inspect
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attnpool.runs.spec import make_spec
from attnpool.heads import ABLATIONS, fold, get_head, HEADS, LearnedAggregationHead
from attnpool.layers import TokenBatchNorm
from attnpool.recipe import get_recipe, recipe_learner
from attnpool.pooling.attention import (
    AvgAttnConcatPooling2d, AvgAttnPooling2d, AvgAttnPooling2dS, LearnedAggregation, LearnedAggregationSandwich)
from attnpool.pooling.peers import PEERS
from attnpool.registry import BadInput

C = 16
WITH_FFN = [LearnedAggregation, LearnedAggregationSandwich, AvgAttnPooling2d, AvgAttnConcatPooling2d]
WITH_GAMMA = WITH_FFN[:2]


def shaken(m):
    g = torch.Generator().manual_seed(3)
    for p in m.parameters(): p.data = torch.randn(p.shape, generator=g, dtype=p.dtype) * (p.shape[-1]**-.5 if p.ndim > 1 else 1)
    return m


def attention(pool, x):
    a, n = pool.attn, pool.attn.norm(x.flatten(2).mT)
    return a.proj(F.scaled_dot_product_attention(a.q(pool.query).expand(len(x), 1, -1), a.k(n), a.v(n), scale=a.scale).squeeze(1))


@pytest.mark.parametrize("pool", WITH_GAMMA)
@pytest.mark.parametrize("residual", ["query", "mean", "both"])
@pytest.mark.parametrize("gamma, per_channel", [(.5, True), (1., False), (None, True)])
@pytest.mark.parametrize("ffn_expand", [2, None])
def test_gamma_residual_and_feed_forward(pool, residual, gamma, per_channel, ffn_expand):
    pool = pool(C, gamma=gamma, gamma_per_channel=per_channel, residual=residual, ffn_expand=ffn_expand).double()
    names = [n for n, _ in pool.named_parameters() if n.startswith("gamma")]
    assert names == ([] if gamma is None else ["gamma_1"] if ffn_expand is None else ["gamma_1", "gamma_2"])
    for n in names: assert torch.equal(getattr(pool, n), torch.full((C if per_channel else 1,), gamma, dtype=torch.float64))
    x = torch.randn(3, C, 4, 5, dtype=torch.float64)
    shaken(pool)
    sandwich = type(pool) is LearnedAggregationSandwich
    attn, mean = attention(pool, x), x.mean((2, 3))
    y = {"query": pool.query, "mean": mean, "both": mean + pool.query}[residual]
    y = y + (1 if gamma is None else pool.gamma_1) * (pool.norm1(attn) if sandwich else attn)
    if ffn_expand: y = y + (1 if gamma is None else pool.gamma_2) * pool.ffn((pool.norm2 if sandwich else pool.norm)(y))
    assert (pool(x) - y).abs().max() <= 1e-12 * y.abs().max()


@pytest.mark.parametrize("pool", WITH_FFN)
def test_without_feed_forward(pool):
    small, x = shaken(pool(C, ffn_expand=None).double()), torch.randn(3, C, 4, 5, dtype=torch.float64)
    assert not any("ffn" in n or n.startswith(("norm2", "gamma_2")) for n, _ in small.named_parameters())
    small(x).square().sum().backward()
    assert all(p.grad is not None for p in small.parameters())   # nothing is left over
    attn, mean = attention(small, x), x.mean((2, 3))
    if pool is AvgAttnPooling2d: assert torch.allclose(small(x), small.norm(mean + attn))
    if pool is AvgAttnConcatPooling2d:
        expected = F.gelu(torch.cat([small.norm4(mean), small.norm3(small.query + small.norm1(attn))], 1))
        assert torch.allclose(small(x), expected)


@pytest.mark.parametrize("pool", [*WITH_FFN, AvgAttnPooling2dS])
def test_init_std_reaches_the_attention(pool):
    for l in (lambda a: (a.q, a.k, a.v, a.proj))(pool(256, init_std=.1).attn):
        assert l.weight.std().item() == pytest.approx(.1, rel=.05) and l.bias.abs().max() == 0


@pytest.mark.parametrize("name", ["learned", "sandwich", "avgattn"])
def test_extra_activation(name):
    assert [type(m).__name__ for m in HEADS[name](C, 5, final_act=nn.GELU)][1:] == ["LayerNorm", "GELU", "Linear"]


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm, TokenBatchNorm])
def test_ablated_heads_train_and_fold(norm):
    head = shaken(LearnedAggregationHead(C, 5, norm=norm, gamma=None, residual="both", ffn_expand=None, final_act=nn.GELU))
    x = torch.randn(4, C, 5, 5)
    head(x).sum().backward()
    assert all(p.grad is not None for p in head.parameters())
    head.eval()
    if norm is not TokenBatchNorm: torch.testing.assert_close(fold(head)(x), head(x))


def test_options_are_in_the_heads_signatures():
    p = inspect.signature(LearnedAggregationHead).parameters
    assert (p["gamma"].default, p["gamma_per_channel"].default, p["residual"].default, p["ffn_expand"].default, p["init_std"].default) == (1e-4, True, "query", 3, .02)


@pytest.mark.parametrize("make, words", [
    (lambda: LearnedAggregation(C, residual="max"), "residual: expected 'query', 'mean' or 'both', got 'max'"),
    (lambda: LearnedAggregation(C, init_std=0), "init_std: expected a standard deviation above 0, got 0"),
])
def test_bad_input(make, words):
    with pytest.raises(BadInput) as e: make()
    assert words in str(e.value)


@pytest.mark.parametrize("name", ABLATIONS)
def test_named_ablations(name, tmp_path):
    torch.manual_seed(0)
    ni, base = 32, {**HEADS, **PEERS}[name.split("-")[0]]
    head = get_head(name)(ni, 4)
    assert isinstance(head, base) if isinstance(base, type) else type(head[0]) is type(base(ni, 4)[0])
    x = torch.randn(3, ni, 4, 5)
    F.cross_entropy(head(x), torch.arange(3)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters() if p.requires_grad)
    assert get_recipe("quick", name).lr == get_recipe("quick", name.split("-")[0]).lr   # its head's rate
    assert make_spec(head=name).head == name
    dls = SimpleNamespace(device=torch.device("cpu"), c=4)
    assert recipe_learner(dls, "xeca_resnext_tiny", ABLATIONS[name], metrics=[]).recipe.lr == get_recipe("quick", name).lr   # by class as by name
    torch.manual_seed(0)
    plain = base(ni, 4)
    change = name.split("-")[1]
    norms = {type(m) for m in head.modules()} & {nn.LayerNorm, nn.RMSNorm, TokenBatchNorm}
    expected = dict(rms={nn.RMSNorm}, batch={TokenBatchNorm}).get(change, {nn.LayerNorm} if any(isinstance(m, nn.LayerNorm) for m in plain.modules()) else set())
    assert norms == expected
    count = lambda m: sum(p.numel() for p in m.parameters())
    less = "noffn", "nogamma", "scalar", "1", "rms", "linear"   # RMSNorm has no bias
    if change in less or name == "maxstart-batchnorm": assert count(head) < count(plain)
    elif change in ("fastai", "batchnorm"): assert count(head) > count(plain)
    else: assert count(head) == count(plain)


@pytest.mark.parametrize("name", ["learned-uniform", "slim-uniform", "concat-uniform", "avgstart-uniform"])
def test_uniform_controls_look_everywhere(name):
    head = shaken(get_head(name)(C, 4))
    maps = head[0].attention_map(torch.randn(2, C, 4, 5))
    torch.testing.assert_close(maps, torch.full_like(maps, 1 / 20))


def test_frozen_queries_stay():
    head = get_head("avgstart-frozen")(64, 4)
    assert not head[0].query.requires_grad and .5 < (head[0].query @ torch.randn(64, 500)).std() < 2


def test_unknown_ablation():
    with pytest.raises(BadInput, match="head: 'learned-gama1' is unknown. Did you mean 'learned-gamma1'"): get_head("learned-gama1")
