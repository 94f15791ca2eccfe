"What the screen of the second comparison tried on the pool that starts as the average: gate, temperature, hidden positions."
import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attnpool.cli import main
from attnpool.heads import AvgStartAttnPoolHead
from attnpool.pooling import check_head, check_pool
from attnpool.registry import BadInput

FILE = Path(__file__).parent.parent / "docs/results/verdict2/candidates.py"
_spec = importlib.util.spec_from_file_location("candidates", FILE)
candidates = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(candidates)
Candidate, CandidatePooling2d = candidates.Candidate, candidates.CandidatePooling2d
C = 48


def random_map(*shape): return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def moved(pool):
    g = torch.Generator().manual_seed(2)
    for p in pool.parameters(): p.data += torch.randn(p.shape, generator=g, dtype=torch.float64).to(p) * p.shape[-1]**-.5
    return pool


def test_candidates_keep_the_contract():
    check_pool(moved(CandidatePooling2d(C, gate=.2, learn_temperature=True, temperature=.5)), C)
    for options in (dict(gate=.5), dict(learn_temperature=True), dict(drop=.25), dict(drop=.25, drop_random=True)):
        check_head(lambda ni, n_out: Candidate(ni, n_out, **options), 64, 3)


def test_without_options_it_is_avgstart():
    ours, plain, x = moved(Candidate(C, 5, mix=.3).eval()), AvgStartAttnPoolHead(C, 5, mix=.3).eval(), torch.randn(4, C, 5, 3)
    plain.load_state_dict(ours.state_dict())
    assert torch.equal(ours(x), plain(x)) and torch.equal(ours[0].attention_map(x), plain[0].attention_map(x))


def test_a_candidate_trains_by_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(FILE.parent)
    with pytest.raises(SystemExit) as e:
        main(["bench", "digits-4", "--heads", "candidates:Candidate", "--options", "gate=.5,drop=.25", "--steps", "3", "--epochs", "1", "--size", "32", "--seeds", "1", "--jobs", "1",
              "--device", "cpu", "--out", str(tmp_path / "runs")])
    assert e.value.code == 0 and "candidates:Candidate gate=0.5 drop=0.25" in capsys.readouterr().out.replace("drop=0.25 gate=0.5", "gate=0.5 drop=0.25")


def weights(pool, x, gate=None, factor=1.):
    t = F.layer_norm(x.flatten(2).mT, (x.shape[1],))
    a = (t @ (pool.query * factor).mT).softmax(1).mT   # (b, k, n)
    return a if gate is None else (1 - gate) * a + gate / a.shape[2]


def pooled(a, x): return torch.einsum("bkn,bkdn->bkd", a, x.flatten(2).unflatten(1, (a.shape[1], -1))).flatten(1)


@pytest.mark.parametrize("mix", [0., .25])
@pytest.mark.parametrize("b", [3, 40])
def test_gate_in_numbers(b, mix):
    pool = CandidatePooling2d(C, 4, gate=.3, mix=mix).double().eval()
    nn.init.normal_(pool.query), nn.init.normal_(pool.gate)
    x, gate = random_map(b, C, 5, 7).requires_grad_(), pool.gate.sigmoid()
    a = (1 - gate) * ((1 - mix) * weights(pool, x) + mix / 35) + gate / 35
    expected, out, target = pooled(a, x), pool(x), random_map(b, C)
    assert torch.allclose(out, expected, atol=1e-12) and torch.allclose(pool.attention_map(x).flatten(2), a, atol=1e-12)
    inputs = (x, pool.query, pool.gate)
    for ours, literal in zip(*(torch.autograd.grad((y * target).sum(), inputs, retain_graph=True) for y in (out, expected))):
        assert torch.allclose(ours, literal, atol=1e-11)


@pytest.mark.parametrize("options", [dict(gate=.5), dict(gate=.01, n_queries=1), dict(learn_temperature=True), dict(temperature=.1), dict(gate=.9, mix=.5)])
def test_gate_and_temperature_start_as_the_average(options):
    x, means = random_map(4, C, 5, 3).requires_grad_(), []
    pool = CandidatePooling2d(C, **options).double()
    for y in (pool(x), x.mean((2, 3))): means.append((y, torch.autograd.grad((y**3).sum(), x, retain_graph=True)[0]))
    for ours, theirs in zip(*means): assert torch.allclose(ours, theirs, atol=1e-13)
    (pool(x)**3).sum().backward()
    assert pool.query.grad.abs().max() > 0   # it is no saddle: the queries move first, gate and temperature then
    if pool.gate is not None: assert pool.gate.grad.abs().max() < 1e-12 and pool.gate.sigmoid().mean().item() == pytest.approx(options["gate"])
    torch.optim.SGD(pool.parameters(), 1.).step()
    pool.zero_grad()
    (pool(x)**3).sum().backward()
    assert all(p.grad.abs().max() > 1e-9 for p in pool.parameters())


