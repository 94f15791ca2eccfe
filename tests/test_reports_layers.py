"Layers that are hooked, adapted, quantised, pruned or parametrized count as they would when called; transforms of pools."
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, parametrize, prune

from attnpool import chunks
from attnpool.chunks import in_chunks
from attnpool.fold import foldable
from attnpool.forms import affine, form, forms_used, readable
from attnpool.functional import attention_pool
from attnpool.heads import fold, HEADS, LearnedAggregationHead
from attnpool.layers import Mish
from attnpool.pooling.attention import AttentionPool2d, AvgAttnPooling2dS
from attnpool.pooling.paper import PaperAggregation
from attnpool.pooling.start import ClassQueryPooling2d
from attnpool.registry import BadInput

NI = 16


def relative(a, b): return ((a - b).abs().max() / b.abs().max()).item()


def called(attn, x, query, return_mean=False):
    "The attention by calling its layers, in plain torch."
    t = attn.norm(x.flatten(2).mT)
    def split(o): return o.unflatten(-1, (attn.num_heads, -1)).transpose(-3, -2)
    q, k, v = split(attn.q(query)), split(attn.k(t)), split(attn.v(t))
    found = ((attn.scale * q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)
    out = attn.proj(found)
    out = out.squeeze(1) if len(query) == 1 else out
    return (out, x.mean((2, 3))) if return_mean else out


class Adapted(nn.Module):
    "A linear layer and a branch of low rank beside it, as adapters add it."
    def __init__(self, layer, rank=2):
        super().__init__()
        self.layer, self.down, self.up = layer.requires_grad_(False), nn.Linear(layer.in_features, rank), nn.Linear(rank, layer.out_features)
    def forward(self, x): return self.layer(x) + self.up(self.down(x))


class Doubling(nn.Linear):
    "A subclass with a forward of its own, as quantised layers are."
    def forward(self, x): return 2 * super().forward(x)


def subclass(layer):
    layer.__class__ = Doubling
    return layer


def own_forward(layer):
    "As tools do that move weights about: a new forward on the object."
    layer.forward = lambda x, before=layer.forward: 3 * before(x)
    return layer


def hooked(layer):
    layer.register_forward_hook(lambda m, args, out: out * 1.5)
    return layer


def pre_hooked(layer):
    layer.register_forward_pre_hook(lambda m, args: (args[0] * .5,))
    return layer


def lazy(layer): return nn.LazyLinear(layer.out_features)


CHANGES = dict(adapted=Adapted, subclass=subclass, own_forward=own_forward, hooked=hooked, pre_hooked=pre_hooked, lazy=lazy,
               weight_norm_hook=nn.utils.weight_norm, spectral_norm_hook=nn.utils.spectral_norm,
               pruned=lambda l: prune.l1_unstructured(l, "weight", .5), weight_norm=parametrizations.weight_norm,
               spectral_norm=parametrizations.spectral_norm, orthogonal=parametrizations.orthogonal)


def changed(change, where):
    "An attention with one changed layer, the same at every call."
    torch.manual_seed(1)
    attn = AttentionPool2d(NI, num_heads=2, init_std=.5).double()
    setattr(attn, where, CHANGES[change](getattr(attn, where)).double())
    return attn


def trained(attn, f, x, query, steps=3):
    "Outputs and gradients of a few steps of training."
    found, opt = [], None
    for i in range(steps):
        torch.manual_seed(i)
        if opt: opt.zero_grad()
        out = f(x, query)
        opt = opt or torch.optim.SGD(attn.parameters(), .01)   # a lazy layer has weights from its first call on
        out.square().sum().backward()
        found.append((out.detach(), {n: p.grad.clone() for n, p in attn.named_parameters() if p.grad is not None}))
        opt.step()
    return found


@pytest.mark.filterwarnings("ignore:`torch.nn.utils", "ignore:.*Lazy")
@pytest.mark.parametrize("where", ["q", "k", "v", "proj"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_layer_counts_and_trains(change, where):
    ours, exact = changed(change, where), changed(change, where)
    x, query = torch.randn(3, NI, 3, 4, dtype=torch.float64), torch.randn(1, NI, dtype=torch.float64)
    with forms_used() as used: found = trained(ours, ours, x, query)
    for (out, grads), (wanted, wanted_grads) in zip(found, trained(exact, lambda *a: called(exact, *a), x, query)):
        assert relative(out, wanted) <= 1e-10 and grads.keys() == wanted_grads.keys()
        scale = max(g.abs().max() for g in wanted_grads.values())
        assert max((grads[n] - g).abs().max() for n, g in wanted_grads.items()) <= 1e-10 * scale
    assert not torch.equal(found[0][0], found[2][0])   # the steps are in what comes out
    folds = change in ("weight_norm", "spectral_norm", "orthogonal") or where in ("q", "proj")
    assert used == ({"folded"} if folds else {"folded", "plain"} if change == "lazy" else {"plain"})
    torch.manual_seed(5)
    maps = ours.eval().attention_map(x, query)
    t, scores = exact.eval().norm(x.flatten(2).mT), []
    torch.manual_seed(5)
    for q, k in zip(exact.q(query).chunk(2, -1), exact.k(t).chunk(2, -1)): scores.append((q @ k.mT).squeeze(1))
    assert (maps.flatten(2) - torch.stack(scores, 1).softmax(-1)).abs().max() <= 1e-10


POOLS = {name: (lambda name=name: HEADS[name](NI, 3)) for name in HEADS} | dict(
    mix=lambda: HEADS["avgstart"](NI, 3, mix=.5), rms=lambda: HEADS["concat"](NI, 3, norm=nn.RMSNorm), paper=lambda: PaperAggregation(NI),
    several=lambda: PaperAggregation(NI, queries=3, sees_itself=False), mish=Mish)


def built(pool):
    "In float64, with weights that are not those of the start."
    torch.manual_seed(2)
    module = POOLS[pool]().double().eval()
    with torch.no_grad():
        for p in module.parameters(): p += .3 * torch.randn_like(p)
    return module


def dual(f, x, dx):
    with forward_ad.dual_level(): return forward_ad.unpack_dual(f(forward_ad.make_dual(x, dx))).tangent


def twice(f, x, dx):
    g, = torch.autograd.grad(total(f)(x), x, create_graph=True)
    return torch.autograd.grad((g * dx).sum(), x)[0]


def many(f, x, dx):
    out = f(x)
    many = torch.linspace(-1, 1, 3 * out.numel(), dtype=x.dtype).view(3, *out.shape)
    return torch.autograd.grad(out, x, many, is_grads_batched=True)[0]


def total(f): return lambda x: f(x).square().sum()
def along(f, x, dx): return lambda s: total(f)(x + s.view(-1, 1, 1, 1) * dx)   # a number for each picture
ONES = torch.ones(2, dtype=torch.float64)


TRANSFORMS = dict(
    jvp=lambda f, x, dx: torch.func.jvp(f, (x,), (dx,))[1], dual=dual,
    vjp=lambda f, x, dx: torch.func.vjp(total(f), x)[1](torch.ones((), dtype=x.dtype))[0],
    vmap=lambda f, x, dx: torch.func.vmap(lambda one: f(one[None])[0])(x),
    vmap_grad=lambda f, x, dx: torch.func.vmap(torch.func.grad(lambda one: total(f)(one[None])))(x),
    forward_over_reverse=lambda f, x, dx: torch.func.jvp(torch.func.grad(total(f)), (x,), (dx,))[1], twice=twice, many=many,
    jacfwd=lambda f, x, dx: torch.func.jacfwd(along(f, x, dx))(ONES), jacrev=lambda f, x, dx: torch.func.jacrev(along(f, x, dx))(ONES),
    hessian=lambda f, x, dx: torch.func.hessian(along(f, x, dx))(ONES),
    vectorized=lambda f, x, dx: torch.autograd.functional.jacobian(along(f, x, dx), ONES, vectorize=True))


@pytest.mark.parametrize("side", [4, 48])   # the larger one is read in chunks
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("pool", POOLS)
def test_transforms_of_functions(pool, transform, side):
    x, dx = torch.randn(2, NI, side, side, dtype=torch.float64, requires_grad=True), torch.randn(2, NI, side, side, dtype=torch.float64)
    module = built(pool)
    assert in_chunks(x) == (side == 48)
    found = TRANSFORMS[transform](module, x, dx).detach()
    if pool == "mish": exact = TRANSFORMS[transform](F.mish, x, dx)
    else:
        with form("plain"): exact = TRANSFORMS[transform](module, x, dx)
    assert relative(found, exact.detach()) <= 1e-9


@pytest.mark.parametrize("pool", POOLS)
def test_derivatives_of_every_kind_against_differences(pool, monkeypatch):
    monkeypatch.setattr(chunks, "SMALL", 0)
    module, x = built(pool), torch.randn(2, NI, 1, 2, dtype=torch.float64, requires_grad=True)
    assert in_chunks(x)
    assert torch.autograd.gradcheck(module, x, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(module, x, check_fwd_over_rev=True, check_batched_grad=True, fast_mode=True)
