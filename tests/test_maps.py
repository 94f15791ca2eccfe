"Maps are the weights that the forward pass used, and asking for them leaves no trace."
import base64
import io
import json
import re
import subprocess
import sys

import jinja2
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from attnpool.heads import AvgPoolHead, HEADS, LearnedAggregationHead
from attnpool.maps.compute import (
    attention_maps, class_activation_map, class_token_maps, enlarge, find_pools, grad_cam, maps_of, uncompiled)
from attnpool.maps.draw import captions, data_uri, figure, PALETTE, scale_of, show_heads, show_maps
from attnpool.maps.learner import open_pictures, pictures_of
from attnpool.maps.measures import agreement, deletion_insertion, energy_in_box, entropy, pointing_game
from attnpool.maps.page import class_index, html_page, look, maps_page
from attnpool.models.xresnet import xeca_resnext_tiny

matplotlib.use("Agg")
ATTENTION = [n for n in HEADS if n != "avg"]


@pytest.mark.parametrize("name", ATTENTION)
def test_maps_of_every_head_at_odd_sizes(name):
    model = xeca_resnext_tiny(10, custom_head=HEADS[name])
    x = torch.randn(3, 3, 51, 38)
    maps = attention_maps(model, x)
    with torch.no_grad(): fmap = model.eval()[:-1](x)
    pool, = find_pools(model).values()
    k = len(pool.query)
    assert maps.shape == (3, k, *fmap.shape[2:]) and not maps.requires_grad
    assert torch.allclose(maps, pool.attention_map(fmap), atol=1e-6)
    assert torch.allclose(maps.sum((2, 3)), torch.ones(3, k))


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
    with pytest.raises(RuntimeError, match="broken"):
        attention_maps(nn.Sequential(Broken(), LearnedAggregationHead(8, 2)), x)


def test_compiled_networks_and_fastai_tensors():
    from fastai.vision.all import TensorImage
    model, x = xeca_resnext_tiny(10, custom_head=LearnedAggregationHead), torch.randn(2, 3, 40, 40)
    compiled = torch.compile(model, backend="eager")
    assert uncompiled(compiled) is model is uncompiled(model) and list(find_pools(compiled)) == list(find_pools(model))
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
    with pytest.raises(ValueError, match="does not call its LearnedAggregation"):
        attention_maps(Unused(), torch.randn(1, 3, 4, 4))


def test_several_pools_are_told_apart():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = LearnedAggregationHead(8, 2), LearnedAggregationHead(8, 2)
        def forward(self, x): return self.a(x) + self.b(x.flip(-1))
    model, x = Two(), torch.randn(2, 8, 3, 4)
    assert list(find_pools(model)) == ["a.0", "b.0"]
    assert torch.equal(attention_maps(model, x, pool="b.0"), model.b[0].attention_map(x.flip(-1)).detach())
    both = attention_maps(model, x)
    assert list(both) == ["a.0", "b.0"] and torch.equal(both["a.0"], model.a[0].attention_map(x).detach())
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
    several = class_activation_map(model, x, torch.stack([target, target.flip(0)], 1))
    assert torch.allclose(several, torch.cat([cam, class_activation_map(model, x, target.flip(0))], 1), atol=1e-5)
    assert class_activation_map(model, x[:0]).shape == (0, *cam.shape[1:])


def test_the_wrong_kind_of_head_is_told():
    x = torch.randn(2, 3, 40, 40)
    with pytest.raises(ValueError, match="no attention pool in it"): attention_maps(xeca_resnext_tiny(10), x)
    with pytest.raises(ValueError, match="For attention pools use attention_maps"):
        class_activation_map(xeca_resnext_tiny(10, custom_head=LearnedAggregationHead), x)


def test_pointing_game_edges():
    maps = torch.zeros(1, 1, 2, 4)
    maps[0, 0, 1, 3] = 1   # centre of the cell: x = 70 of 80, y = 30 of 40
    def hit(*box): return pointing_game(maps, torch.tensor([box]), (40, 80)).item()
    assert hit(70, 30, 71, 31) and hit(0, 0, 80, 40)
    assert not hit(0, 0, 70, 40) and not hit(71, 0, 80, 40) and not hit(0, 0, 80, 30) and not hit(0, 31, 80, 40)
    two = torch.stack([maps[0, 0], maps[0, 0].roll(-1, 1) * .5])[None]   # the mean over k decides
    assert pointing_game(two, torch.tensor([[60, 20, 80, 40]]), (40, 80)).item()


