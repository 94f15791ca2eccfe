"Dispatch: which form runs for which size, its numbers, and the command that measures it."
from contextlib import nullcontext

import pandas as pd
import pytest
import torch
from torch import nn

from attnpool.cli import main
from attnpool.cost import dispatch
from attnpool.forms import form, forms_used
from attnpool.functional import spared
from attnpool.pooling.attention import AttentionPool2d


def problem(b, c, side, queries=1, heads=1, dtype=torch.float64, grad=True):
    torch.manual_seed(1)
    attn = AttentionPool2d(c, num_heads=heads, init_std=c**-.5).to(dtype)
    with torch.no_grad():
        for p in (attn.q.bias, attn.k.bias, attn.v.bias, attn.norm.weight, attn.norm.bias): p += torch.randn_like(p)
    x = torch.randn(b, c, side, side, dtype=dtype).requires_grad_(grad)
    return attn, x, torch.randn(queries, c, dtype=dtype).requires_grad_(grad)


def ran(attn, x, query, name=None):
    with form(name) if name else nullcontext(), forms_used() as used: out = attn(x, query)
    assert len(used) == 1
    return out, used.pop()


@pytest.mark.parametrize("b, c, side, queries, chosen", [
    (1, 64, 1, 1, "plain plain"), (1, 64, 7, 1, "plain plain"), (32, 64, 1, 1, "plain plain"), (1, 512, 1, 1, "plain plain"),
    (16, 256, 1, 32, "plain plain"), (32, 64, 7, 1, "folded plain"), (1, 512, 7, 1, "folded plain"), (8, 512, 4, 16, "folded plain"),
    (32, 256, 5, 1, "folded folded"), (64, 512, 2, 1, "folded folded"), (32, 512, 7, 4, "folded folded")])
def test_dispatch_by_the_arithmetic_that_is_spared(b, c, side, queries, chosen):
    attn, x, query = problem(b, c, side, queries, dtype=torch.float32, grad=False)
    for dtype, form_of in zip((torch.float32, torch.bfloat16), chosen.split()):   # whose products are quicker
        assert ran(attn.to(dtype), x.to(dtype), query.to(dtype))[1] == form_of
    attn.float()
    for asked in ("folded", "plain"): assert ran(attn, x, query, asked)[1] == asked


def test_dispatch_spares_what_the_counter_sees():
    from torch.utils.flop_counter import FlopCounterMode
    def madds(name, attn, x, query):
        with form(name), torch.no_grad(), FlopCounterMode(display=False) as count: attn(x, query)
        return count.get_total_flops() // 2
    for b, c, side, queries in ((4, 32, 3, 1), (5, 32, 1, 1), (2, 32, 6, 3), (3, 32, 2, 40)):
        args = problem(b, c, side, queries, grad=False)
        n = side**2
        late = queries == 1 or queries * n + queries * c <= (c + queries) * n
        found = madds("plain", *args) - madds("folded", *args)
        assert abs(found - spared(c * c, b, n, queries, late)) <= 8 * b * (n + 2) * c * queries   # what reads the map aside


@pytest.mark.parametrize("queries, heads", [(1, 1), (3, 1), (1, 4), (40, 2)])
@pytest.mark.parametrize("bias", [True, False])
def test_dispatch_changes_no_number(queries, heads, bias):
    attn, x, query = problem(2, 16, 3, queries, heads)
    if not bias: attn.q.bias = attn.k.bias = attn.v.bias = None
    results = []
    for name in (None, "folded"):
        out, used = ran(attn, x, query, name)
        assert used == (name or "plain")
        grads = torch.autograd.grad(out, [x, query, *attn.parameters()], out.detach().cos())
        results.append([out.detach(), *grads])
    largest = max(t.abs().max() for t in results[1])
    for a, b in zip(*results): assert (a - b).abs().max() <= 1e-13 * largest


