"Fixres: runs that go on from runs, at a higher resolution, for other classes, with a query for each class."
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from fastai.callback.core import Callback
from PIL import Image
from safetensors.torch import load_file, save_file

from attnpool.cli import main
from attnpool.models.deit import load_deit
from attnpool.models.start import find_start
from attnpool.recipe import get_recipe, learner_for
from attnpool.registry import BadInput
from attnpool.report.collect import collect, group_by_setting, tell_apart
from attnpool.runs.asked import read_specs
from attnpool.runs.follow import finished_runs, follow_up, runs_to_follow
from attnpool.runs.spec import make_spec, read_spec
from attnpool.runs.train import open_run, run
from attnpool.runs.classes import imagenet_names
from attnpool.tasks import TASKS, head_of

TINY = "patchconvnet_tiny"
SMALL = dict(embed_dim=16, depth=2)   # options of the network, to be quick


def pictures(root, classes, n=dict(train=6, val=3), side=24):
    rng = np.random.default_rng(0)
    for part, count in n.items():
        for i, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for j in range(count):
                pixels = rng.integers(0, 120, (side, side, 3), dtype=np.uint8)
                pixels[..., i % 3] += 100
                Image.fromarray(pixels).save(root / part / name / f"{j}.png")
    return root


@pytest.fixture(scope="module")
def photos(tmp_path_factory): return pictures(tmp_path_factory.mktemp("data") / "photos", ("blue", "green", "red"))


@pytest.fixture(scope="module")
def others(tmp_path_factory): return pictures(tmp_path_factory.mktemp("data") / "others", ("a", "b", "c", "d"))


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    "Runs of two heads with two seeds."
    out = tmp_path_factory.mktemp("runs")
    return {(head, seed): run(make_spec(photos, head, seed, TINY, "quick", epochs=1, size=16, bs=8, lr=1e-3,
                                        drop_path=.25, options=SMALL), out, "cpu")
            for head in ("paper", "paper-avg") for seed in (1, 2)}


def folder_of(trained): return trained["paper", 1].folder.parent


def model_of(spec, bs=4):
    task = TASKS[spec.task]
    torch.manual_seed(spec.seed)
    return task.model(spec, task.dls(spec, bs, "cpu"))[0]


def bench(*words):
    with pytest.raises(SystemExit) as e: main(["bench", *map(str, words), "--device", "cpu"])
    return e.value.code


# ---------------------------------------------------------------- runs that follow

def test_fixres_follows_each_run_of_a_folder_and_stands_beside_it(trained, photos, tmp_path, capsys):
    shutil.copytree(folder_of(trained), runs := tmp_path / "runs")
    words = (photos, "--recipe", "fixres", "--start", runs, "--size", 24, "--epochs", 1, "--bs", 8, "--out", runs)
    assert not bench(*words)
    said = capsys.readouterr().out
    assert "run 4/4" in said and "from quick at 16 px, fixres, 24 px" in said
    results, problems = collect([runs])
    first, after = group_by_setting(results)
    if first[0].spec.start: first, after = after, first
    assert not problems and [len(first), len(after)] == [4, 4]
    before = {(r.spec.head, r.spec.seed): r for r in first}
    for r in after:
        was, spec = before[r.spec.head, r.spec.seed], r.spec
        assert spec.start.path == str(was.folder) and spec.start.after.startswith("quick at 16 px #")
        assert (spec.arch, spec.options, spec.split, spec.data) == (was.spec.arch, was.spec.options, "own", was.spec.data)
        assert spec.recipe == get_recipe("fixres", size=24, epochs=1, bs=8, drop_path=.15)
        assert find_start(was.folder, TINY, **dict(was.spec.options)).fingerprint == spec.start.fingerprint
        assert load_file(r.folder / "weights.safetensors").keys() == load_file(was.folder / "weights.safetensors").keys()
    assert not bench(*words)
    said = capsys.readouterr().out
    assert "4 of 8 runs in" in said and "made by the recipe fixres from others in it" in said
    assert "4 of 4 runs are in" in said and len(finished_runs(runs)) == 8


