"The page of maps: what it holds, what it weighs, what its script draws, and the command that makes it."
import base64
import html
import io
import json
import re
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch
from fastai.vision.all import (
    BCEWithLogitsLossFlat, CategoryBlock, CrossEntropyLossFlat, DataBlock, get_image_files, ImageBlock, Learner, MSELossFlat, parent_label,
    RandomSplitter, RegressionBlock, Resize)
from PIL import Image
from torch import nn

from attnpool.cli import main
from attnpool.heads import AvgPoolHead, ClassQueryPoolHead, LearnedAggregationHead
from attnpool.maps.compute import Saliency
from attnpool.maps.draw import looks_everywhere, scale_of
from attnpool.maps.learner import Pictures
from attnpool.maps.page import html_page, look, Look, LOOKS_SCRIPT, LOOKS_STYLE, looks_html, maps_page
from attnpool.maps.reading import Reading
from attnpool.registry import BadInput

NAMES = ["cat", "coffee cup", "person", "rocket", "temple", "flower"]


def photographs(width=640):
    "Eight real photos, as wide as asked, with grain as a camera's."
    import skimage.data
    from sklearn.datasets import load_sample_image
    some = [getattr(skimage.data, name)() for name in ("chelsea", "coffee", "astronaut", "rocket")]
    some += [load_sample_image(f"{name}.jpg") for name in ("china", "flower")]
    rng = np.random.default_rng(0)
    def large(pixels):
        im = Image.fromarray(pixels)
        im = im.resize((width, round(im.height * width / im.width)), Image.Resampling.BICUBIC)
        return Image.fromarray((np.asarray(im) + rng.normal(0, 3, (im.height, im.width, 1))).clip(0, 255).astype("uint8"))
    return [large(np.ascontiguousarray(p)) for p in (*some, some[0][:, ::-1], some[5][:, ::-1])]


def made_look(shown, name="", classes=6, m=3, grid=(7, 7), seed=0, labels=None, one=True, per_class="logit", names=None, vocab=None):
    "A look of made-up numbers."
    g, b = torch.Generator().manual_seed(seed), len(shown)
    p = torch.rand(b, classes, generator=g).mul(4).softmax(1)
    if labels is not None: p[torch.arange(b), labels] += torch.rand(b, generator=g)
    p /= p.sum(1, keepdim=True)
    side = torch.tensor([min(im.size) for im in shown], dtype=torch.float)
    w, h = torch.tensor([im.size for im in shown], dtype=torch.float).T
    crops = torch.stack([(w - side) / 2, (h - side) / 2, (w + side) / 2, (h + side) / 2], 1)
    pictures = Pictures(torch.zeros(b, 3, 8, 8), shown, crops, names or [f"{i}.jpg" for i in range(b)], labels, None)
    weights = torch.randn(b, 1, grid[0] * grid[1], generator=g).mul(1.5).softmax(-1).view(b, 1, *grid) * grid[0] * grid[1]
    several = Saliency(torch.randn(b, m, *grid, generator=g) * 2, per_class)
    return Look(name, dict(name=name, head="slim", data="photos"), pictures, Reading(CrossEntropyLossFlat(), vocab or NAMES[:classes]), p,
                p.argmax(1), Saliency(weights, "uniform") if one else None, p.topk(m).indices, several)


def whole(looks, path):
    path.write_text(html_page("Maps", "{{ looks|safe }}", LOOKS_STYLE, LOOKS_SCRIPT, looks=looks_html(looks)), encoding="utf-8")
    return path


def payload(page): return json.loads(re.search('<script type="application/json">(.*?)</script>', page, re.S)[1])


def pictures_in(page):
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r'src="data:image/\w+;base64,(.*?)"', page)]


def maps_in(data, run, i):
    "The levels of a picture's maps, -1 to 1, by part."
    flat, parts = np.frombuffer(base64.b64decode(data["runs"][run]["levels"][i]), np.int8), []
    for part in data["runs"][run]["parts"]:
        n = part["n"] * part["h"] * part["w"]
        parts.append(torch.tensor(flat[:n].reshape(part["n"], part["h"], part["w"]) / 127))
        flat = flat[n:]
    assert not len(flat)
    return parts


