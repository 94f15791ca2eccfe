"""Every kind of picture, at every size, gives the network the same pixels everywhere: in training, in validation, under
maps, on pages, at the command line; and they are those that the picture shows, written down by hand."""
import base64
import io
import re
import struct
import zlib
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from fastai.vision.all import Learner
from PIL import Image
from torch import nn

from attnpool.data import describe, get_dls
from attnpool.data.check import check_pictures
from attnpool.data.listing import list_folder
from attnpool.data.reader import open_picture
from attnpool.heads import AvgPoolHead
from attnpool.maps.learner import open_pictures, pictures_of
from attnpool.maps.page import maps_page

matplotlib.use("Agg")
SIDE = 32   # of what the network takes
SIZES = dict(below=(16, 24), equal=(SIDE, SIDE), above=(96, 64), shrunk=(112, 192))   # height and width, upright

# A picture is four quadrants: upper left, upper right, lower left, lower right.
COLOURS = np.array([(200, 40, 40), (40, 180, 60), (50, 60, 210), (240, 240, 200)])
GREYS = np.array([30, 90, 160, 230])
CLEAR = np.array([255, 0, 255, 51])   # alpha: the second quadrant is transparent, the last one by four fifths


def quadrants(values, h, w, dtype=np.uint8):
    "`(h, w, ...)` of four values."
    rows, cols = np.arange(h) * 2 // h, np.arange(w) * 2 // w
    return np.asarray(values)[2 * rows[:, None] + cols].astype(dtype)


def on_white(colours, alpha):
    a = alpha[:, None] / 255
    return np.rint(colours * a + 255 * (1 - a)).astype(int)


def grey(levels): return np.repeat(np.asarray(levels)[:, None], 3, 1)


WRITE = {}   # name -> ending, quadrants that a reader should see, tolerance, and how to write one (file, height, width)


def kind(ending, shows, near=0):
    def add(write):
        WRITE[write.__name__] = ending, np.asarray(shows), near, write
        return write
    return add


def palette(h, w, values=(0, 1, 2, 3)):
    im = Image.frombytes("P", (w, h), quadrants(values, h, w).tobytes())
    im.putpalette(COLOURS.astype(np.uint8).tobytes())
    return im


def with_alpha(colours): return np.concatenate([np.asarray(colours).reshape(4, -1), CLEAR[:, None]], 1)


CLEARED = COLOURS.copy()
CLEARED[1] = 255
GREY_CLEARED = grey([30, 255, 160, 230])


@kind("png", COLOURS)
def rgb(file, h, w): Image.fromarray(quadrants(COLOURS, h, w)).save(file)
@kind("png", on_white(COLOURS, CLEAR), 1)
def rgba(file, h, w): Image.fromarray(quadrants(with_alpha(COLOURS), h, w)).save(file)
@kind("png", on_white(grey(GREYS), CLEAR), 1)
def la(file, h, w): Image.fromarray(quadrants(with_alpha(GREYS), h, w)).save(file)
@kind("png", COLOURS)
def p(file, h, w): palette(h, w).save(file)
@kind("png", CLEARED)
def p_one_transparent(file, h, w): palette(h, w).save(file, transparency=1)
@kind("png", on_white(COLOURS, CLEAR), 1)
def p_alphas(file, h, w): palette(h, w).save(file, transparency=CLEAR.astype(np.uint8).tobytes())
@kind("png", CLEARED)
def rgb_trns(file, h, w): Image.fromarray(quadrants(COLOURS, h, w)).save(file, transparency=tuple(map(int, COLOURS[1])))
@kind("png", GREY_CLEARED)
def l_trns(file, h, w): Image.fromarray(quadrants(GREYS, h, w)).save(file, transparency=int(GREYS[1]))
@kind("png", grey(GREYS))
def l(file, h, w): Image.fromarray(quadrants(GREYS, h, w)).save(file)   # noqa: E743
@kind("png", grey([0, 255, 255, 0]))
def one_bit(file, h, w): Image.fromarray(quadrants([0, 1, 1, 0], h, w, bool)).save(file)
@kind("png", grey(GREYS))
def sixteen_bits(file, h, w): Image.fromarray(quadrants(GREYS * 256 + [0, 255, 3, 200], h, w, np.uint16)).save(file)
@kind("tif", grey(GREYS))
def sixteen_bits_tif(file, h, w): Image.fromarray(quadrants(GREYS * 256 + 128, h, w, np.uint16)).save(file)
@kind("tif", grey(GREYS))
def sixteen_bits_big(file, h, w): Image.frombytes("I;16B", (w, h), quadrants(GREYS * 256 + 128, h, w, ">u2").tobytes()).save(file)