def test_fixres_begins_with_all_that_the_run_has_learned(trained):
    for r in trained.values():
        state, learned = model_of(follow_up(r, size=24)).state_dict(), load_file(r.folder / "weights.safetensors")
        assert state.keys() == learned.keys() and all(torch.equal(state[k], learned[k]) for k in state)


def test_fixres_of_fixres_and_what_it_keeps(trained, photos, tmp_path):
    r = trained["paper", 2]
    one = run(follow_up(r, size=24, epochs=1, bs=8, micro_bs=4), tmp_path, "cpu")
    two = follow_up(one.folder, size=32)
    assert [s.recipe.drop_path for s in (r.spec, one.spec, two)] == [.25, .15, .05]
    assert follow_up(replace(one, spec=two, folder=one.folder), size=32).recipe.drop_path == 0
    assert follow_up(r, size=24, drop_path=.3).recipe.drop_path == .3 and follow_up(r, "quick").recipe.drop_path == 0
    assert two.start.after.startswith("fixres at 24 px #") and two.seed == 2 and two.head == "paper"
    assert read_spec(json.loads(json.dumps(two.to_json()))) == two and read_spec(two.to_json()).start.after == two.start.after
    assert replace(two, start=replace(two.start, after="")).id == two.id   # a name is no decision
    assert one.history().accuracy.between(0, 1).all()
    alone = read_specs(str(photos), None, None, "fixres", start=one.folder, size=32)   # a run by itself
    assert alone == [two]


def test_fixres_follows_what_was_named(trained, photos, capsys):
    runs = folder_of(trained)
    def asked(heads=None, seeds=None, **more): return read_specs(str(photos), heads, seeds, "fixres", start=runs, size=24, **more)
    assert [(s.head, s.seed) for s in asked("paper")] == [("paper", 1), ("paper", 2)]
    assert [(s.head, s.seed) for s in asked(None, "2")] == [("paper", 2), ("paper-avg", 2)]
    assert {s.recipe.lr for s in asked("paper", "1", rates=[1e-4, 1e-3])} == {1e-4, 1e-3}
    with pytest.raises(BadInput, match="heads: 'learned' is unknown. Known: paper, paper-avg"): asked("learned")
    with pytest.raises(BadInput, match="seeds: '7' is unknown. Known: 1, 2"): asked(None, "7")
    with pytest.raises(BadInput, match=f"arch: 'resnet18' is unknown. Known: {TINY}"): asked(arch="resnet18")
    with pytest.raises(BadInput, match="--splits: each run keeps its own split, got 3"): asked(splits=3)
    with pytest.raises(BadInput, match="colour: the network patchconvnet_tiny has no such option"): asked(options="colour=red")
    with pytest.raises(BadInput, match="size: .* patches of 8x8 pixels, which do not divide 100. Use 96 or 104"):
        read_specs(str(photos), None, None, "fixres", start=runs, size=100)


@pytest.mark.parametrize("recipe", ["fixres", "finetune-21k"])
def test_fixres_needs_weights(recipe, photos):
    with pytest.raises(BadInput, match=f"^start: recipe {recipe} .* begins from trained weights, got none"): make_spec(photos, recipe=recipe)


def test_fixres_without_a_finished_run_says_what_there_is(trained, tmp_path, photos, capsys):
    def said(folder):
        with pytest.raises(BadInput) as e: read_specs(str(photos), None, None, "fixres", start=folder, size=24)
        return str(e.value)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/readme.txt").write_text("nothing")
    with pytest.raises(BadInput, match="start: .*there is no run in .*notes. It holds readme.txt"): finished_runs(tmp_path / "notes")
    assert "no run" in said(tmp_path / "empty") and "no run" in said(tmp_path / "notes")
    shutil.copytree(trained["paper", 1].folder, half := tmp_path / "some/half")
    (half / "result.json").unlink()
    shutil.copytree(trained["paper", 2].folder, bad := tmp_path / "some/bad")
    (bad / "result.json").write_text(json.dumps(json.loads((bad / "result.json").read_text()) | dict(status="diverged")))
    told = said(tmp_path / "some")
    assert "no run in" in told and "is finished: " in told and "the run did not finish" in told and "it diverged" in told
    assert bench(photos, "--recipe", "fixres", "--start", tmp_path / "some", "--out", tmp_path / "out") == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "out").exists()
    with pytest.raises(BadInput, match="diverged: there are no weights to go on from"): follow_up(bad)


