"MixUp and CutMix: pixels against a slow loop, labels against the pixels, draws against their distributions."
import inspect

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy import stats
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from attnpool import mixing
from attnpool.mixing import (
    apply_mix, check_target, CUTMIX, cutmix, cutmix_box, cutmixup, draw_kinds, draw_mix, Mix, mix_labels,
    mix_pictures, MIXUP, mixup, pixel_weights, REST)
from attnpool.registry import BadInput

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
MODES = dict(mixup=mixup, mixup_batch=lambda x, y, **kw: mixup(x, y, per_sample=False, **kw), mixup_larger=lambda x, y, **kw: mixup(x, y, larger=True, **kw),
             cutmix=cutmix, cutmix_sample=lambda x, y, **kw: cutmix(x, y, per_sample=True, **kw),
             both=cutmixup, both_rest=lambda x, y, **kw: cutmixup(x, y, rest_ratio=1, cut_per_sample=True, **kw),
             both_batch=lambda x, y, **kw: cutmixup(x, y, rest_ratio=1, element=False, **kw),
             both_batch_sample=lambda x, y, **kw: cutmixup(x, y, element=False, cut_per_sample=True, **kw))


def gen(seed=0): return torch.Generator().manual_seed(seed)


def slow(x, mix):
    "Pixel by pixel, in float64."
    out = torch.empty_like(x, dtype=torch.float64)
    for i, p in enumerate(mix.partner.tolist()):
        left, top, right, bottom = mix.box[i].tolist()
        for r in range(x.shape[-2]):
            for c in range(x.shape[-1]):
                own = 0. if left <= c < right and top <= r < bottom else mix.lam[i]
                out[i, ..., r, c] = own * x[i, ..., r, c].double() + (1 - own) * x[p, ..., r, c].double()
    return out


@settings(max_examples=60, deadline=None)
@given(kinds=st.lists(st.sampled_from([MIXUP, CUTMIX, REST]), min_size=1, max_size=6), h=st.integers(1, 7), w=st.integers(1, 7),
       mix_per_sample=st.booleans(), cut_per_sample=st.booleans(), larger=st.booleans(), channels_last=st.booleans(),
       dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
def test_pixels_equal_a_slow_loop(kinds, h, w, mix_per_sample, cut_per_sample, larger, channels_last, dtype, seed):
    x = torch.randn(len(kinds), 3, h, w, generator=gen(seed)).to(dtype)
    if channels_last: x = x.to(memory_format=torch.channels_last)
    before = x.clone()
    mix = draw_mix(np.array(kinds), (h, w), 1., 1., mix_per_sample, cut_per_sample, larger, dtype, gen(seed))
    out = mix_pictures(x, mix)
    assert out.dtype == dtype and out.shape == x.shape and torch.equal(x, before)
    tol = dict(zip(DTYPES, (1e-14, 1e-6, 4e-2, 4e-3)))[dtype]
    assert (out.double() - slow(x, mix)).abs().max() <= tol
    map_form = torch.lerp(x[mix.partner], x, pixel_weights(mix, dtype=dtype)[:, None])   # the accelerators' form
    assert (map_form.double() - slow(x, mix)).abs().max() <= tol
    left, top, right, bottom = mix.box.T
    own = mix.lam * (h * w - (right - left) * (bottom - top)) / (h * w)
    assert np.abs(mix.share - own).max() < 1e-15
    assert sorted(mix.partner) == list(range(len(kinds)))
    assert all(mix.partner[i] == i and mix.share[i] == 1 for i, k in enumerate(kinds) if k == REST)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_no_label_is_wrong_in_100_000(mode, dtype):
    "Each class is a channel of its own that is 1 everywhere, so the mean over the pixels is the label that is due."
    n, bs, classes = (100_000, 1000, 4) if dtype == torch.float32 else (20_000, 100, 4)   # 100 batches at least: some are not mixed
    y = torch.randint(classes, (bs,), generator=gen(1))
    x = torch.eye(classes, dtype=dtype)[y][:, :, None, None].repeat(1, 1, 5, 7)
    g, wrong, mixed = gen(2), 0, 0
    for _ in range(n // bs):
        m = MODES[mode](x, y, generator=g)
        due = m.x.double().mean((2, 3))
        error = (m.soft(classes).double() - due).abs().amax(1)
        wrong += (error > (1e-12 if dtype == torch.float64 else 1e-6 if dtype == torch.float32 else 2**-8)).sum().item()   # bf16: rounding of the pixels
        mixed += (m.lam < 1).sum().item()
    assert wrong == 0 and mixed > n / 2
    assert torch.equal(m.y, y)


def test_lambda_is_what_half_pictures_really_get():
    x = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)]).to(torch.bfloat16)
    for seed in range(50):
        m = mixup(x, torch.tensor([0, 1]), alpha=1., generator=gen(seed))
        assert torch.equal(m.lam, m.lam.to(torch.bfloat16).float())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_arguments_untouched_format_and_seed_kept(mode, channels_last):
    x, y = torch.randn(9, 3, 8, 10), torch.arange(9)
    if channels_last: x = x.to(memory_format=torch.channels_last)
    versions = x._version, y._version
    m = MODES[mode](x, y, generator=gen(5))
    assert (x._version, y._version) == versions
    if channels_last: assert m.x.is_contiguous(memory_format=torch.channels_last)
    again = MODES[mode](x, y, generator=gen(5))
    assert all(torch.equal(a, b) for a, b in zip(m, again))
    torch.manual_seed(11)
    a = MODES[mode](x, y)
    torch.manual_seed(11)
    b = MODES[mode](x, y)
    assert all(torch.equal(i, j) for i, j in zip(a, b))
    seeds = [MODES[mode](x, y, generator=gen(s)) for s in range(6)]
    assert len({tuple(m.lam.tolist()) + tuple(m.y2.tolist()) for m in seeds}) > 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n", [0, 1])