def test_temperature_is_a_rate_of_the_queries():
    "With Adam, queries at temperature 1/10 move as those at a rate ten times as high."
    x, target, asked = random_map(8, C, 4, 4), random_map(8, C), []
    for temperature, rate in ((.1, 1e-3), (1., 1e-2)):
        pool = CandidatePooling2d(C, temperature=temperature).double()
        opt = torch.optim.Adam(pool.parameters(), rate, eps=0)
        for _ in range(5):
            opt.zero_grad()
            (pool(x) - target).square().sum().backward()
            opt.step()
        asked.append(pool.queries().detach())
        assert torch.allclose(pool(x), pooled(weights(pool, x, factor=1 / temperature), x), atol=1e-12)
    assert torch.allclose(*asked, rtol=1e-6) and asked[0].abs().max() > 1e-3
    pool = CandidatePooling2d(C, temperature=2., learn_temperature=True).double()
    nn.init.normal_(pool.query), nn.init.normal_(pool.sharpness)
    assert torch.allclose(pool(x), pooled(weights(pool, x, factor=pool.sharpness.exp() / 2), x), atol=1e-12)


def seen(pool, b=2000):
    "The weights of the only query, for `b` pictures: position `i` of the map holds 1 in channel `i`."
    torch.manual_seed(0)
    return pool(torch.eye(12, dtype=torch.float64).view(1, 12, 3, 4).expand(b, -1, -1, -1)).detach()


@pytest.mark.parametrize("at_random", [False, True])
def test_hidden_positions(at_random):
    pool = CandidatePooling2d(12, 1, drop=.25, drop_random=at_random).double()
    nn.init.normal_(pool.query, generator=torch.Generator().manual_seed(1))
    plain, a = seen(pool.eval(), 1), seen(pool.train())
    hidden = a == 0
    some = hidden.any(1)
    assert some.double().mean().item() == pytest.approx(.5, abs=.05) and (hidden[some].sum(1) == 3).all()
    assert torch.allclose(a[~some], plain.expand(int((~some).sum()), -1), atol=1e-14)
    left = plain * ~hidden
    assert torch.allclose(a, left / left.sum(1, keepdim=True), atol=1e-14)   # the others share the weight
    often = hidden[some].double().mean(0)
    if at_random: assert (often - .25).abs().max() < .06
    else: assert set(often.topk(3).indices.tolist()) == set(plain[0].topk(3).indices.tolist()) and often.topk(3).values.min() == 1
    assert (pool.attention_map(torch.eye(12).double().view(1, 12, 3, 4)).flatten(1) - plain).abs().max() < 1e-14


def test_at_the_start_any_position_is_hidden_and_controls_are_averages_of_the_others():
    for options in (dict(), dict(drop_random=True), dict(gate=.5), dict(mix=1., drop_random=True)):
        pool = CandidatePooling2d(12, 1, drop=.5, **options).double()
        for start in (True, False):
            a = seen(pool)
            often = (a == 0).double().mean(0)
            assert (often - .25).abs().max() < .05, options   # half of them in half of the pictures
            assert torch.allclose(a[a > 0], torch.where((a == 0).any(1, keepdim=True), 1 / 6, 1 / 12).double().expand_as(a)[a > 0])
            if "mix" not in options: break
            nn.init.normal_(pool.query)   # the control stays an average
    assert CandidatePooling2d(12, 1, drop=.5)(torch.randn(2, 12, 1, 1)).isfinite().all()   # nothing to hide in one position


def test_hidden_positions_have_the_gradients_of_autograd():
    pool, x = moved(CandidatePooling2d(12, 3, drop=.4, gate=.3, mix=.5, learn_temperature=True).double()), random_map(3, 12, 2, 3).requires_grad_()
    def f(x, *params):
        torch.manual_seed(7)
        return torch.func.functional_call(pool, dict(zip(dict(pool.named_parameters()), params)), (x,))
    assert torch.autograd.gradcheck(f, (x, *pool.parameters()))


def test_efficient_probing_from_zero():
    head, x = candidates.ep_zero(64, 5).double(), random_map(2, 64, 3, 5)
    assert not head[0].layer.query.any() and head[0].layer.query.requires_grad
    assert torch.allclose(head[0](x), head[0].layer.v(x.mean((2, 3))), atol=1e-13)
    assert torch.allclose(head[0].attention_map(x), torch.full((2, 32, 3, 5), 1 / 15).double())
    (head(x)**2).sum().backward()
    assert head[0].layer.query.grad.any()


@pytest.mark.parametrize("options, words", [
    (dict(gate=0.), "gate: expected a share between 0 and 1, got 0.0. Use .5"),
    (dict(temperature=0), "temperature: expected a number above 0, got 0"),
    (dict(drop=1.), "drop: expected a rate in [0, 1), got 1.0"),
])
def test_bad_input_of_candidates(options, words):
    with pytest.raises(BadInput) as e: CandidatePooling2d(C, **options)
    assert words in str(e.value)