def test_fixres_takes_runs_of_these_pictures_or_says_that_there_are_none(trained, photos, others, tmp_path, capsys):
    shutil.copytree(folder_of(trained), runs := tmp_path / "runs")
    run(make_spec(others, "paper", 1, TINY, epochs=1, size=16, bs=8, lr=1e-3, options=SMALL), runs, "cpu")
    mine = {r.spec.data.name for r in runs_to_follow(runs, "fixres", make_spec(others).data)[0]}
    assert mine == {"others"}
    assert "4 of 5 runs in" in (line := runs_to_follow(runs, "fixres", make_spec(others).data)[1][0]) and "of other data, photos" in line
    specs = read_specs(str(others), "paper", "1", "finetune-21k", start=folder_of(trained), size=24)
    assert "No run in" in capsys.readouterr().out and [s.data.name for s in specs] == ["others"]
    state, learned = model_of(specs[0]).state_dict(), load_file(trained["paper", 1].folder / "weights.safetensors")
    assert "has other classes: what belongs to a class begins anew, the rest of it goes on" in capsys.readouterr().err
    assert {k for k in state if not torch.equal(state[k], learned[k])} == {"1.2.weight", "1.2.bias"} and len(state["1.2.bias"]) == 4


# ---------------------------------------------------------------- other classes, a query for each

def whole(classes, many=False, **options):
    torch.manual_seed(0)
    net = timm.create_model(TINY, num_classes=classes, class_queries=many, **SMALL | options)
    for p in net.parameters(): torch.nn.init.normal_(p, std=.3)
    return net.eval()


@pytest.mark.parametrize("head, many, anew", [("paper", False, {"1.2.weight", "1.2.bias"}),
                                              ("paper-classes", True, {"1.2.weight", "1.2.bias", "1.0.query"})])
def test_a_file_for_other_classes_gives_body_and_pool(head, many, anew, photos, tmp_path, capsys):
    net, options = whole(7, many), SMALL | dict(class_queries=many)
    torch.save(net.state_dict(), file := tmp_path / f"{head}.pth")
    spec = make_spec(photos, head, arch=TINY, recipe="finetune-21k", start=file, size=24, options=SMALL)
    model, plain = model_of(spec), model_of(replace(spec, start=find_start("", TINY)))
    assert f"its pool goes on in the head {head}, whose classifier begins anew" in capsys.readouterr().err
    places = dict(pool="1.0", norm="1.1", head="1.2")
    new, old = model.state_dict(), {".".join([places.get(first := k.split(".")[0], first), *k.split(".")[1:]]): v
                                    for k, v in net.state_dict().items()}
    assert {k for k in new if k.startswith("1.") and not torch.equal(new[k], old.get(k, new[k][:0]))} == anew
    assert all(torch.equal(new[k], plain.state_dict()[k]) for k in anew)   # as the seed has it
    assert all(torch.equal(v, old[k.removeprefix("0.model.")]) for k, v in new.items() if k.startswith("0."))
    x = torch.randn(2, 3, 24, 24)
    if not many:
        with torch.no_grad(): assert torch.allclose(model.eval()[1][:2](model[0](x)), net.forward_head(net.forward_features(x), pre_logits=True), atol=1e-5)


@pytest.mark.parametrize("head, many", [("paper", False), ("paper-classes", False), ("paper-classes", True)])
def test_fixres_of_published_weights_keeps_the_classifier_in_the_order_of_the_data(head, many, photos, tmp_path, capsys):
    net, names = whole(1000, many), imagenet_names(1000)
    if head == "paper-classes": net.pool.sees_itself = False   # as each of many
    torch.save(net.state_dict(), file := tmp_path / f"thousand-{head}{many}.pth")
    spec = make_spec(photos, head, arch=TINY, recipe="fixres", start=file, size=24, options=SMALL)
    vocab, x = sorted(names), torch.randn(2, 3, 24, 24)
    found = head_of(spec, vocab)(16, 1000).eval()
    assert f"its pool goes on in the head {head}, and its classifier, whose 1,000 classes are the same" in capsys.readouterr().err
    with torch.no_grad(): theirs, ours = net(x), found(net.forward_features(x))
    assert vocab != names and torch.allclose(ours, theirs[:, [names.index(v) for v in vocab]], atol=1e-4) and theirs.std() > .01