def test_batch_of_one_and_none(mode, n):
    x, y = torch.randn(n, 3, 6, 6), torch.zeros(n, dtype=torch.int64)
    m = MODES[mode](x, y, generator=gen())
    assert torch.allclose(m.x, x) and torch.equal(m.y2, y) and m.lam.shape == (n,)
    assert torch.allclose(m.soft(2), torch.tensor([[1., 0.]]).expand(n, 2))


class NoSync(TorchDispatchMode):
    "Fails on every operation that makes the host wait for the device."
    BAD = ("_local_scalar_dense", "nonzero", "masked_select", "item", "is_nonzero", "equal", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0]
        assert name not in self.BAD, name
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            assert not any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]), "boolean mask"
        return func(*args, **(kwargs or {}))


class NoAsking(TorchFunctionMode):
    "The same one level up: tolist reads memory without any dispatch on the CPU."
    BAD = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "cpu")

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert getattr(func, "__name__", "") not in self.BAD, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_asked_of_the_device(mode):
    x = torch.randn(9, 3, 8, 10)
    for y in (torch.arange(9), torch.rand(9, 4)):
        for seed in range(4):
            with NoSync(), NoAsking(): MODES[mode](x, y, generator=gen(seed)).soft(9)
    for mode in (NoSync, NoAsking):
        with pytest.raises(AssertionError), mode(): x[0, 0, 0, 0].item()
    with pytest.raises(AssertionError), NoSync(): x[x > 0]


@pytest.mark.cuda
@pytest.mark.parametrize("mode", MODES)
def test_no_synchronisation_on_a_gpu(mode):
    x, y = torch.randn(64, 3, 32, 32, device="cuda"), torch.arange(64, device="cuda")
    expected = MODES[mode](x.cpu(), y.cpu(), generator=gen(1))
    MODES[mode](x, y, generator=gen(1))
    torch.cuda.set_sync_debug_mode("error")
    try:
        m = MODES[mode](x, y, generator=gen(1))
        soft = m.soft(64)
    finally: torch.cuda.set_sync_debug_mode("default")
    assert torch.allclose(m.x.cpu(), expected.x, atol=1e-6) and torch.equal(m.lam.cpu(), expected.lam) and torch.allclose(soft.cpu(), expected.soft(64))


@pytest.mark.parametrize("ratios", [(1, 1, 1), (1, 1, 0), (2, 1, 3), (0, 1, 1), (0, 0, 1), (.2, .5, .3)])
@pytest.mark.parametrize("element", [True, False])
def test_shares_of_the_kinds(ratios, element):
    g, n = gen(3), 64
    draws = np.stack([draw_kinds(n, ratios, element, g) for _ in range(400)])
    if not element:
        assert (draws == draws[:, :1]).all()
        draws = draws[:, :1]
    count, due = np.bincount(draws.ravel(), minlength=3), np.array(ratios) / sum(ratios) * draws.size
    assert (count[due == 0] == 0).all()
    if (due > 0).sum() > 1: assert stats.chisquare(count[due > 0], due[due > 0]).pvalue > .01


