"A colour means the same in every picture of a figure, and a map that is no finding does not look like one."
import math

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from attnpool.heads import AvgPoolHead, AvgStartAttnPoolHead, HEADS, LearnedAggregationHead
from attnpool.maps.compute import as_saliency, attention_maps, class_activation_map, grad_cam, maps_of, Saliency, saliency
from attnpool.maps.draw import looks_everywhere, Scale, scale_of, show_heads, show_maps
from attnpool.models.xresnet import xeca_resnext_tiny

matplotlib.use("Agg")


def over(ax):
    "The colours laid over a picture."
    return np.asarray(ax.images[1].get_array())


@pytest.mark.parametrize("high", [4., 7.5, 49.])
def test_scale_of_multiples_is_logarithmic_with_average_pooling_in_the_middle(high):
    scale = Scale("uniform", high)
    values = torch.tensor([0., 1 / high / 2, 1 / high, high**-.5, 1., high**.5, high, 2 * high])
    assert torch.allclose(scale.level(values), torch.tensor([-1., -1, -1, -.5, 0, .5, 1, 1]), atol=1e-6)
    at = dict(scale.ticks())
    assert at[0.] == "1×" and at[1.] == f"{high:.2g}×" and at[-1.] == f"1/{high:.2g}×"
    assert float(at[.5][:-1]) == pytest.approx(high**.5, rel=.05)


def test_scale_of_logits_is_linear_about_none():
    scale = Scale("logit", 5.)
    assert torch.allclose(scale.level(torch.tensor([-7., -5, -1, 0, 2.5, 9])), torch.tensor([-1., -1, -.2, 0, .5, 1]))
    assert [t for _, t in scale.ticks()] == ["-5", "-2.5", "0", "+2.5", "+5"]


def test_scale_has_a_neutral_middle_and_more_ink_to_both_ends():
    table = Scale("uniform", 4.).table().astype(int)
    assert table.shape == (255, 4) and table[127, 3] == 0
    assert (np.diff(table[127:, 3]) >= 0).all() and (np.diff(table[:128, 3]) <= 0).all()
    assert table[-1, 3] == table[0, 3] == round(255 * .72)
    light = table[:, :3] @ [.2126, .7152, .0722]
    assert light[128:].min() > light[:127].max() - 60 and light[-1] > light[0] + 150   # told apart without hue
    drawn = Scale("uniform", 4.).colours(torch.tensor([[1., 4.], [.25, 100.]]))
    assert (drawn == table[[[127, 254], [0, 254]]]).all() and drawn.dtype == np.uint8


def test_scale_ends_at_a_quantile_of_all_maps_but_never_near():
    a, b = torch.ones(3, 1, 10, 10), torch.ones(1, 1, 10, 10)
    assert scale_of([Saliency(a, "uniform")]) == Scale("uniform", 4.)
    b[0, 0, 0] = 30.   # ten of four hundred positions
    assert scale_of([Saliency(a, "uniform"), Saliency(b, "uniform")]).high == 30
    b[0, 0, 0, 3:] = 1.   # three
    assert scale_of([Saliency(a, "uniform"), Saliency(b, "uniform")]).high == 4
    assert scale_of([Saliency(-8 * a, "logit")]) == Scale("logit", 8.) and scale_of([Saliency(.1 * a, "logit")]).high == 2
    with pytest.raises(ValueError, match="maps: expected those of one unit, got logit, uniform"):
        scale_of([Saliency(a, "logit"), Saliency(a, "uniform")])
    with pytest.raises(ValueError, match="maps: .*not finite"): scale_of([Saliency(a * torch.nan, "mean")])