def png(pixels, colour):
    "A PNG of 16 bits, which Pillow does not write in colour."
    def chunk(name, content): return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    rows = b"".join(b"\0" + row.tobytes() for row in pixels.astype(">u2"))
    head = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@kind("png", COLOURS)
def rgb_of_sixteen_bits(file, h, w): file.write_bytes(png(quadrants(COLOURS * 257, h, w, int), 2))
@kind("png", on_white(COLOURS, CLEAR), 1)
def rgba_of_sixteen_bits(file, h, w): file.write_bytes(png(quadrants(with_alpha(COLOURS) * 257, h, w, int), 6))
@kind("png", on_white(grey(GREYS), CLEAR), 1)
def la_of_sixteen_bits(file, h, w): file.write_bytes(png(quadrants(with_alpha(GREYS) * 257, h, w, int), 4))
@kind("jp2", COLOURS)
def jpeg_2000(file, h, w): Image.fromarray(quadrants(COLOURS, h, w)).save(file)
@kind("tif", grey([*GREYS[:3], 255]))
def int32(file, h, w): Image.fromarray(quadrants([*(GREYS[:3] * 256 + 5), 10**6], h, w, np.int32)).save(file)
@kind("tif", grey(GREYS), 1)
def float_to_one(file, h, w): Image.fromarray(quadrants(GREYS / 255, h, w, np.float32)).save(file)
@kind("tif", grey(GREYS), 1)
def float_to_255(file, h, w): Image.fromarray(quadrants(GREYS, h, w, np.float32)).save(file)
@kind("tif", COLOURS)
def cmyk(file, h, w):
    ink = np.concatenate([255 - COLOURS, np.zeros((4, 1))], 1)
    Image.frombytes("CMYK", (w, h), quadrants(ink, h, w).tobytes()).save(file)
@kind("jpg", COLOURS, 6)
def cmyk_jpeg(file, h, w):
    ink = np.concatenate([255 - COLOURS, np.zeros((4, 1))], 1)
    Image.frombytes("CMYK", (w, h), quadrants(ink, h, w).tobytes()).save(file, quality=100, subsampling=0)
@kind("jpg", COLOURS, 3)
def jpeg(file, h, w): Image.fromarray(quadrants(COLOURS, h, w)).save(file, quality=100, subsampling=0)
@kind("jpg", COLOURS, 3)
def jpeg_progressive(file, h, w): Image.fromarray(quadrants(COLOURS, h, w)).save(file, quality=100, subsampling=0, progressive=True)
@kind("jfif", grey(GREYS), 1)
def jpeg_grey(file, h, w): Image.fromarray(quadrants(GREYS, h, w)).save(file, "jpeg", quality=100)
@kind("webp", COLOURS)
def webp(file, h, w): Image.fromarray(quadrants(COLOURS, h, w)).save(file, lossless=True)
@kind("webp", on_white(COLOURS, CLEAR), 1)
def webp_alpha(file, h, w): Image.fromarray(quadrants(with_alpha(COLOURS), h, w)).save(file, lossless=True, exact=True)
@kind("tif", COLOURS)
def tif(file, h, w): Image.fromarray(quadrants(COLOURS, h, w)).save(file, compression="tiff_lzw")
@kind("tif", on_white(COLOURS, CLEAR), 1)
def tif_alpha(file, h, w): Image.fromarray(quadrants(with_alpha(COLOURS), h, w)).save(file)
@kind("bmp", COLOURS)
def bmp(file, h, w): Image.fromarray(quadrants(COLOURS, h, w)).save(file)
@kind("ppm", COLOURS)
def ppm(file, h, w): Image.fromarray(quadrants(COLOURS, h, w)).save(file)
@kind("gif", COLOURS)
def gif(file, h, w): palette(h, w).save(file)
@kind("gif", COLOURS)
def gif_animated(file, h, w): palette(h, w).save(file, save_all=True, append_images=[palette(h, w, (3, 2, 1, 0)), palette(h, w, (1, 1, 1, 1))])
@kind("gif", CLEARED)
def gif_transparent(file, h, w): palette(h, w).save(file, transparency=1)
@kind("png", COLOURS)
def png_animated(file, h, w): Image.fromarray(quadrants(COLOURS, h, w)).save(file, save_all=True, append_images=[Image.fromarray(quadrants(COLOURS[::-1], h, w))])
@kind("webp", COLOURS)
def webp_animated(file, h, w): Image.fromarray(quadrants(COLOURS, h, w)).save(file, save_all=True, lossless=True, append_images=[Image.fromarray(quadrants(COLOURS[::-1], h, w))])
@kind("tif", COLOURS)
def tif_pages(file, h, w): Image.fromarray(quadrants(COLOURS, h, w)).save(file, save_all=True, append_images=[Image.fromarray(quadrants(COLOURS[::-1], h, w))])