@pytest.mark.parametrize("vocab", [["blue", "green", "red"], [f"class {i}" for i in range(1000)], [str(i) for i in range(999)]])
def test_fixres_of_a_file_whose_classes_are_not_known_says_what_to_do(vocab, photos, tmp_path):
    torch.save(whole(1000 if len(vocab) > 3 else 3).state_dict(), file := tmp_path / "some.pth")
    how = dict(arch=TINY, start=file, size=24, options=SMALL)
    with pytest.raises(BadInput, match=f"^start: fixres goes on with a trained classifier, and some.pth has none .* these {len(vocab):,} classes for the head paper. Use --recipe finetune-21k"):
        head_of(make_spec(photos, "paper", recipe="fixres", **how), vocab)
    head_of(make_spec(photos, "paper", recipe="finetune-21k", **how), vocab)
    with pytest.raises(BadInput, match="for the head avg. Use"): head_of(make_spec(photos, "avg", recipe="fixres", **how), vocab)


def test_fixres_of_a_run_s_file_alone_knows_its_classes(trained, photos, others, tmp_path):
    shutil.copy(trained["paper", 1].folder / "weights.safetensors", file := tmp_path / "alone.safetensors")
    how = dict(head="paper", arch=TINY, start=file, size=24, options=SMALL)
    state, learned = model_of(make_spec(photos, recipe="fixres", **how)).state_dict(), load_file(file)
    assert state.keys() == learned.keys() and all(torch.equal(state[k], learned[k]) for k in state)
    with pytest.raises(BadInput, match="^start: fixres goes on with a trained classifier, and alone.safetensors"): model_of(make_spec(others, recipe="fixres", **how))
    state = model_of(make_spec(others, recipe="finetune-21k", **how)).state_dict()
    assert {k for k in state if not torch.equal(state[k], learned[k])} == {"1.2.weight", "1.2.bias"}


def test_where_heads_are_compared_the_pool_in_a_file_does_not_go_on(photos, tmp_path):
    torch.save(whole(7).state_dict(), file := tmp_path / "weights.pth")
    specs = read_specs(str(photos), "paper,avg", "1", "finetune-21k", arch=TINY, start=file, size=24, options="embed_dim=16,depth=2")
    assert [s.start.body_only for s in specs] == [True, False] and specs[1].start == find_start(file, TINY, **SMALL)


def test_fixres_gives_each_class_a_copy_of_the_paper_s_single_query(trained, photos):
    r = trained["paper", 1]
    for spec in (follow_up(r, head="paper-classes", size=24), read_specs(str(photos), "paper-classes", "1", "fixres", start=r.folder.parent, size=24)[0]):
        many, one = model_of(spec), open_run(r.folder, "cpu").model
        new, old = many.state_dict(), one.state_dict()
        assert {k for k in new if not torch.equal(new[k], old[k])} == {"1.0.query"}
        assert torch.equal(new["1.0.query"], old["1.0.query"].expand(3, -1))
    many, one, x = many.double().eval(), one.double().eval(), torch.randn(4, 3, 24, 24, dtype=torch.float64)
    with torch.no_grad():
        m = one[0](x)
        assert torch.allclose(many[1][0].attention_map(m), one[1][0].attention_map(m).expand(-1, 3, -1, -1), atol=1e-12)
        different = (many(x) - one(x)).abs().max()   # the single query is one of the positions that it sees
        one[1][0].sees_itself = False
        assert torch.allclose(many(x), one(x), atol=1e-12) and different > 1e-12


def test_the_authors_single_query_is_copied_for_each_class():
    one, many = whole(3), whole(3, True)
    load_deit(many, one.state_dict())
    assert torch.equal(many.pool.query, one.pool.query.expand(3, -1)) and torch.equal(many.head.weight, one.head.weight)
    one.pool.sees_itself, x = False, torch.randn(2, 3, 24, 24)
    with torch.no_grad(): assert torch.allclose(many.eval()(x), one(x), atol=1e-5)
    with pytest.raises(BadInput, match="pool.query is"): load_deit(one, whole(3, True).state_dict())