@pytest.mark.parametrize("name", [n for n in HEADS if n != "avg"])
def test_scale_of_attention_is_multiples_of_uniform(name):
    model, x = xeca_resnext_tiny(4, custom_head=HEADS[name]).eval(), torch.randn(2, 3, 48, 80)
    maps, found = attention_maps(model, x), saliency(model, x)
    assert found.unit == "uniform"
    assert torch.allclose(found.values, maps * maps[0, 0].numel(), rtol=1e-4)
    assert torch.allclose(found.values.mean((2, 3)), torch.ones(maps.shape[:2]), atol=1e-5)


def test_scale_of_class_activation_is_that_of_the_logit():
    model, x = xeca_resnext_tiny(5, custom_head=AvgPoolHead).double().eval(), torch.randn(3, 3, 40, 56, dtype=torch.float64)
    every = torch.arange(5).expand(3, 5)
    found = saliency(model, x, every)
    assert found.unit == "logit" and found.values.shape[:2] == (3, 5)
    with torch.no_grad(): logits = model(x) - model[-1][-1].bias
    assert torch.allclose(found.values.mean((2, 3)), logits, atol=1e-12)
    assert torch.equal(saliency(model, x).values, class_activation_map(model, x))


def test_scale_of_grad_cam_is_multiples_of_its_mean():
    model, x = xeca_resnext_tiny(5, custom_head=LearnedAggregationHead).eval(), torch.randn(3, 3, 40, 56)
    target = torch.tensor([[0, 3], [1, 1], [4, 2]])
    found, cam = saliency(model, x, target), grad_cam(model, x, target)
    assert found.unit == "mean"
    seen = cam.sum((2, 3)) > 0
    ratio = (cam / cam.mean((2, 3), keepdim=True).clamp(min=1e-30))[seen]
    assert torch.allclose(found.values[seen], ratio, rtol=1e-4) and (found.values[~seen] == 0).all()


def test_scale_of_plain_maps_is_found():
    weights = torch.rand(2, 3, 4, 5).flatten(2).softmax(-1).view(2, 3, 4, 5)
    assert as_saliency(weights).unit == "uniform" and as_saliency(3 * weights).unit == "mean"
    assert torch.allclose(as_saliency(weights).values, as_saliency(3 * weights).values, rtol=1e-5)
    assert as_saliency(weights.half()).unit == "uniform" and as_saliency(weights.half()).values.dtype == torch.float32
    assert as_saliency(weights - 1).unit == "logit" and torch.equal(as_saliency(weights - 1).values, weights - 1)
    assert as_saliency(as_saliency(weights)) is not None and as_saliency(torch.zeros(1, 1, 2, 2)).values.eq(0).all()
    for bad in (torch.nan, torch.inf):
        weights[0, 0, 0, 0] = bad
        with pytest.raises(ValueError, match="maps: .*not finite.*diverged"): as_saliency(weights)
    with pytest.raises(ValueError, match=r"maps: expected \(b, k, h, w\), got \(4, 5\)"): as_saliency(weights[0, 1])


def test_scale_words_for_a_map_that_is_nearly_uniform():
    def everywhere(*values, unit="uniform"): return looks_everywhere(Saliency(torch.tensor([[[values]]]), unit)).item()
    assert everywhere(1., 1, 1) and everywhere(1.2, .8, 1) and everywhere(1.)
    assert not everywhere(1.6, .7, .7) and not everywhere(1.2, 1.2, .6)
    assert everywhere(.2, -.2, .1, unit="logit") and everywhere(8., 7, 9, unit="logit") and everywhere(-8., -7, unit="logit")
    assert not everywhere(0., 0)   # a map of zeros looks nowhere
    assert not everywhere(3., 0, 0, unit="logit") and not everywhere(3., -3, unit="logit")
    two = Saliency(torch.tensor([[[[2., 0]], [[0., 2]]]]), "uniform")   # the mean over k is drawn, and judged
    assert looks_everywhere(two).item()