def test_show_maps_wants_a_picture():
    with pytest.raises(ValueError, match="images: there is no picture"):
        show_maps(torch.zeros(0, 3, 8, 8), torch.zeros(0, 1, 2, 2))


def test_show_maps_draws_every_picture_and_box():
    boxes = torch.tensor([[1, 2, 9, 8]] * 5)
    fig = show_maps(torch.randn(5, 3, 20, 30), torch.rand(5, 2, 4, 6), titles=list("abcde"), boxes=boxes, ncols=3)
    drawn = [ax for ax in fig.axes if ax.images]
    assert len(fig.axes) == 7 and len(drawn) == 6   # with a place that is empty, and the bar of the scale
    assert [ax.get_title().split("\n")[0] for ax in drawn[:5]] == list("abcde")
    assert all(len(ax.patches) == 1 for ax in drawn[:5])


def test_show_heads_has_a_row_for_each_network_and_says_what_it_predicts():
    from fastai.vision.all import Learner
    from attnpool.data.digits import digits_dls
    learned, avg = (xeca_resnext_tiny(10, custom_head=h) for h in (LearnedAggregationHead, AvgPoolHead))
    x, modes = torch.randn(3, 3, 40, 56), [m.training for m in learned.modules()]
    with torch.no_grad(): p, c = learned.eval()(x).softmax(1).max(1)
    learned.train()
    boxes = torch.tensor([[1, 2, 9, 8]] * 3)
    learn = Learner(digits_dls(40, n_train=64, n_valid=64), learned)
    fig = show_heads({"learned": learn, "avg": avg}, x, [c[0], c[1], (c[2] + 1) % 10], boxes)
    texts = [[t.get_text().replace("\nlooks everywhere", "") for t in ax.texts] for ax in fig.axes[:6]]
    assert len(fig.axes) == 8 and all(len(ax.images) == 2 and len(ax.patches) == 1 for ax in fig.axes[:6])
    assert [t[0] for t in (texts[0], texts[3])] == ["learned", "avg"]
    assert texts[1] == [f"{c[1]} {p[1]:.0%}"] and texts[2] == [f"{c[2]} {p[2]:.0%} ({(c[2] + 1) % 10})"]
    assert modes == [m.training for m in learned.modules()]
    named = show_heads({"avg": avg}, x, vocab=[f"class {i}" for i in range(10)])
    assert named.axes[1].texts[0].get_text().startswith("class ")
    with pytest.raises(ValueError, match="models: there is no network"): show_heads({}, x)
    with pytest.raises(ValueError, match="images: there is no picture"): show_heads({"avg": avg}, x[:0])


@pytest.mark.parametrize("name", ATTENTION)
def test_output_and_gradients_are_those_of_a_network_never_asked(name):
    model = xeca_resnext_tiny(10, custom_head=HEADS[name])
    x = torch.randn(2, 3, 40, 33)
    def step():
        torch.manual_seed(5)
        model.zero_grad()
        out = model(x)
        out.square().sum().backward()
        return [out.detach(), *(p.grad.clone() for p in model.parameters())]
    model.eval()   # BatchNorm's running means would differ between two steps
    before = step()
    state = torch.get_rng_state()
    attention_maps(model, x)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(before, step()))


@pytest.mark.parametrize("name", ATTENTION)
def test_maps_under_autocast(name):
    model, x = xeca_resnext_tiny(10, custom_head=HEADS[name]).eval(), torch.randn(2, 3, 40, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16): maps = attention_maps(model, x)
    assert torch.allclose(maps.float().sum((2, 3)), torch.ones(2, maps.shape[1]), atol=.01)
    assert torch.allclose(maps.float(), attention_maps(model, x), atol=.02)