@pytest.mark.parametrize("alpha", [.2, .4, 1., 8.])
@pytest.mark.parametrize("per_sample", [True, False])
def test_lambda_is_beta(alpha, per_sample):
    kinds, g = np.full(64, MIXUP), gen(4)
    lam = np.stack([draw_mix(kinds, (8, 8), alpha, mix_per_sample=per_sample, dtype=torch.float64, generator=g).lam for _ in range(40 if per_sample else 2000)])
    if not per_sample:
        assert (lam == lam[:, :1]).all()
        lam = lam[:, 0]
    beta = stats.beta(alpha, alpha)
    assert stats.kstest(lam.ravel(), beta.cdf).pvalue > .01
    assert abs(lam.mean() - .5) < 4 * beta.std() / lam.size**.5
    assert abs(lam.var() / beta.var() - 1) < .1
    larger = np.stack([draw_mix(kinds, (8, 8), alpha, larger=True, dtype=torch.float64, generator=g).lam for _ in range(40)]).ravel()
    assert larger.min() >= .5 and stats.kstest(larger, lambda v: beta.cdf(v) - beta.cdf(1 - v)).pvalue > .01


def test_lambda_of_cutmix_is_beta_before_clipping():
    n, g = 4000, gen(6)
    box = draw_mix(np.full(n, CUTMIX), (1001, 1001), cut_alpha=1., cut_per_sample=True, generator=g).box
    inside = box[(box[:, 0] > 0) & (box[:, 1] > 0) & (box[:, 2] < 1001) & (box[:, 3] < 1001)]
    assert (inside[:, 2] - inside[:, 0] == inside[:, 3] - inside[:, 1]).all()
    lam = np.random.default_rng(0).beta(1, 1, 200_000)                    # an independent simulation of the clipped share
    side, c = np.rint(np.sqrt(1 - lam) * 1001), np.random.default_rng(1).integers(0, 1001, (2, 200_000))
    clipped = [np.minimum(i - side // 2 + side, 1001) - np.maximum(i - side // 2, 0) for i in c]
    share = 1 - (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1]) / 1001**2
    assert stats.ks_2samp(share, 1 - clipped[0] * clipped[1] / 1001**2).pvalue > .01


def test_boxes():
    assert cutmix_box(1., (5, 9)).tolist() in ([[c, r, c, r]] for c in range(9) for r in range(5))   # nothing is cut
    centre = cutmix_box(np.full(12_000, .98), (6, 10), gen(8))   # one pixel
    assert ((centre[:, 2] - centre[:, 0] == 1) & (centre[:, 3] - centre[:, 1] == 1)).all()
    assert stats.chisquare(np.bincount(centre[:, 0] + 10 * centre[:, 1], minlength=60)).pvalue > .01
    whole = cutmix_box(np.zeros(1000), (6, 10), gen(9))
    assert (whole.min(0) == [0, 0, 5, 3]).all() and (whole.max(0) == [4, 2, 10, 6]).all()
    for lam in np.linspace(0, 1, 21):
        left, top, right, bottom = cutmix_box(np.full(200, lam), (7, 12), gen(10)).T
        assert (0 <= left).all() and (left <= right).all() and (right <= 12).all() and (0 <= top).all() and (top <= bottom).all() and (bottom <= 7).all()
        assert (right - left).max() == round(12 * (1 - lam)**.5) and (bottom - top).max() == round(7 * (1 - lam)**.5)


def test_partners_stay_among_the_mixed():
    kinds = np.array([MIXUP, REST, CUTMIX, REST, MIXUP, CUTMIX])
    seen = set()
    for seed in range(200):
        partner = draw_mix(kinds, (4, 4), generator=gen(seed)).partner
        assert (partner[[1, 3]] == [1, 3]).all() and sorted(partner) == list(range(6))
        seen |= {(i, p) for i, p in enumerate(partner.tolist())}
    assert len(seen) == 2 + 16   # every pair of mixed samples occurs


def test_alpha_zero_is_off():
    x, y = torch.randn(4, 3, 5, 5), torch.arange(4)
    for m in (mixup(x, y, alpha=0), cutmix(x, y, alpha=0), cutmixup(x, y, mix_alpha=0, cut_alpha=0)):
        assert torch.equal(m.x, x) and (m.lam == 1).all() and torch.equal(m.soft(4), torch.eye(4))


def test_the_share_of_the_page():
    m = Mix(np.array([1, 0]), np.ones(2), np.array([[10, 5, 30, 30], [0, 0, 0, 0]]), (40, 40))
    assert m.share.tolist() == [1 - 25 * 20 / 1600, 1]


@pytest.mark.parametrize("y", [torch.tensor([0, 2, 1]), torch.tensor([0, 2, 1], dtype=torch.int32), torch.eye(3)[[0, 2, 1]], torch.eye(3, dtype=torch.int64)[[0, 2, 1]],
                               torch.eye(3, dtype=torch.bool)[[0, 2, 1]]])
def test_kinds_of_targets_agree(y):
    x, lam = torch.randn(3, 1, 4, 4), torch.tensor([.75, .5, 1.])
    y2 = y.flip(0)
    expected = torch.tensor([[.75, .25, 0], [0, 0, 1], [0, 1, 0]])
    assert torch.allclose(mix_labels(y, y2, lam, 3), expected)
    m = cutmixup(x, y, generator=gen(0))
    assert torch.allclose(m.soft(3).sum(1), torch.ones(3))


def test_numbers_as_targets():
    m = mixup(torch.randn(5, 3, 4, 4), torch.linspace(0, 1, 5), generator=gen(0))
    assert torch.allclose(m.soft(), m.lam * m.y + (1 - m.lam) * m.y2)


def test_double_pictures_get_double_weights():
    m = mixup(torch.randn(5, 3, 4, 4, dtype=torch.float64), torch.arange(5), generator=gen(0))
    assert m.lam.dtype == m.soft(5).dtype == torch.float64
    assert mixup(torch.randn(5, 3, 4, 4).half(), torch.arange(5)).lam.dtype == torch.float32


def test_gradients_pass():
    x = torch.randn(4, 3, 6, 6, requires_grad=True)
    mix = draw_mix(np.array([MIXUP, CUTMIX, CUTMIX, REST]), (6, 6), cut_per_sample=True, generator=gen(0))
    mix_pictures(x, mix).sum().backward()
    due = torch.zeros(4)
    for i, p in enumerate(mix.partner):
        due[i] += mix.share[i]
        due[p] += 1 - mix.share[i]
    assert torch.allclose(x.grad.mean((1, 2, 3)), due.float())


x8, y8 = torch.randn(8, 3, 4, 4), torch.arange(8)


@pytest.mark.parametrize("call, error, words", [
    (lambda: mixup(x8, y8, alpha=-1), BadInput, "mix_alpha: expected a number of 0 or more, got -1"),
    (lambda: cutmix(x8, y8, alpha=float("nan")), BadInput, "cut_alpha"),
    (lambda: cutmixup(x8, y8, mixup_ratio=-1), BadInput, "mixup_ratio"),
    (lambda: cutmixup(x8, y8, mixup_ratio=0, cutmix_ratio=0), BadInput, "all ratios are 0"),
    (lambda: cutmixup(x8, y8, rest_ratio=float("inf")), BadInput, "rest_ratio"),
    (lambda: mixup(x8.byte(), y8), TypeError, "torch.uint8"),
    (lambda: mixup(x8[0, 0], y8), BadInput, r"One picture: x\[None\]"),
    (lambda: mixup([1, 2], y8), BadInput, "list"),
    (lambda: mixup(x8, list("abcdefgh")), TypeError, "got list"),
    (lambda: mixup(x8, torch.zeros(8, 4, 4)), BadInput, "cannot be mixed"),
    (lambda: mixup(x8, y8[:5]), BadInput, "one target for each of the 8"),
    (lambda: mixup(x8, y8).soft(), BadInput, "num_classes"),
    (lambda: mix_pictures(x8, draw_mix(np.zeros(8), (5, 5))), BadInput, "5x5"),
    (lambda: mix_pictures(x8, draw_mix(np.zeros(7), (4, 4))), BadInput, "expected 7 pictures"),
    (lambda: cutmix_box(1.5, (4, 4)), BadInput, "lam"),
    (lambda: check_target("cat"), TypeError, "got str"),
])
def test_errors_say_what_to_do(call, error, words):
    with pytest.raises(error, match=words): call()


def test_no_framework_is_imported():
    source = inspect.getsource(mixing)
    assert not any(f"import {m}" in source or f"from {m}" in source for m in ("fastai", "torchvision", "timm", "fastcore"))


def test_other_shapes():
    for shape in ((4, 6, 7), (4, 3, 5, 6, 7)):   # (b, h, w), (b, c, t, h, w)
        x = torch.randn(shape)
        mix = draw_mix(np.array([MIXUP, CUTMIX, CUTMIX, REST]), shape[-2:], cut_per_sample=True, generator=gen(0))
        assert (mix_pictures(x, mix).double() - slow(x, mix)).abs().max() < 1e-6
        assert apply_mix(x, torch.arange(4), mix).lam.shape == (4,)