STORED = {   # how a camera that was held so stores what is upright
    1: lambda up: up, 2: lambda up: up[:, ::-1], 3: lambda up: up[::-1, ::-1], 4: lambda up: up[::-1],
    5: lambda up: up.swapaxes(0, 1), 6: lambda up: np.rot90(up, 1), 7: lambda up: up[::-1, ::-1].swapaxes(0, 1), 8: lambda up: np.rot90(up, -1)}
for ending, near in (("jpg", 3), ("png", 0), ("tif", 0), ("webp", 0)):
    for number, stored in STORED.items():
        def turned(file, h, w, number=number, stored=stored):
            exif = Image.Exif()
            exif[0x112] = number
            options = dict(quality=100, subsampling=0) if file.suffix == ".jpg" else dict(lossless=True) if file.suffix == ".webp" else {}
            Image.fromarray(np.ascontiguousarray(stored(quadrants(COLOURS, h, w)))).save(file, exif=exif, **options)
        WRITE[f"exif_{number}_{ending}"] = ending, COLOURS, near, turned
EXIF_WITH_ALPHA = on_white(COLOURS, CLEAR)


@kind("png", EXIF_WITH_ALPHA, 1)
def exif_6_and_alpha(file, h, w):
    exif = Image.Exif()
    exif[0x112] = 6
    Image.fromarray(np.ascontiguousarray(np.rot90(quadrants(with_alpha(COLOURS), h, w)))).save(file, exif=exif)


CASES = [(k, s) for k in WRITE for s in SIZES]