def test_grad_cam_of_average_pooling_is_the_class_activation_map():
    model, x = xeca_resnext_tiny(10, custom_head=AvgPoolHead), torch.randn(3, 3, 40, 56)
    target = torch.tensor([3, 1, 4])
    modes = [m.training for m in model.modules()]
    ours, theirs = class_activation_map(model, x, target).clamp(min=0), grad_cam(model, x, target)
    assert torch.allclose(ours, theirs * ours[0].numel(), atol=1e-5)   # its gradient holds 1/n of the mean
    assert modes == [m.training for m in model.modules()]
    assert torch.equal(grad_cam(nn.Sequential(model), x, target), theirs)   # body and head need not be children


@pytest.mark.parametrize("name, size", [("vit_tiny_patch16_224", 224), ("deit_tiny_distilled_patch16_224", 224)])
def test_class_token_maps_are_the_weights_of_the_block(name, size):
    import timm
    model, x = timm.create_model(name, num_classes=10).eval(), torch.randn(1, 3, size, size)
    maps = class_token_maps(model, x)
    seen = {}
    attn = model.blocks[-1].attn
    attn.fused_attn = False
    attn.attn_drop.register_forward_pre_hook(lambda m, args: seen.update(weights=args[0]))
    with torch.no_grad(): model(x)
    patches = seen["weights"][:, :, 0, model.num_prefix_tokens:]
    assert torch.allclose(maps.flatten(2), patches / patches.sum(-1, keepdim=True), atol=1e-6)
    with pytest.raises(ValueError, match="expected a timm vision transformer"):
        class_token_maps(xeca_resnext_tiny(10), torch.randn(1, 3, 40, 40))
    with pytest.raises(ValueError, match="block: expected 0 to 11, or -1 for the last, got 12"):
        class_token_maps(model, x, 12)


def test_energy_by_hand():
    maps = torch.tensor([[[[1., 2.], [3., 4.]]]])
    def energy(*box): return energy_in_box(maps, torch.tensor([box]), (20, 20)).item()
    assert energy(0, 0, 20, 20) == pytest.approx(1) and energy(0, 0, 10, 10) == pytest.approx(.1)
    assert energy(5, 0, 15, 20) == pytest.approx((.5 * 1 + .5 * 2 + .5 * 3 + .5 * 4) / 10)
    uniform = torch.full((1, 1, 7, 5), 1 / 35)
    share = energy_in_box(uniform, torch.tensor([[3, 9, 31, 50]]), (64, 48)).item()
    assert share == pytest.approx(28 * 41 / (64 * 48), rel=1e-5)   # chance: the area


def test_entropy_and_agreement_at_their_ends():
    one = torch.zeros(1, 1, 3, 3)
    one[..., 1, 1] = 1
    assert entropy(one).item() == 0 and entropy(torch.ones(1, 1, 3, 3)).item() == pytest.approx(1)
    g = torch.rand(4, 1, 5, 5)
    assert torch.allclose(agreement([g, 2 * g + 1, 3 * g]), torch.ones(4))
    assert torch.allclose(agreement([g, -g]), -torch.ones(4))
    three = [torch.rand(1, 1, 5, 5) for _ in range(3)]
    r = np.corrcoef([t.flatten().numpy() for t in three])
    assert agreement(three).item() == pytest.approx((r[0, 1] + r[0, 2] + r[1, 2]) / 3, abs=1e-5)
    with pytest.raises(ValueError, match="at least 2 networks"): agreement([g])


def test_deletion_and_insertion_end_where_they_should():
    class Corner(nn.Module):   # the class is the brightness of the upper left corner
        def forward(self, x):
            s = x[:, 0, :8, :8].mean((1, 2)) * 20
            return torch.stack([s, torch.full_like(s, 5)], 1)
    x = torch.zeros(2, 3, 32, 32)
    x[:, :, :8, :8] = 1
    good, bad = torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 4)
    good[..., 0, 0], bad[..., 3, 3] = 1, 1
    target = torch.zeros(2, dtype=torch.long)
    (d1, i1), (d2, i2) = (deletion_insertion(Corner(), x, m, target, steps=8) for m in (good, bad))
    assert d1.shape == (2, 9) and torch.allclose(d1[:, 0], i1[:, -1]) and torch.allclose(d1[:, -1], i1[:, 0])
    assert d1.mean() < d2.mean() and i1.mean() > i2.mean()
    with pytest.raises(ValueError, match="steps: expected at least 1, got 0"):
        deletion_insertion(Corner(), x, good, steps=0)


