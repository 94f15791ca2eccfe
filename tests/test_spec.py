"What names a run: the values that were decided, and nothing else."
import json
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from attnpool.cli import main
from attnpool.data import DataId, identify
from attnpool.recipe import get_recipe, rates_of, Recipe
from attnpool.registry import BadInput
from attnpool.runs.spec import data_for, make_spec, read_spec, Spec
from attnpool.runs.store import load_run, Result, write_result
from attnpool.tasks import split_options, TASKS


def test_a_spec_is_its_values():
    with pytest.raises(ValueError, match="arch: 'resnet19' is unknown"): make_spec(arch="resnet19")
    a = make_spec(head="concat", seed=1)
    assert a == make_spec(head="concat", seed=1, lr=rates_of("quick")["concat"]) and a.id == make_spec(head="concat", seed=1).id
    others = [make_spec(head="slim", seed=1), make_spec(head="concat", seed=2), make_spec(head="concat", epochs=9), make_spec(head="concat", lr=1e-5),
              make_spec(head="concat", options=dict(num_heads=2)), make_spec(head="concat", drop_path=.1), make_spec(head="concat", eval_sizes=[48])]
    assert len({s.id for s in [a, *others]}) == 8
    assert a.recipe.lr == rates_of("quick")["concat"]


def test_ids_stay_what_they_are():
    "A change here makes every run anew: these are the names of folders on people's disks."
    assert make_spec(head="avg", seed=1).name == "digits-avg-1-8fa46fb3e0"


@dataclass(frozen=True)
class Wider(Recipe):
    copies: int = 1 # Views of each picture


def test_a_new_field_renames_no_run():
    spec = make_spec(head="avg")
    values = {k: v for k, v in vars(spec.recipe).items()}
    assert replace(spec, recipe=Wider(**values)).id == spec.id != replace(spec, recipe=Wider(**values, copies=2)).id


def test_places_and_names_are_no_part_of_an_id():
    spec = make_spec(head="avg")
    moved = replace(spec, data=replace(spec.data, path="/elsewhere"))
    renamed = replace(spec, recipe=replace(spec.recipe, name="mine"))
    assert moved == spec == renamed and moved.id == spec.id == renamed.id
    assert replace(spec, data=replace(spec.data, fingerprint="0123")).id != spec.id


def test_equal_values_are_written_equally():
    a = make_spec("digits", "learned", 1, "xresnext50s", lr=1, options={"num_heads": 2, "layers": [1, 1, 2]}, eval_sizes=[np.int64(48)])
    b = make_spec("digits", "learned", np.int64(1), "xresnext50s", lr=np.float64(1.), options={"layers": (1, 1, 2), "num_heads": 2}, eval_sizes=(48,))
    assert a == b and a.id == b.id and hash(a) == hash(b)
    assert make_spec(head="learned", options=dict(num_heads=1)) == make_spec(head="learned")   # its default


def test_what_is_written_is_read(tmp_path):
    spec = make_spec("digits", "learned", arch="xresnext50s", recipe="mixed", options={"num_heads": 2, "layers": [1, 1, 2]}, eval_sizes=[48])
    assert read_spec(json.loads(json.dumps(spec.to_json()))) == spec
    result = write_result(Result(spec, "diverged", {}, "accuracy", diverged_epoch=0), tmp_path)
    assert load_run(tmp_path) == result and load_run(tmp_path).value is None and load_run(tmp_path).history().empty


FLAT = dict(data="pics/my.photos", arch="resnet18", head="slim", seed=3, recipe="blog", epochs=2, size=40, bs=32, lr=.004, opt="ranger",
            schedule="flat_cos", label_smoothing=.1, mix="cutmixup", wd=None, precision="auto", eval_sizes=[48], skip_broken=True)


def test_specs_of_earlier_versions_are_read():
    spec = read_spec(FLAT)
    assert (spec.task, spec.data, spec.data.path, spec.eval_sizes, spec.skip_broken) == ("classify", DataId("my.photos"), "pics/my.photos", (48,), True)
    assert spec.recipe == Recipe(2, 40, 32, .004, label_smoothing=.1, mix="cutmixup") and spec.recipe.name == "blog"
    for typed, name in (("imagenette-128.tar", "imagenette-128"), ("a/pets.tar.gz", "pets"), ("list.csv", "list"), ("digits", "digits")):
        assert read_spec(FLAT | dict(data=typed)).data.name == name
    assert read_spec({k: v for k, v in FLAT.items() if k != "mix"} | dict(mix="")).recipe.mix == "none"


