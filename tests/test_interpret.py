"Maps are the weights that the forward pass used, and asking for them leaves no trace."
import matplotlib
import pytest
import torch
from torch import nn

from attnpool.heads import HEADS, AvgPoolHead, LearnedAggregationHead
from attnpool.interpret import attention_maps, class_activation_map, find_pools, pointing_game, show_maps
from attnpool.models.xresnet import xeca_resnext_tiny

matplotlib.use("Agg")
ATTENTION = [n for n in HEADS if n != "avg"]


@pytest.mark.parametrize("name", ATTENTION)
def test_maps_of_every_head_at_odd_sizes(name):
    model = xeca_resnext_tiny(10, custom_head=HEADS[name])
    x = torch.randn(3, 3, 51, 38)
    maps = attention_maps(model, x)
    with torch.no_grad(): fmap = model.eval()[:-1](x)
    assert maps.shape == (3, 1, *fmap.shape[2:]) and not maps.requires_grad
    assert torch.allclose(maps, model[-1][0].attention_map(fmap), atol=1e-6)
    assert torch.allclose(maps.sum((2, 3)), torch.ones(3, 1))


def test_asking_leaves_no_trace():
    model = xeca_resnext_tiny(10, custom_head=LearnedAggregationHead)
    model[0].eval()   # a frozen layer stays in eval mode
    modes = [m.training for m in model.modules()]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(2, 3, 40, 40)
    attention_maps(model, x)
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    class Broken(nn.Module):
        def forward(self, x): raise RuntimeError("broken")
    with pytest.raises(RuntimeError, match="broken"): attention_maps(nn.Sequential(Broken(), LearnedAggregationHead(8, 2)), x)


def test_compiled_networks_and_fastai_tensors():
    from fastai.vision.all import TensorImage
    model, x = xeca_resnext_tiny(10, custom_head=LearnedAggregationHead), torch.randn(2, 3, 40, 40)
    compiled = torch.compile(model, backend="eager")
    assert list(find_pools(compiled)) == list(find_pools(model))
    maps = attention_maps(compiled, TensorImage(x))
    assert type(maps) is torch.Tensor and torch.equal(maps, attention_maps(model, x))
    avg = xeca_resnext_tiny(10, custom_head=AvgPoolHead)
    cam = class_activation_map(torch.compile(avg, backend="eager"), TensorImage(x))
    assert type(cam) is torch.Tensor and torch.equal(cam, class_activation_map(avg, x))


def test_a_pool_that_is_never_called_is_told():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = LearnedAggregationHead(3, 2)
        def forward(self, x): return x.mean((2, 3))
    with pytest.raises(ValueError, match="does not call its LearnedAggregation"): attention_maps(Unused(), torch.randn(1, 3, 4, 4))


def test_several_pools_are_told_apart():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = LearnedAggregationHead(8, 2), LearnedAggregationHead(8, 2)
        def forward(self, x): return self.a(x) + self.b(x.flip(-1))
    model, x = Two(), torch.randn(2, 8, 3, 4)
    assert list(find_pools(model)) == ["a.0", "b.0"]
    assert torch.equal(attention_maps(model, x, pool="b.0"), model.b[0].attention_map(x.flip(-1)).detach())
    with pytest.raises(ValueError, match="pool: the model has several: a.0, b.0"): attention_maps(model, x)
    with pytest.raises(ValueError, match="pool: 'c' is not in the model"): attention_maps(model, x, pool="c")


def test_class_activation_map_means_the_logit():
    model, x = xeca_resnext_tiny(10, custom_head=AvgPoolHead), torch.randn(4, 3, 40, 56)
    target = torch.tensor([3, 1, 4, 1])
    cam = class_activation_map(model, x, target)
    model.eval()
    logits = model(x)[range(4), target] - model[-1][-1].bias[target]
    assert torch.allclose(cam.mean((1, 2, 3)), logits, atol=1e-5)
    assert torch.equal(class_activation_map(model, x), class_activation_map(model, x, model(x).argmax(1)))
    assert class_activation_map(xeca_resnext_tiny(10), x).shape == cam.shape   # fastxtend's own head


def test_the_wrong_kind_of_head_is_told():
    x = torch.randn(2, 3, 40, 40)
    with pytest.raises(ValueError, match="no attention pool in it"): attention_maps(xeca_resnext_tiny(10), x)
    with pytest.raises(ValueError, match="For attention pools use attention_maps"): class_activation_map(xeca_resnext_tiny(10, custom_head=LearnedAggregationHead), x)


def test_pointing_game_edges():
    maps = torch.zeros(1, 1, 2, 4)
    maps[0, 0, 1, 3] = 1   # centre of the cell: x = 70 of 80, y = 30 of 40
    def hit(*box): return pointing_game(maps, torch.tensor([box]), (40, 80)).item()
    assert hit(70, 30, 71, 31) and hit(0, 0, 80, 40)
    assert not hit(0, 0, 70, 40) and not hit(71, 0, 80, 40) and not hit(0, 0, 80, 30) and not hit(0, 31, 80, 40)
    two = torch.stack([maps[0, 0], maps[0, 0].roll(-1, 1) * .5])[None]   # the mean over k decides
    assert pointing_game(two, torch.tensor([[60, 20, 80, 40]]), (40, 80)).item()


def test_show_maps_wants_a_picture():
    with pytest.raises(ValueError, match="images: there is no picture"): show_maps(torch.zeros(0, 3, 8, 8), torch.zeros(0, 1, 2, 2))


def test_show_maps_draws_every_picture_and_box():
    fig = show_maps(torch.randn(5, 3, 20, 30), torch.rand(5, 2, 4, 6), titles=list("abcde"), boxes=torch.tensor([[1, 2, 9, 8]] * 5), ncols=3)
    drawn = [ax for ax in fig.axes if ax.images]
    assert len(fig.axes) == 6 and len(drawn) == 5
    assert [ax.get_title() for ax in drawn] == list("abcde")
    assert all(len(ax.patches) == 1 for ax in drawn)