def test_scale_is_one_for_all_pictures_and_heads_of_a_figure():
    torch.manual_seed(0)
    heads = {}
    for name, head in dict(sharp=AvgStartAttnPoolHead, uniform=AvgStartAttnPoolHead, average=AvgPoolHead).items():
        heads[name] = xeca_resnext_tiny(3, custom_head=head).eval()
    nn.init.normal_(heads["sharp"][-1][0].query, std=1.)
    with torch.no_grad(): heads["average"][-1][-1].weight.mul_(20)
    x = torch.randn(2, 3, 48, 48)
    fig = show_heads(heads, x)
    cells, bars = fig.axes[:6], fig.axes[6:]
    assert len(bars) == 2 and [b.get_ylabel() for b in bars] == ["average pooling", "logits"]
    assert (over(cells[2])[..., 3] == 0).all() and over(cells[0])[..., 3].max() > 60
    assert [any("looks everywhere" in t.get_text() for t in ax.texts) for ax in cells[:4]] == [False, False, True, True]
    scale = scale_of([Saliency(saliency(heads[n], x).values.mean(1, keepdim=True), "uniform") for n in ("sharp", "uniform")])
    assert [t.get_text() for t in bars[0].get_yticklabels()] == [t for _, t in scale.ticks()]


def test_scale_of_its_own_for_each_picture_is_said():
    maps = torch.stack([torch.eye(4) / 4, torch.full((4, 4), 1 / 16)])[:, None]
    fig = show_maps(torch.randn(2, 3, 32, 32), maps, titles=["a", "b"], stretch=True)
    assert len(fig.axes) == 2   # no bar: there is no common scale
    assert [ax.get_title() for ax in fig.axes] == ["a\nstretched: 0 to 4×", "b\nstretched: 1 to 1×"]
    assert over(fig.axes[0])[..., 3].max() == round(255 * .72) and (over(fig.axes[1])[..., 3] == 0).all()
    plain = show_maps(torch.randn(2, 3, 32, 32), maps, titles=["a", "b"])
    assert [ax.get_title() for ax in plain.axes[:2]] == ["a", "b\nlooks everywhere"] and len(plain.axes) == 3


def test_scale_and_picture_in_their_own_pixels():
    photo, wide = Image.new("RGB", (300, 200), "red"), np.zeros((50, 400, 3), np.uint8)
    crops = torch.tensor([[50., 0, 250, 200], [0., 0, 400, 50]])
    maps = torch.ones(2, 1, 2, 2)
    fig = show_maps([photo, wide], maps, crops=crops, boxes=torch.tensor([[60., 10, 80, 30], [0, 0, 9, 9]]))
    first, second = fig.axes[:2]
    assert first.images[0].get_array().shape == (200, 300, 3) and second.images[0].get_array().shape == (50, 400, 3)
    assert first.images[1].get_extent() == [49.5, 249.5, 199.5, -.5]
    assert len(first.patches) == 2 and len(second.patches) == 1   # the whole picture needs no outline
    assert first.patches[0].get_bbox().bounds == (49.5, -.5, 200, 200)
    padded = show_maps([photo], maps[:1], crops=torch.tensor([[0., -50, 300, 250]])).axes[0]
    assert padded.get_ylim() == (249.5, -50.5)
    huge = show_maps([Image.new("RGB", (12000, 3000))], maps[:1], crops=torch.tensor([[4500., 0, 7500, 3000]])).axes[0]
    h, w, _ = huge.images[0].get_array().shape
    assert w < 1000 and math.isclose(w / h, 4, rel_tol=.02)
    left, right, *_ = huge.images[1].get_extent()
    assert math.isclose((right - left) / w, .25, rel_tol=.01)
    with pytest.raises(ValueError, match="maps: expected one for each of 2 pictures, got 1"): show_maps([photo, wide], maps[:1])


def test_scale_of_maps_that_are_clamped_is_that_of_their_mean():
    model, x = xeca_resnext_tiny(3, custom_head=AvgPoolHead).eval(), torch.randn(2, 3, 40, 40)
    assert as_saliency(maps_of(model, x)).unit == "mean"