@pytest.fixture(scope="module")
def shown(): return photographs()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    "Two classes of six small photos, and what else lies in folders."
    root = tmp_path_factory.mktemp("page") / "photos"
    for k, im in enumerate(photographs(90)[:2]):
        (root / NAMES[k]).mkdir(parents=True)
        for i in range(6): im.crop((i, 0, 80 + i, 54)).save(root / NAMES[k] / f"{NAMES[k][:3]} {i}.png")
    return root


def learner(photos, n_out=2, head=AvgPoolHead, **kwargs):
    torch.manual_seed(1)
    dls = DataBlock((ImageBlock, CategoryBlock), get_items=get_image_files, splitter=RandomSplitter(seed=0), get_y=parent_label,
                    item_tfms=Resize(32)).dataloaders(photos, bs=4, num_workers=0, device="cpu")
    return Learner(dls, nn.Sequential(nn.Conv2d(3, 16, 5, 4), nn.ReLU(), head(16, n_out)), **kwargs)


def test_a_page_holds_the_levels_of_the_scale_and_its_colours(shown):
    a, b = made_look(shown[:3], "a"), made_look(shown[:3], "b", grid=(5, 4), seed=1, one=False)
    data = payload(looks_html([a, b]))
    for unit, of in dict(uniform=[a.saliency], logit=[a.per_class, b.per_class]).items():
        scale, told = scale_of(of), data["scales"][unit]
        assert told["high"] == pytest.approx(scale.high) and told["log"] == (unit == "uniform")
        assert [tuple(t) for t in told["ticks"]] == [tuple(t) for t in scale.ticks()]
        assert np.array_equal(np.frombuffer(base64.b64decode(told["table"]), np.uint8).reshape(255, 4), scale.table())
    for run, of in enumerate((a, b)):
        for i in range(3):
            found, parts = maps_in(data, run, i), [s for s in (of.saliency, of.per_class) if s]
            assert len(found) == len(parts)
            for levels, s in zip(found, parts):
                assert levels.shape == s.values[i].shape
                assert (levels - scale_of([a.per_class, b.per_class] if s.unit == "logit" else [a.saliency]).level(s.values[i])).abs().max() < .51 / 127
    crop = data["runs"][0]["crops"][0]
    assert np.allclose(crop, a.pictures.crops[0].numpy() / np.tile(shown[0].size, 2), atol=1e-4)


def test_a_page_of_eight_photos_two_runs_and_several_classes_is_below_300_kb(shown, tmp_path):
    looks = [made_look(shown, "a", m=4, labels=torch.zeros(8, dtype=torch.long)), made_look(shown, "b", m=4, seed=1, one=False)]
    page = whole(looks, tmp_path / "maps.html")
    assert page.stat().st_size < 300_000
    found = pictures_in(page.read_text(encoding="utf-8"))
    assert len(found) == 8   # each once
    for im, original in zip(found, shown):
        assert im.width == 640
        error = np.square(np.asarray(im.convert("RGB"), float) - np.asarray(original, float)).mean()
        assert 10 * np.log10(255**2 / error) > 28   # decibels: readable, grain and all
    few = whole([made_look(shown[:1])], tmp_path / "one.html")
    assert np.square(np.asarray(pictures_in(few.read_text(encoding="utf-8"))[0].convert("RGB"), float) - np.asarray(shown[0], float)).mean() < 30


def test_twenty_classes_cost_a_page_bytes_and_not_pictures(shown):
    vocab = [f"class {i}" for i in range(20)]
    few, many = (len(looks_html([made_look(shown[:4], classes=20, m=m, vocab=vocab)])) for m in (1, 20))
    assert (many - few) / (4 * 19) < 49 * 4 / 3 + 130   # a map of 7x7 positions, and its line in the list