@pytest.fixture
def learn(dls):
    from fastai.vision.all import Learner
    return Learner(dls, xeca_resnext_tiny(10, custom_head=LearnedAggregationHead))


def test_pictures_of_every_kind_and_broken_ones(tmp_path, learn):
    rgb = (np.random.default_rng(0).random((50, 70, 4)) * 255).astype("uint8")
    Image.fromarray(rgb[..., :3]).save(tmp_path / "a.jpg")
    Image.fromarray(rgb).save(tmp_path / "b.png")
    Image.fromarray(rgb[..., 0]).save(tmp_path / "c.png")
    Image.fromarray(rgb[..., :3]).convert("CMYK").save(tmp_path / "d.jpg")
    x = open_pictures([tmp_path], 32)
    assert x.shape == (4, 3, 32, 32) and 0 <= x.min() and x.max() <= 1 and torch.equal(x[2, 0], x[2, 1])
    see_through = np.zeros((40, 40, 4), "uint8")
    Image.fromarray(see_through).save(tmp_path / "e.png")
    assert (open_pictures([tmp_path / "e.png"], 32) == 1).all()   # transparent is white, not black
    fig = learn.show_attention(tmp_path)
    assert len([ax for ax in fig.axes if len(ax.images) > 1]) == 5
    (tmp_path / "z.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    with pytest.raises(ValueError, match=r"^files: 1 of 6 cannot be read: .*z.png \("): learn.show_attention(tmp_path)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="there is no picture in"): open_pictures([tmp_path / "none"], 32)
    with pytest.raises(FileNotFoundError, match="there is no"): open_pictures([tmp_path / "nowhere.png"], 32)


def test_titles_name_the_prediction(learn):
    x, y = (t.as_subclass(torch.Tensor) for t in learn.dls.valid.one_batch())
    learn.model.eval()
    with torch.no_grad(): p, c = learn.model(x).softmax(1).max(1)
    titles = [ax.get_title() for ax in learn.show_attention(n=5).axes if len(ax.images) > 1]
    assert [t.splitlines()[0] for t in titles] == [f"{learn.dls.vocab[i]} {q:.0%}" for q, i in zip(p[:5], c[:5])]
    named = [f"({learn.dls.vocab[t]})" in title for t, title in zip(y, titles)]
    assert named == [bool(t != i) for t, i in zip(y[:5], c[:5])]


@pytest.mark.parametrize("head, per_class", [(LearnedAggregationHead, False), (AvgPoolHead, True)])
def test_the_page_opens_without_a_network(tmp_path, dls, head, per_class):
    from fastai.vision.all import Learner
    learn = Learner(dls, xeca_resnext_tiny(10, custom_head=head))
    page = maps_page(learn, tmp_path / "maps.html", n=3, top=2, classes=[7]).read_text()
    assert "http" not in page.replace("data:image", "")
    assert page.count("<article") == 3 and page.count('class="pick"') == 3 * (3 if per_class else 4)
    parts = json.loads(re.search('<script type="application/json">(.*?)</script>', page, re.S)[1])["runs"][0]["parts"]
    assert [part["n"] for part in parts] == ([3] if per_class else [1, 3])
    for bad in ("cat", 10, -1):
        with pytest.raises(ValueError, match="classes: .* is not one of 10 classes"): class_index(bad, range(10))


def test_a_picture_too_small_for_the_body_is_told():
    class Picky(nn.Module):
        def forward(self, x): return nn.functional.conv2d(x, torch.ones(3, 3, 9, 9))
    with pytest.raises(ValueError, match="x: pictures of 4x4 px are too small"):
        attention_maps(nn.Sequential(Picky(), LearnedAggregationHead(3, 2)), torch.randn(1, 3, 4, 4))


@pytest.mark.parametrize("name", ATTENTION)
def test_maps_of_a_folded_network(name):
    from attnpool.heads import fold
    model, x = xeca_resnext_tiny(10, custom_head=HEADS[name]).eval(), torch.randn(2, 3, 51, 38)
    assert torch.allclose(attention_maps(fold(model), x), attention_maps(model, x), atol=1e-6)


def test_a_learner_shows_pictures_from_all_over_its_data(tmp_path):
    from attnpool.data import get_dls
    from fastai.vision.all import Learner
    for split in ("train", "val"):
        for i, name in enumerate("abc"):
            (tmp_path / split / name).mkdir(parents=True)
            for j in range(6): Image.new("RGB", (32, 32), (80 * i + j, 0, 0)).save(tmp_path / split / name / f"{j}.png")
    dls = get_dls(str(tmp_path), 32, 6, device="cpu")
    learn = Learner(dls, xeca_resnext_tiny(3, custom_head=AvgPoolHead))
    its = pictures_of(learn, n=6)
    x, y, boxes = its.x, its.labels, its.boxes
    whole = [torch.cat(o) for o in zip(*dls.valid)]
    assert y.tolist() == [0, 0, 1, 1, 2, 2] and boxes is None
    assert torch.equal(x, whole[0][[0, 3, 7, 10, 14, 17]])   # normalised as they are there
    assert [im.getpixel((0, 0))[0] for im in its.shown] == [0, 3, 81, 84, 162, 165]
    assert len(pictures_of(learn, n=99).x) == 18


def test_photos_are_one_batch_and_normalised_as_in_training(tmp_path, learn):
    calls, photos = [], (np.random.default_rng(0).random((5, 64, 64, 3)) * 255).astype("uint8")
    for i, photo in enumerate(photos): Image.fromarray(photo).save(tmp_path / f"{i}.png")
    its = pictures_of(learn, tmp_path)
    assert its.labels is its.boxes is None and np.array_equal(np.stack(its.shown), photos)
    x, shown = its.x, torch.from_numpy(photos).permute(0, 3, 1, 2) / 255
    norm = next(t for t in learn.dls.valid.after_batch.fs if hasattr(t, "mean"))
    assert torch.allclose(x * norm.std + norm.mean, shown, atol=1e-6)
    learn.model.register_forward_pre_hook(lambda m, args: calls.append(len(args[0])))
    learn.show_attention(tmp_path)
    assert calls == [5, 5]   # prediction and maps, each of all files at once


@pytest.mark.parametrize("room", ["compute", "measures", "draw"])
def test_maps_load_no_framework(room):
    code = (f"import sys, attnpool.maps.{room}; "
            "print(*[m for m in ('fastai', 'timm', 'torchvision', 'fastxtend', 'captum') if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


def test_show_heads_takes_anything_with_a_model_and_data():
    from types import SimpleNamespace
    model, x = xeca_resnext_tiny(2, custom_head=AvgPoolHead), torch.randn(1, 3, 40, 40)
    learner = SimpleNamespace(model=model, dls=SimpleNamespace(vocab=["cat", "dog"]))
    with torch.no_grad(): said = ["cat", "dog"][model.eval()(x).argmax()]
    assert show_heads({"a": learner, "b": model}, x).axes[1].texts[1].get_text().startswith(said)


def test_captions_name_the_truth_where_it_is_missed():
    p = torch.tensor([[.9, .1], [.25, .75]])
    assert captions(p) == ["0 90%", "1 75%"]
    assert captions(p, "ab", [0, 0]) == ["a 90%", "b 75% (a)"]
    assert captions(p, "ab", torch.tensor([1, 1]), sep="\n") == ["a 90%\n(b)", "b 75%"]


def test_enlarged_maps_keep_their_mean_and_their_place():
    m = torch.rand(2, 3, 4, 5, dtype=torch.bfloat16)
    big = enlarge(m, (40, 50))
    assert big.dtype == torch.float32 and big.shape == (2, 3, 40, 50)
    centre = big[..., 4:6, 4:6].mean((2, 3))   # a cell's value stands there
    assert torch.allclose(centre, m[..., 0, 0].float(), atol=.05)


def test_the_palette_is_told_apart_and_figures_are_transparent():
    rgb = np.array([matplotlib.colors.to_rgb(c) for c in PALETTE])
    apart = np.abs(rgb[:, None] - rgb).sum(-1)[np.triu_indices(len(rgb), 1)]
    assert len(PALETTE) == 8 and apart.min() > .25
    before = plt.rcParams["text.color"]
    with figure(size=(3, 2)) as (fig, ax): ax.plot([0, 1], label="line")
    assert plt.rcParams["text.color"] == before and fig.get_size_inches().tolist() == [3, 2]
    assert fig.patch.get_alpha() == ax.patch.get_alpha() == 0 and ax.xaxis.label.get_color() == "#888888"


def test_data_uris_hold_the_picture():
    pixels = (np.random.default_rng(0).random((7, 5, 3)) * 255).astype("uint8")
    def back(uri): return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))
    assert (back(data_uri(pixels)) == pixels).all() and (back(data_uri(Image.fromarray(pixels))) == pixels).all()
    assert (back(data_uri(pixels[..., 0])) == pixels[..., 0]).all()
    assert data_uri(pixels, "jpeg").startswith("data:image/jpeg;base64,")
    with figure(size=(2, 1)) as (fig, _): pass
    number = fig.number
    assert back(data_uri(fig, dpi=50)).shape == (50, 100, 4) and not plt.fignum_exists(number)
    svg = base64.b64decode(data_uri(fig, "svg").removeprefix("data:image/svg+xml;base64,"))
    assert svg.startswith(b"<?xml") and b"<svg" in svg
    with pytest.raises(ValueError, match="format: only a figure can be 'svg'"): data_uri(pixels, "svg")
    with pytest.raises(TypeError, match="picture: expected .* got float64"): data_uri(pixels / 255)
    with pytest.raises(TypeError, match="picture: expected .* got str"): data_uri("photo.jpg")


def test_pages_escape_what_they_are_given():
    hostile = '"><script>alert(1)</script>'
    template = '<img alt="{{ name }}"><p>{{ name }}</p>{{ table|safe }}'
    page = html_page(hostile, template, "p > b { color: red }", name=hostile, table="<table></table>")
    assert "<script>" not in page and page.count("&lt;script&gt;") == 4   # title, heading, attribute, text
    assert "p > b { color: red }" in page and "<table></table>" in page and "http" not in page
    with pytest.raises(jinja2.UndefinedError, match="'nme' is undefined"): html_page("", "{{ nme }}", name=1)


def test_hostile_names_of_classes_are_escaped_on_the_page_of_maps(tmp_path, dls):
    from fastai.vision.all import DataLoaders, Learner
    mine = DataLoaders(dls.train, dls.valid)
    mine.boxes, mine.vocab = dls.boxes, [f"<img src=x onerror=alert({i})>" for i in range(10)]
    learn = Learner(mine, xeca_resnext_tiny(10, custom_head=AvgPoolHead), loss_func=nn.functional.cross_entropy)
    page = maps_page(learn, tmp_path / "maps.html", n=1).read_text()
    assert "<img src=x" not in page and page.count("&lt;img src=x onerror=alert(") >= 4   # buttons, and what is said and true


def test_a_page_of_a_head_with_a_query_per_class_shows_the_maps_of_the_classes(tmp_path, dls):
    from fastai.vision.all import Learner
    learn = Learner(dls, xeca_resnext_tiny(10, custom_head=HEADS["classquery"]))
    page = maps_page(learn, tmp_path / "maps.html", n=1, top=1, classes=[4]).read_text()
    seen = look(learn, n=1, top=1, classes=[4])
    data = json.loads(re.search('<script type="application/json">(.*?)</script>', page, re.S)[1])
    levels = np.frombuffer(base64.b64decode(data["runs"][0]["levels"][0]), np.int8).reshape(2, *seen.per_class.values.shape[2:]) / 127
    m = maps_of(learn.model, seen.pictures.x)[0, 4]   # of class 4, as multiples of uniform
    assert page.count('class="pick"') == 2 and np.abs(levels[1] - scale_of([seen.per_class]).level(m * m.numel()).numpy()).max() < .51 / 127
