"Layers that are hooked, adapted, quantised, pruned or parametrized count as they would when called; transforms of pools."
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from attnpool.fold import affine, foldable
from attnpool.forms import form, forms_used, readable
from attnpool.functional import attention_pool
from attnpool.heads import fold, HEADS, LearnedAggregationHead
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
