"The blog's bodies: sizes as published, blocks as in timm, any kind of head."
import pytest
import torch
from fastxtend.vision.models.attention_modules import ECA
from fastxtend.vision.models.pooling import BlurPool, MaxBlurPool
from torch import nn

from attnpool.heads import AvgPoolHead, HEADS, LearnedAggregationHead
from attnpool.heads import build_head
from attnpool.models.xresnet import ARCHS, xeca_resnext50, xeca_resnext50s, xeca_resnext_tiny, xresnext50, xresnext50s


def n_params(m): return sum(p.numel() for p in m.parameters())


@pytest.mark.parametrize("arch, n_out, parameters", [(xeca_resnext50s, 1000, 12_858_520), (xeca_resnext50s, 10, 11_843_770), (xeca_resnext50, 1000, 25_048_222),
                                                     (xresnext50s, 1000, 12_858_440), (xresnext50, 1000, 25_048_136)])
def test_parameters(arch, n_out, parameters):
    with torch.device("meta"): assert n_params(arch(n_out)) == parameters


@pytest.mark.parametrize("arch, shape", [(xeca_resnext50s, (1024, 14, 14)), (xeca_resnext50, (2048, 7, 7))])
def test_last_map(arch, shape):
    with torch.device("meta"): assert arch()[:-4](torch.empty(1, 3, 224, 224)).shape[1:] == shape


@pytest.mark.parametrize("name", ARCHS)
def test_every_network_trains_at_odd_sizes(name):
    model = ARCHS[name](7, custom_head=LearnedAggregationHead, **({} if name == "xeca_resnext_tiny" else dict(widen=.25, layers=(1,) * (4 if name.endswith("50") else 3))))
    out = model(torch.randn(2, 3, 75, 49))
    assert out.shape == (2, 7)
    out.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_blocks_and_activations_are_those_of_the_blog():
    kinds = {type(m).__name__ for m in xeca_resnext50s(10).modules()}
    assert {"Mish", "ECA", "MaxBlurPool2D", "BlurPool2D"} <= kinds
    assert not kinds & {"ReLU", "MaxPool2d", "AvgPool2d"}
    assert not any(isinstance(m, ECA) for m in xresnext50s(10).modules())


@pytest.mark.parametrize("channels", [64, 256, 512, 1024])
def test_eca_equals_timms(channels):
    from timm.layers import EcaModule
    ours, theirs = ECA(channels), EcaModule(channels)
    assert ours.conv.weight.shape == theirs.conv.weight.shape
    theirs.conv.weight.data = ours.conv.weight.data
    x = torch.randn(2, channels, 5, 4)
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)


def test_blurpool_equals_timms_inside_the_border():
    from timm.layers import BlurPool2d
    x = torch.randn(2, 6, 17, 12)
    assert torch.allclose(BlurPool(2)(x)[..., 1:-1, 1:-1], BlurPool2d(6)(x)[..., 1:-1, 1:-1], atol=1e-6)   # borders: zeros here, reflected there
    assert torch.allclose(MaxBlurPool(2)(x), BlurPool(2)(nn.functional.max_pool2d(x, 2, 1)), atol=1e-6)


def test_the_body_starts_the_same_under_every_head():
    bodies = []
    for name in HEADS:
        torch.manual_seed(5)
        bodies.append(xeca_resnext_tiny(10, custom_head=HEADS[name])[:-1].state_dict())
    for other in bodies[1:]: assert all(torch.equal(bodies[0][k], other[k]) for k in bodies[0])


def test_heads_of_every_kind():
    ready = AvgPoolHead(256, 3)
    assert xeca_resnext_tiny(3, custom_head=ready)[-1] is ready
    listed = xeca_resnext_tiny(3, custom_head=lambda ni, n: [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(ni, n)])
    assert listed(torch.randn(2, 3, 40, 40)).shape == (2, 3)
    assert n_params(xeca_resnext_tiny(3, custom_head=AvgPoolHead)) == n_params(xeca_resnext_tiny(3))


def test_one_channel_and_other_options():
    model = xresnext50s(4, c_in=1, widen=.5, layers=(1, 1, 1), act_cls=nn.SiLU, stoch_depth=.5)
    assert model(torch.randn(2, 1, 64, 64)).shape == (2, 4)
    assert not any(isinstance(m, nn.Mish) for m in model.modules())


@pytest.mark.parametrize("make, error, words", [
    (lambda: xeca_resnext50s(0), ValueError, "n_out: expected at least 1 output, got 0"),
    (lambda: xeca_resnext50s(10, pretrained=True), ValueError, "no pretrained weights for this network. Use pretrained=False"),
    (lambda: xeca_resnext50s(10, widen=.1), ValueError, "widen: 0.1 leaves 6 channels"),
    (lambda: xeca_resnext50s(10, layers=(1, 1)), ValueError, "layers: expected 3 numbers of blocks"),
    (lambda: xeca_resnext_tiny(10, custom_head="concat"), TypeError, "custom_head: expected a class or callable (ni, n_out) or a module, got 'concat'"),
    (lambda: build_head(lambda ni, n: "head", 4, 2), TypeError, "returned str instead of a module"),
    (lambda: build_head(AvgPoolHead, 4, 0), ValueError, "n_out: expected at least 1 output, got 0"),
    (lambda: ARCHS["xeca_resnext50"] and ARCHS["xeca_resnet50s"], ValueError, "Did you mean 'xeca_resnext50s'?"),
])
def test_bad_input(make, error, words):
    with pytest.raises(error) as e: make()
    assert words in str(e.value)