def test_pictures_of_a_page_are_reduced_and_small_ones_are_exact(shown):
    rng = np.random.default_rng(0)
    def noise(h, w): return Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype="uint8"))
    odd = [noise(40, 30), shown[0].resize((3000, 150)), shown[0].resize((100, 4000)), shown[1]]
    found = pictures_in(looks_html([made_look(odd)], pixels=320))
    assert [im.size for im in found] == [(30, 40), (320, 16), (12, 480), (320, 214)]
    assert np.array_equal(np.asarray(found[0].convert("RGB")), np.asarray(odd[0]))


def test_a_page_knows_what_is_right_and_by_what_it_is_sorted(shown):
    labels = torch.tensor([0, 1, 2, 3])
    of = made_look(shown[:4], labels=labels)
    of = replace(of, p=torch.eye(6)[[0, 2, 2, 3]] * .7 + .05, said=torch.tensor([0, 2, 2, 3]))
    flat = Saliency(torch.cat([torch.ones(1, 1, 7, 7), of.saliency.values[1:]]), "uniform")
    page = looks_html([replace(of, saliency=flat)])
    columns = page.split('<div class="column"')[1:]
    assert [("✓" in c, "wrong:" in c) for c in columns] == [(True, False), (False, True), (True, False), (True, False)]
    errors = [float(e) for e in re.findall('data-error="(.*?)"', page)]
    assert np.allclose(errors, -np.log([.75, .05, .75, .75]), atol=1e-3)
    assert np.allclose([float(e) for e in re.findall('data-unsure="(.*?)"', page)], -.75 * np.log(.75) - 5 * .05 * np.log(.05), atol=1e-3)
    spread = [float(e) for e in re.findall('data-spread="(.*?)"', page)]
    assert spread[0] == 1 and max(spread[1:]) < .99
    assert ["looks everywhere" in c for c in columns] == looks_everywhere(flat).tolist() and looks_everywhere(flat)[0]
    assert page.count("<small>is ") == 4 and "is coffee cup" in page
    unknown = looks_html([made_look(shown[:2])])   # nothing is known to be true
    assert "data-error" not in unknown and "✓" not in unknown and "<small>" not in unknown


def test_names_on_a_page_are_escaped_wherever_they_stand(shown):
    evil = "</script><img src=x onerror=alert(1)>\"'{{ 7*7 }}"
    of = made_look(shown[:2], evil, names=[evil, f"{evil}.jpg"], labels=torch.tensor([0, 1]), vocab=[evil] * 6)
    page = looks_html([of, replace(of, name="b", about={evil: evil})])
    assert page.count("<img") == 2 and "{{ 7*7 }}" in html.unescape(page) and "49" not in re.sub("base64,.*?\"", "", page.split("<script")[0])
    assert page.count("</script>") == 1 and payload(page)["runs"][0]["name"] == evil


def test_a_page_needs_no_network(shown, tmp_path):
    page = whole([made_look(shown[:1])], tmp_path / "m.html").read_text(encoding="utf-8")
    assert not re.findall(r"https?:|//\w+\.\w+/|@import|url\(", re.sub("base64,[^\"]*", "", page)) and "<noscript>" in page


def test_runs_side_by_side_on_a_page_need_the_same_pictures(shown):
    a, b = made_look(shown[:2], "a"), made_look(shown[1:3], "b", names=["x.jpg", "y.jpg"])
    with pytest.raises(BadInput, match="^looks: 'a' and 'b' show other pictures.*name the files"): looks_html([a, b])
    with pytest.raises(BadInput, match="^looks: there is none"): looks_html([])


@pytest.mark.parametrize("head, one, unit", [(AvgPoolHead, False, "logit"), (LearnedAggregationHead, True, "mean"), (ClassQueryPoolHead, False, "uniform")])
def test_a_look_has_a_map_for_each_class_and_one_for_all_where_the_head_has_one(photos, head, one, unit):
    learn = learner(photos, head=head)
    of = look(learn, photos, top=2, pixels=64)
    assert (of.saliency is not None) == one and of.per_class.unit == unit and of.per_class.values.shape[:2] == (12, 2)
    assert of.p.shape == (12, 2) and torch.equal(of.chosen[:, 0], of.said) and max(im.width for im in of.pictures.shown) == 64
    page = looks_html([of])
    assert page.count('class="pick"') == 12 * (2 + one) and page.count("one map for all") == 12 * one
    assert page.split("<script")[0].count(dict(logit="class activation", mean="Grad-CAM", uniform="a query for each")[unit]) == 12