def test_dispatch_of_one_size_is_the_same_each_time_and_in_eval():
    attn, x, query = problem(2, 16, 3, dtype=torch.float32)
    outs = [attn(x, query) for _ in range(3)] + [attn.eval()(x, query)]
    with torch.no_grad(): outs.append(attn(x, query))
    assert all(torch.equal(outs[0], o) for o in outs)


def test_dispatch_leaves_alone_who_looks_at_the_operations():
    attn, x, query = problem(2, 16, 3, dtype=torch.float32, grad=False)
    assert ran(attn, x, query)[1] == "plain"
    with forms_used() as used: torch.func.vmap(lambda one: attn(one[None], query)[0])(x)
    assert used == {"folded"}
    nodes = [str(n.target) for n in torch.export.export(Fixed(attn, query), (x,)).graph.nodes]
    assert not any("layer_norm" in n for n in nodes) and sum("linear" in n for n in nodes) <= 3   # no keys of every position
    with torch.autocast("cpu", torch.bfloat16): assert ran(attn, x, query)[1] == "folded"   # statistics stay in float32
    attn.attn_drop = .5
    assert ran(attn.train(), x, query)[1] == "folded"   # the same weights are dropped in every size


class Fixed(nn.Module):
    def __init__(self, attn, query):
        super().__init__()
        self.attn, self.query = attn, nn.Parameter(query)
    def forward(self, x): return self.attn(x, self.query)


@pytest.mark.parametrize("shape", [(0, 8, 2, 2), (1, 8, 1, 1), (3, 8, 1, 5)])
def test_dispatch_of_next_to_nothing(shape):
    attn, query = AttentionPool2d(8), torch.randn(1, 8)
    x = torch.randn(shape, requires_grad=True)
    out = attn(x, query)
    assert out.shape == (shape[0], 8) and torch.autograd.grad(out.sum(), x)[0].shape == shape


def test_dispatch_checks_the_map_first():
    with pytest.raises(ValueError, match="x: expected 8 channels, got 6"): AttentionPool2d(8)(torch.randn(1, 6, 2, 2), torch.randn(1, 8))


def test_dispatch_is_measured_in_every_size(tmp_path):
    lines = []
    table = dispatch.measure_dispatch((1, 4), (32, 64), (1, 2), (1, 3), formats=("contiguous", "channels_last"), largest=1000, rounds=1,
                                      progress=lines.append)
    sizes = table[["side", "channels", "batch"]].drop_duplicates()
    assert (sizes.prod(axis=1) * sizes.side <= 1000).all() and len(sizes) == 5 and len(table) == 5 * 2 * 2 * 2 and len(lines) == 8
    assert set(table.form) == {"plain"} and (table[["plain", "folded", "chosen"]] > 0).all().all()
    assert torch.allclose(torch.tensor(table.over_plain.values), torch.tensor((table.chosen / table.plain).values))
    summary = dispatch.dispatch_summary(table)
    assert summary.sizes.sum() == len(table) and summary.worst.max() == round(table.over_plain.max(), 2)
    figure = dispatch.plot_dispatch(table)
    assert [ax.get_title() for ax in figure.axes] == [f"{k}: {t} ÷ plain" for k in ("forward", "training") for t in ("folded", "chosen")]
    with pytest.raises(ValueError, match="formats: 'channel_last' is unknown. Did you mean 'channels_last'"):
        dispatch.measure_dispatch((1,), (8,), (1,), formats=("channel_last",))


def test_dispatch_from_the_command_line(monkeypatch, tmp_path, capsys):
    small = dict(sides=(1, 2), channels=(16,), batches=(1,), rounds=1)
    monkeypatch.setattr(dispatch, "QUICK", small)
    with pytest.raises(SystemExit) as e: main(["speed", "--dispatch", "--quick", "--out", str(tmp_path)])
    out = capsys.readouterr().out
    assert e.value.code == 0 and "16 channels, 1 queries, float32, contiguous" in out and "forward  plain" in out
    assert sorted(f.name for f in tmp_path.iterdir()) == ["dispatch.csv", "dispatch.png"]
    assert len(pd.read_csv(tmp_path / "dispatch.csv", comment="#")) == 4