def centres(t): return t[:, [SIDE // 4, SIDE // 4, -SIDE // 4, -SIDE // 4], [SIDE // 4, -SIDE // 4] * 2].T   # (4, 3)


def page_pictures(page):
    found = re.findall('src="data:image/webp;base64,(.*?)"', page.read_text())
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")) for text in found]


class Seen:
    "What the network of one Learner was given, by case."
    def __init__(self, root, **options):
        self.dls = get_dls(root, SIDE, len(CASES) + 1, "cpu", augment="none", cache=root.parent / "cache", **options)
        body = nn.Sequential(nn.Conv2d(3, 4, 3, 4, 1), nn.ReLU())
        self.learn, self.inputs, self.root = Learner(self.dls, nn.Sequential(body, AvgPoolHead(4, 2)), path=root), [], root
        self.learn.model.register_forward_pre_hook(lambda m, args: self.inputs.extend(args[0].detach().clone().as_subclass(torch.Tensor)))
        self.norm = self.dls.valid.after_batch.fs[-1]
        listed = [self.case(f) for f in self.dls.listing.files]
        with self.learn.no_bar(), self.learn.no_logging():
            self.trained = sorted(t.numpy().tobytes() for t in self.of(lambda: self.learn.fit(1, 0.))[:len(CASES) + 1])
            self.validated = dict(zip(listed[self.dls.listing.n_train:], self.of(self.learn.validate)))
        self.files = [self.file(c) for c in CASES]
        self.shown = dict(zip(CASES, self.of(lambda: self.learn.show_attention(self.files, ncols=40, cell=.2))))
        self.paged = dict(zip(CASES, self.of(lambda: maps_page(self.learn, root.parent / "maps.html", self.files))))
        self.page = dict(zip(CASES, page_pictures(root.parent / "maps.html")))
        plt.close("all")

    def case(self, file): return tuple(Path(file).stem.split("-"))

    def file(self, case): return self.root / "val" / "a" / f"{'-'.join(case)}.{WRITE[case[0]][0]}"

    def of(self, run):
        self.inputs.clear()
        run()
        return list(self.inputs)

    def plain(self, x): return (x * self.norm.std[0] + self.norm.mean[0]) * 255


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("matrix") / "pictures"
    for split in ("train", "val"):
        for name in "ab": (root / split / name).mkdir(parents=True)
        for k, s in CASES: WRITE[k][3](root / split / "a" / f"{k}-{s}.{WRITE[k][0]}", *SIZES[s])
        WRITE["rgb"][3](root / split / "b" / "other-below.png", *SIZES["below"])
    return root


@pytest.fixture(scope="module")
def both(root): return dict(cached=Seen(root), uncached=Seen(root, cache_gb=0))


@pytest.fixture(params=["cached", "uncached"])
def seen(request, both): return both[request.param]


@pytest.mark.parametrize("name", WRITE)
def test_the_network_gets_what_the_picture_shows_wherever_it_is_read(seen, name):
    _, shows, near, _ = WRITE[name]
    for size in SIZES:
        x = seen.validated[name, size]
        apart = np.abs(centres(seen.plain(x)).numpy() - shows).max()
        assert apart <= near + .01, f"{size}: {apart}\n{centres(seen.plain(x)).numpy().round()}"
        for where in (seen.shown, seen.paged): assert torch.equal(where[name, size], x), size
        assert x.numpy().tobytes() in seen.trained, size
        upright = np.asarray(open_picture(seen.file((name, size))))
        page = seen.page[name, size].astype(int)   # the file's own pixels, but for what a compressed picture loses
        assert page.shape == upright.shape and np.abs(page - upright).mean() < 2
        assert upright.shape == (*SIZES[size], 3) and np.abs(upright.astype(int) - quadrants(shows, *SIZES[size])).max() <= near


def test_training_and_validation_see_the_same_pictures(seen):
    assert seen.trained == sorted(t.numpy().tobytes() for t in seen.validated.values()) and len(seen.trained) == len(CASES) + 1


def test_caches_change_nothing(both):
    readers = [both[k].dls.valid_ds.tls[0].tfms[0] for k in ("cached", "uncached")]
    assert readers[0].pixels is not None and readers[1].pixels is None
    for case in CASES: assert torch.equal(both["cached"].validated[case], both["uncached"].validated[case])


def test_one_picture_is_read_as_many_are_and_as_predict_reads_it(seen):
    for case in CASES[::29]:
        assert torch.equal(pictures_of(seen.learn, seen.file(case)).x[0], seen.shown[case])
        with seen.learn.no_bar(): assert torch.equal(seen.of(lambda: seen.learn.predict(seen.file(case)))[0], seen.shown[case])


def test_the_commands_read_them_alike(root, tmp_path, monkeypatch, capsys):
    from attnpool.cli import main
    data = tmp_path / "pictures"
    for i, k in enumerate(WRITE):
        (folder := data / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        WRITE[k][3](folder / f"{k}-above.{WRITE[k][0]}", *SIZES["above"])
    monkeypatch.setenv("FASTAI_HOME", str(tmp_path / "home"))
    def run(*words):
        with pytest.raises(SystemExit) as done: main([*map(str, words)])
        assert done.value.code == 0
        return capsys.readouterr()
    run("bench", data, "--heads", "avg", "--seeds", 1, "--epochs", 1, "--size", SIDE, "--bs", 8, "--device", "cpu", "--out", tmp_path / "runs")
    done, = (tmp_path / "runs").glob("*-avg-1-*")
    files = sorted(data.rglob("*.*"))
    run("maps", done, data, "--device", "cpu", "--out", tmp_path / "m.html")
    for file, pixels in zip(files, page_pictures(tmp_path / "m.html"), strict=True):
        _, shows, near, _ = WRITE[file.stem.split("-")[0]]
        assert np.abs(centres(pixels.transpose(2, 0, 1).astype(int)) - shows).max() <= near + .51, file.name
    assert "Broken pictures: none" in run("data", data, "--out", tmp_path / "batch.png").out


def test_statistics_and_sizes_of_the_data_are_those_of_the_pictures(root):
    listing = list_folder(root)
    check = check_pictures(listing, root.parent / "cache")
    cases = [tuple(Path(f).stem.split("-")) for f in listing.files[:listing.n_train]]
    expected = np.mean([WRITE.get(k, WRITE["rgb"])[1].mean(0) / 255 for k, _ in cases], 0)   # quadrants are equally large
    assert not check.broken and np.abs(expected - check.mean).max() < .002
    assert check.sizes[:len(cases)].tolist() == [list(SIZES[s][::-1]) for _, s in cases]
    said = describe(root, root.parent / "batch.png", SIDE, cache=root.parent / "cache").text
    assert "Broken pictures: none" in said and f"{check.mean[0]:.3f}" in said


def test_pictures_outside_of_a_learner_are_read_alike(seen):
    for k, s in CASES:
        if s != "equal": continue
        x = open_pictures(seen.file((k, s)), SIDE)[0] * 255
        assert np.abs(x.permute(1, 2, 0).numpy() - quadrants(WRITE[k][1], SIDE, SIDE)).max() <= WRITE[k][2] + .01