def test_pages_of_numbers_of_labels_and_of_a_single_output(photos, tmp_path):
    numbers = DataBlock((ImageBlock, RegressionBlock), get_items=get_image_files, splitter=RandomSplitter(seed=0),
                        get_y=lambda f: float(f.stem[-1]), item_tfms=Resize(32)).dataloaders(photos, bs=4, num_workers=0, device="cpu")
    for head in (AvgPoolHead, LearnedAggregationHead):
        one = learner(photos, 1, head, loss_func=BCEWithLogitsLossFlat())
        page = maps_page(one, tmp_path / "one.html", n=2).read_text(encoding="utf-8")
        assert page.count('class="plain"') == 4 and "%" in page and len(payload(page)["runs"][0]["parts"]) == 1
        column = Learner(numbers, nn.Sequential(nn.Conv2d(3, 16, 5, 4), nn.ReLU(), head(16, 1)), loss_func=MSELossFlat())
        page = maps_page(column, tmp_path / "number.html", n=2).read_text(encoding="utf-8")
        assert page.count("output 0") == 2 and len(re.findall("data-error", page)) >= 2
    several = learner(photos, 2, loss_func=BCEWithLogitsLossFlat())
    assert payload(maps_page(several, tmp_path / "labels.html", n=2).read_text(encoding="utf-8"))["runs"][0]["parts"][0]["n"] == 2


def test_a_page_of_several_learners_has_a_column_for_each(photos, tmp_path):
    both = {"mine": learner(photos), "theirs": learner(photos, head=LearnedAggregationHead)}
    page = maps_page(both, tmp_path / "m.html", n=2).read_text(encoding="utf-8")
    data = payload(page)
    assert [r["name"] for r in data["runs"]] == ["mine", "theirs"] and set(data["scales"]) == {"logit", "uniform", "mean"}
    assert page.count('class="column"') == 4 and len(pictures_in(page)) == 2
    assert re.findall("<h4>(.*?)</h4>", page) == ["mine", "theirs"] * 2
    names = re.findall('data-name="(.*?)"', page)   # of the files that validated
    assert all(any(f.name == html.unescape(n) for f in get_image_files(photos)) for n in names)
    for bad in (dict(top=0), dict(pixels=3), dict(classes=["dog"])):
        with pytest.raises(BadInput, match=f"^{next(iter(bad))}: "): maps_page(both, tmp_path / "m.html", n=2, **bad)


browser = pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")


def opened(page, tmp_path, actions, *words):
    "What `actions` (JavaScript, an expression) makes of the page, and what the browser complained about."
    copy = tmp_path / "opened.html"
    script = f"<script>addEventListener('load', () => setTimeout(async () => {{ const pre = document.createElement('pre'); pre.id = 'told'; " \
             f"pre.textContent = JSON.stringify(await {actions}); document.body.append(pre); }}, 300))</script>"
    copy.write_text(page.read_text(encoding="utf-8").replace("</body>", script + "</body>"), encoding="utf-8")
    done = subprocess.run(["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr",
                           "--v=0", "--virtual-time-budget=8000", "--dump-dom", *words, copy.as_uri()], capture_output=True, text=True, timeout=240)
    told = re.search('<pre id="told">(.*?)</pre>', done.stdout, re.S)
    assert told, done.stderr[-2000:]
    return json.loads(html.unescape(told[1])), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