def test_a_recipe_of_another_version():
    values = make_spec(head="avg").to_json()
    older = {k: v for k, v in values["recipe"].items() if k not in ("train", "drop_path", "augment")}   # what was not there stands at its default
    assert read_spec(values | dict(recipe=older)) == make_spec(head="avg")
    with pytest.raises(BadInput, match="recipe: this version knows no copies. The run was made by a newer one"):
        read_spec(values | dict(recipe=values["recipe"] | dict(copies=2)))
    with pytest.raises(BadInput, match="spec: this version knows no node"): read_spec(values | dict(node=1))


def test_options_find_whom_they_are_for():
    assert split_options("learned", "xresnext50s", dict(num_heads=2, widen=.5)) == (dict(num_heads=2), dict(widen=.5))
    assert split_options("learned", "resnet18", dict(num_heads=2, stem_width=16)) == (dict(num_heads=2), dict(stem_width=16))
    with pytest.raises(BadInput, match="options: 'num_head' is unknown. Did you mean 'num_heads'?"): make_spec(head="learned", options=dict(num_head=2))
    with pytest.raises(BadInput, match="options: 'num_heads' is unknown"): make_spec(head="avg", options=dict(num_heads=2))
    spec = make_spec(head="learned", arch="xresnext50s", options=dict(num_heads=2, widen=.25, layers=(1, 1, 1)))
    dls = TASKS["classify"].dls(spec, 32, "cpu")
    model, _ = TASKS["classify"].model(spec, dls)
    assert model[-1][0].attn.num_heads == 2 and model[-1][0].attn.ni == 256
    with pytest.raises(BadInput, match="stem_widht: the network resnet10t has no such option"):
        TASKS["classify"].model(make_spec(arch="resnet10t", options=dict(stem_widht=16)), dls)


def test_weights_begin_from_scratch():
    with pytest.raises(BadInput, match="start: there are no pretrained weights of xeca_resnext_tiny"): make_spec(start="pretrained")


def test_an_identity_at_hand_is_not_looked_for_again():
    data = DataId("pets", fingerprint="abc", path="/not/there")
    assert make_spec(data, "avg").data is data


@pytest.fixture
def home(tmp_path, monkeypatch):
    from fastai.data.external import fastai_cfg
    monkeypatch.setenv("FASTAI_HOME", str(tmp_path / "home"))
    fastai_cfg.cache_clear()
    yield tmp_path / "home" / "data"
    fastai_cfg.cache_clear()


def imagenette(root):
    for split in ("train", "val"):
        for c, level in (("n01440764", 60), ("n02102040", 180)):
            (root / split / c).mkdir(parents=True)
            for i in range(4): Image.new("RGB", (24, 20), (level, level, 9 * i)).save(root / split / c / f"{i}.JPEG")
    return root


def test_the_recipe_blog_takes_the_blogs_version_and_sizes(home, tmp_path, monkeypatch, capsys):
    imagenette(home / "imagenette2-320")
    spec = make_spec("imagenette", "avg", recipe="blog")
    assert (spec.data.name, spec.data.path, spec.data.family, spec.eval_sizes) == ("imagenette-320", "imagenette-320", "imagenette", (256, 384))
    assert spec == make_spec("imagenette-320", "avg", recipe=get_recipe("blog", "avg", "imagenette")) == make_spec(data_for("imagenette", "blog"), recipe="blog")
    assert make_spec("imagenette", recipe="blog", eval_sizes=[]).eval_sizes == () == make_spec("imagenette-320").eval_sizes
    assert make_spec("imagenette", recipe="blog", eval_sizes=[288]).eval_sizes == (288,)
    own = imagenette(tmp_path / "mine")   # of the same family, and nobody knows a larger version
    assert make_spec(own, recipe="blog").eval_sizes == () and make_spec(own, recipe="blog").data.name == "mine"
    import attnpool.runs.sweep as sweeping
    asked = []
    monkeypatch.setattr(sweeping, "sweep", lambda specs, *args: asked.extend(specs) or [])
    for words in (["--recipe", "blog"], ["--recipe", "blog", "--eval-sizes", ""]):
        with pytest.raises(SystemExit): main(["bench", "imagenette", "--heads", "avg", "--seeds", "1", "--device", "cpu", *words])
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "As in the blog: trained on imagenette-320, validated at 256 and 384 px as well." in said
    assert [s.eval_sizes for s in asked] == [(256, 384), ()] and asked[0] == spec


def test_petals_have_their_rates_by_their_family():
    rates = {family: make_spec(DataId("x", family), "learned", recipe="blog").recipe.lr for family in ("imagenette", "imagewoof", "petals")}
    assert rates == dict(imagenette=2e-3, imagewoof=9e-4, petals=6e-4)


def test_what_a_result_got_last_stands_last():
    names = [f.name for f in fields(Result)]
    assert names[-4:] == ["folder", "epochs", "classes", "test"]   # of calls by position