def test_a_start_for_other_patches_says_so(tmp_path, photos, trained):
    torch.save(whole(3, patch_size=16).state_dict(), file := tmp_path / "weights.pth")
    with pytest.raises(BadInput, match=f"^start: the weights in .* are for patches of 16 px, and {TINY} has patches of 8: .*--options patch_size=16"):
        make_spec(photos, "paper", arch=TINY, recipe="fixres", start=file, options=SMALL)
    assert make_spec(photos, "paper", arch=TINY, recipe="fixres", start=file, options=SMALL | dict(patch_size=16)).start
    with pytest.raises(BadInput, match="patches of 8 px, and .* has patches of 16"): follow_up(trained["paper", 1], options=dict(patch_size=16))
    torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=3).state_dict(), file := tmp_path / "vit.pth")
    with pytest.raises(BadInput, match="for patches of 16 px, and deit3_small_patch8|not those of"): make_spec(photos, arch="vit_base_patch8_224", start=file)


@pytest.mark.parametrize("arch, size, words", [
    (TINY, 100, "patches of 8x8 pixels, which do not divide 100. Use 96 or 104"), (TINY, 5, "do not divide 5. Use 8"),
    ("patchconvnet_s60", 120, "patches of 16x16 pixels, which do not divide 120. Use 112 or 128"),
    ("patchconvnet_s60.in1k", 230, "Use 224 or 240")])
def test_fixres_at_a_size_that_the_patch_does_not_divide_names_the_nearest_two(arch, size, words):
    for sizes in (dict(size=size), dict(size=96, eval_sizes=(96, size))):
        with pytest.raises(BadInput, match=f"^{[*sizes][-1]}: {arch} .*{words}"): make_spec("no/such/folder", arch=arch, **sizes)
    assert make_spec(arch="xeca_resnext_tiny", size=size).recipe.size == size


@pytest.mark.parametrize("value", [1, 1.5, -.1, "much"])
def test_fixres_with_a_drop_path_that_is_no_share(value, trained):
    with pytest.raises(BadInput, match=r"drop_path: expected a share in \[0, 1\)"): follow_up(trained["paper", 1], drop_path=value)


# ---------------------------------------------------------------- what trains

@pytest.mark.parametrize("head", ["paper", "paper-avg"])
@pytest.mark.parametrize("train", ["head", "all"])
def test_fixres_trains_what_was_asked(head, train, trained, tmp_path):
    r = trained[head, 1]
    spec = follow_up(r, size=24, epochs=1, bs=8, micro_bs=4, lr=1e-2, train=train, drop_path=.9)
    new, old = load_file(run(spec, tmp_path, "cpu").folder / "weights.safetensors"), load_file(r.folder / "weights.safetensors")
    moved = {k.split(".")[0] for k in new if not torch.equal(new[k], old[k])}
    assert moved == ({"1"} if train == "head" else {"0", "1"})
    of_head = {".".join(k.split(".")[:2]) for k in new if k.startswith("1.") and not torch.equal(new[k], old[k])}
    assert of_head == ({"1.0", "1.1", "1.2"} if head == "paper" else {"1.2", "1.3"} if train == "all" else {"1.3"} | of_head)


def test_where_the_head_alone_trains_no_block_is_left_out(trained):
    r = trained["paper", 1]
    spec = follow_up(r, size=24, train="head", drop_path=.9, bs=8, micro_bs=4)
    model = model_of(spec)
    seen = {}
    class Look(Callback):
        order = 100
        def before_batch(self):
            with torch.no_grad(): seen[self.training] = [torch.equal(*(self.model[0](self.x) for _ in range(2))), self.model[1][0].training]
    task = TASKS["classify"]
    learner_for(task.dls(spec, 4, "cpu"), model, spec.recipe, task.loss(spec.recipe), [], [Look()]).fit(1)
    assert seen == {True: [True, True], False: [True, False]}
    model.train()
    x = torch.randn(8, 3, 24, 24)
    with torch.no_grad(): assert not torch.equal(model[0](x), model[0](x))