ACTIONS = """(async () => {
  const press = key => dispatchEvent(new KeyboardEvent('keydown', {key})), all = s => [...document.querySelectorAll(s)];
  const root = document.querySelector('.looks'), canvas = document.querySelector('.saw canvas'), told = {};
  const pixels = () => {
    const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext('2d', {willReadFrequently: true});
    copy.drawImage(canvas, 0, 0);
    return [...copy.getImageData(0, 0, canvas.width, canvas.height).data];
  };
  const until = async right => {   // the browser's time runs ahead of its frames and events where nothing works
    for (let i = 0; i < 300 && !right(); i++) {
      for (let real = 0; real < 2e7; real++);
      await new Promise(done => setTimeout(done, 10));
    }
  };
  await until(() => canvas.width !== 300);   // drawn
  told.smooth = canvas.width; press('c'); told.cells = [canvas.width, canvas.height, pixels()];
  told.off = [press('m'), root.classList.contains('off'), press('m'), root.classList.contains('off')];
  press('-'); told.strength = root.style.getPropertyValue('--strength');
  const picks = [...document.querySelectorAll('.column')[0].querySelectorAll('.pick')];
  picks[1].dispatchEvent(new PointerEvent('pointerenter')); told.hovered = pixels();
  picks[1].dispatchEvent(new PointerEvent('pointerleave')); told.back = pixels();
  press('w'); told.speaks = [pixels(), picks.map(p => p.getAttribute('aria-pressed'))]; press('w');
  press('x'); told.stretched = [document.querySelector('.warn').hidden, pixels()]; press('x');
  const order = document.querySelector('select'); order.value = 'error'; order.dispatchEvent(new Event('change'));
  told.sorted = all('.card').map(c => c.dataset.index);
  const box = document.querySelector('.card[data-index="0"] .saw').getBoundingClientRect();
  const at = (x, y) => ({clientX: box.left + box.width * x, clientY: box.top + box.height * y, bubbles: true});
  document.querySelector('.card[data-index="0"] .stage').dispatchEvent(new PointerEvent('pointermove', at(.5 / 7, .5 / 7)));
  told.value = document.querySelector('.value').textContent;
  document.querySelector('.stage').click(); told.large = [document.querySelector('dialog.large').open, all('dialog .card').length];
  press('ArrowRight'); told.turned = document.querySelector('dialog .card').dataset.index;
  document.querySelector('dialog.large').close(); await until(() => all('.cards .card').length === 3);   // put back
  told.cards = all('.cards .card').length;
  press('2'); told.alone = all('.column').map(c => c.hidden); press('0'); told.together = all('.column').map(c => c.hidden);
  press('?'); told.keys = document.querySelector('dialog.keys').open; document.querySelector('dialog.keys').close();
  told.ticks = all('.ticks span').map(t => t.textContent); told.bars = all('.scale').length;
  told.wide = document.documentElement.scrollWidth - innerWidth;
  return told;
})()"""


@browser
@pytest.mark.parametrize("width", [1280, 390])
def test_the_script_of_the_page_draws_sorts_and_turns_without_an_error(shown, tmp_path, width):
    labels = torch.tensor([0, 1, 2])
    a, b = made_look(shown[:3], "a", labels=labels), made_look(shown[:3], "b", seed=1, labels=labels, one=False)
    page = whole([a, b], tmp_path / "maps.html")
    dark = ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if width == 390 else []
    told, complaints = opened(page, tmp_path, ACTIONS, f"--window-size={width},900", *dark)
    assert not complaints
    uniform, logit, data = scale_of([a.saliency]), scale_of([a.per_class, b.per_class]), payload(page.read_text(encoding="utf-8"))
    (one,), several = (m for m in maps_in(data, 0, 0))
    def colours(scale, levels): return scale.table()[(levels * 127).round().long().flatten() + 127].astype(int)
    def like(drawn, scale, levels):   # a canvas keeps colours multiplied by their alpha
        drawn, true = np.reshape(drawn, (-1, 4)), colours(scale, levels)
        assert np.array_equal(drawn[:, 3], true[:, 3])
        assert (np.abs(drawn - true)[:, :3] * true[:, 3:] <= 255 * 1.01).all()
    assert told["smooth"] > 100 and told["cells"][:2] == [7, 7]
    like(told["cells"][2], uniform, one)
    like(told["hovered"], logit, several[0])
    assert told["back"] == told["cells"][2] and told["speaks"][0] == told["hovered"]
    assert told["speaks"][1] == ["false", "true", "false", "false"]
    full = (one - one.min()) / (one.max() - one.min()) * 2 - 1
    assert told["stretched"][0] is False
    like(told["stretched"][1], uniform, full)
    assert told["off"][1::2] == [True, False] and told["strength"] == "0.8"
    p = torch.stack([of.p[torch.arange(3), labels] for of in (a, b)[:2 if width == 1280 else 1]]).amin(0)   # a phone begins with one run
    assert [int(i) for i in told["sorted"]] == p.argsort().tolist()
    value = min(max(float(a.saliency.values[0, 0, 0, 0]), 1 / uniform.high), uniform.high)
    shown_value = float(re.match(r"[\d.]+", told["value"])[0])
    assert "× average pooling here" in told["value"] and shown_value == pytest.approx(value, rel=.1, abs=.06)
    assert told["large"] == [True, 1] and told["turned"] == told["sorted"][1] and told["cards"] == 3
    assert told["alone"] == [True, False] * 3 and told["together"] == [False] * 6 and told["keys"]
    assert told["bars"] == 2 and set(told["ticks"]) == {text for s in (uniform, logit) for _, text in s.ticks()}
    assert told["wide"] <= 0


