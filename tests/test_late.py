"Queries that learn late: in Learners with every optimizer, in runs that are stopped, by the command."
import pytest
import torch
from fastai.vision.all import Callback, CrossEntropyLossFlat, Learner, set_seed
from torch import nn

from attnpool.callback.queries import LateQueries, queries_of
from attnpool.choices import OPTIMIZERS
from attnpool.cli import main
from attnpool.data.digits import digits_dls
from attnpool.heads import HEADS, get_head
from attnpool.models.surgery import swap_pool
from attnpool.models.xresnet import xeca_resnext_tiny
from attnpool.recipe import get_recipe, recipe_learner
from attnpool.registry import BadInput
from attnpool.runs.spec import make_spec
from attnpool.runs.store import load_run
from attnpool.runs.train import run

SMALL = dict(head="avgstart", epochs=2, size=20, bs=16, lr=4e-3)


class Keep(Callback):
    "Copies of a network's weights, after each epoch."
    def before_fit(self): self.kept = []
    def after_epoch(self): self.kept.append({k: v.clone() for k, v in self.model.state_dict().items()})


def trained(head="avgstart", epochs=4, n_train=64, **overrides):
    set_seed(1)
    keep, dls = Keep(), digits_dls(20, 16, "cpu", n_train=n_train, n_valid=16)
    learn = recipe_learner(dls, "xeca_resnext_tiny", head, "quick", cbs=keep, **dict(epochs=epochs, lr=4e-3) | overrides)
    with learn.no_bar(), learn.no_logging(): learn.fit_recipe()
    return keep.kept


def moved(weights, name="7.0.query"): return weights[name].abs().max().item()


def test_before_its_time_a_late_training_is_the_one_whose_queries_stay():
    late, uniform = trained(late=.25), trained("avgstart-uniform")
    for a, b in zip(late[:3], uniform[:3]):
        assert moved(a) == 0
        assert all(torch.equal(v, b[k]) for k, v in a.items() if "query" not in k)
    assert moved(late[3]) > 1e-3


def test_before_its_time_it_is_average_pooling_up_to_rounding():
    late, average = trained(late=.25, n_train=32), trained("avg", n_train=32)
    def close(a, b): return (a - b).norm() / b.norm()
    for a, b in zip(late[:1], average[:1]):
        weights = [k for k in a if k.endswith("conv.weight") or k.endswith("0.0.weight")]
        assert weights and all(close(a[k], b[k]) < 1e-3 for k in weights)


@pytest.mark.parametrize("opt", [*OPTIMIZERS])
def test_with_every_optimizer_nothing_moves_the_queries_before_their_time(opt):
    kept = trained(opt=opt, late=.5, epochs=2, wd=.1, n_train=32)
    assert moved(kept[0]) == 0 and moved(kept[1]) > 0


@pytest.mark.parametrize("head", [*HEADS])
def test_of_every_head_that_has_a_query_it_is_found(head):
    model = nn.Sequential(nn.Identity(), get_head(head)(32, 10))
    has = any(k.endswith(".query") for k in model.state_dict())
    assert bool(queries_of(model)) == has


def test_a_swapped_pool_learns_late_too():
    model = swap_pool(nn.Sequential(nn.Conv2d(3, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)))
    learn = Learner(digits_dls(20, 16, "cpu", n_train=32, n_valid=16), model, CrossEntropyLossFlat(), lr=.1,
                    cbs=[LateQueries(.5), keep := Keep()])
    with learn.no_bar(), learn.no_logging(): learn.fit(2)
    name, = queries_of(model)
    assert moved(keep.kept[0], name) == 0 and moved(keep.kept[1], name) > 0


def test_a_run_that_is_stopped_goes_on_to_the_same_weights(tmp_path):
    spec = make_spec("digits", recipe="quick", arch="xeca_resnext_tiny", late=.25, **SMALL)
    def stop(row): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): run(spec, tmp_path / "stopped", "cpu", stop, checkpoint_seconds=0)
    for out in ("whole", "stopped"): run(spec, tmp_path / out, "cpu")
    one, two = ((tmp_path / out / spec.name / "weights.safetensors").read_bytes() for out in ("whole", "stopped"))
    assert one == two


def test_the_command_takes_it_and_the_result_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = "bench digits --arch xeca_resnext_tiny --heads avg,avgstart --seeds 1 --epochs 2 --size 20 --lr 1e-3"
    with pytest.raises(SystemExit) as end: main([*words.split(), "--late", ".5"])
    assert not end.value.code
    results = [load_run(f.parent) for f in (tmp_path / "runs").glob("*/result.json")]
    assert {r.spec.head for r in results} == {"avg", "avgstart"}
    assert all(r.spec.recipe.late == .5 for r in results)
    assert make_spec("digits", **SMALL).id == make_spec("digits", late=0., **SMALL).id


@pytest.mark.parametrize("settings, words", [
    (dict(late=1.), "late: expected a share in"), (dict(late=-.1), "late: expected a share in"),
    (dict(late="end"), "late: expected a share in"),
    (dict(recipe="finetune", late=.1), "late: train finetune is two trainings")])
def test_what_cannot_be_meant_is_told(settings, words):
    with pytest.raises(BadInput, match=words): get_recipe(**dict(recipe="quick", head="avg") | settings)


@pytest.mark.parametrize("late", [0, 1, -.1])
def test_the_callback_tells_as_well(late):
    with pytest.raises(BadInput, match="late: expected a share between 0 and 1"): LateQueries(late)


@pytest.mark.parametrize("task, words", [("segment", "UPerNet has no queries"), ("detect", "Mask R-CNN has no queries")])
def test_where_a_task_has_no_queries_it_is_told(task, words):
    with pytest.raises(BadInput, match=f"late: {words}"): make_spec("scenes", task=task, arch="xeca_resnext_tiny", late=.1)