def called(*words):
    with pytest.raises(SystemExit) as done: main([str(w) for w in words])
    return done.value.code


@pytest.fixture(scope="module")
def runs(photos, tmp_path_factory):
    "Two runs of two heads on the photos."
    out = tmp_path_factory.mktemp("page_runs")
    assert called("bench", photos, "--heads", "avg,slim", "--seeds", 1, "--epochs", 1, "--size", 32, "--bs", 4, "--device", "cpu", "--out", out) == 0
    return sorted(out.glob("photos-*-1-*"))


def test_the_command_puts_two_runs_side_by_side_on_a_page(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photographs(900)[0].save("my photo.jpg")
    assert called("maps", *runs, "my photo.jpg", "--device", "cpu", "--pixels", 320) == 0
    said, page = capsys.readouterr().out, (tmp_path / "maps.html").read_text(encoding="utf-8")
    assert "2 models side by side" in said and "maps.html" in said
    assert [r["name"] for r in payload(page)["runs"]] == [r.name for r in runs] and 'data-name="my photo.jpg"' in page
    assert pictures_in(page)[0].width == 320 and "head avg" in page and "head slim" in page and "data photos" in page
    assert called("maps", runs[0], "--device", "cpu") == 0 and "side by side" not in capsys.readouterr().out   # its own pictures
    assert "<small>is " in (tmp_path / "maps.html").read_text(encoding="utf-8")


def test_the_command_tells_models_from_pictures_and_says_what_is_wrong_before_a_page_is_made(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "mixed"
    folder.mkdir()
    shot = photographs(200)[0]
    shot.resize((2000, 40)).save(folder / "panorama.png")
    shot.resize((30, 900)).save(folder / "tower.png")
    shot.convert("L").save(folder / "grey.png")
    (folder / "notes.txt").write_text("no picture")
    assert called("maps", folder, runs[1], "--device", "cpu") == 0   # in any order
    told = capsys.readouterr()
    assert "left out" in told.err and "notes.txt" in told.err
    page = (tmp_path / "maps.html").read_text(encoding="utf-8")
    assert re.findall('data-name="(.*?)"', page) == ["grey.png", "panorama.png", "tower.png"]
    before = page
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    for words, says in ((["mixed"], "MODEL: mixed is"), ([runs[0], "mixed"], "broken.png"), ([runs[0], "none.jpg"], "none.jpg"),
                        ([tmp_path / "nowhere"], "nowhere"), ([runs[0], "--classes", "dog"], "classes: 'dog'"), ([runs[0], "--top", 0], "top: ")):
        assert called("maps", *words, "--device", "cpu") == 2, words
        assert says in capsys.readouterr().err
    assert (tmp_path / "maps.html").read_text(encoding="utf-8") == before
