"Networks as body and head; and swap_pool, which leaves the outputs of trained classifiers as they are and can be undone."
import copy
import subprocess
import sys

import pytest
import timm
import torch
import torchvision
from torch import nn

from attnpool.heads import AvgPoolHead, fold, HEADS, LearnedAggregationHead
from attnpool.maps.compute import attention_maps
from attnpool.models.surgery import body_of, build_network, restore_pool, swap_pool, SwappedPool
from attnpool.pooling.peers import PEERS

FITTING = [n for n in HEADS if n not in ("avg", "classquery")]


def trained(model, seed=0):
    "Weights and running statistics away from their start, without files from elsewhere."
    g = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.copy_(torch.randn(m.running_mean.shape, generator=g) * .1)
            m.weight.data.copy_(torch.rand(m.weight.shape, generator=g) + .5)
        if isinstance(m, nn.Linear) and m.bias is not None: m.bias.data.normal_(generator=g)
    return model.eval()


def timm_net(name): return trained(timm.create_model(name, num_classes=7))


NETS = {name: (lambda name=name: timm_net(name), size) for name, size in
        (("resnet18", 96), ("convnext_atto", 96), ("efficientnet_b0", 96), ("mobilenetv3_small_050", 96), ("swin_tiny_patch4_window7_224", 224))}
NETS |= {f"torchvision {name}": (lambda name=name: trained(getattr(torchvision.models, name)(num_classes=7)), 96)
         for name in ("resnet18", "mobilenet_v3_small", "efficientnet_b0", "convnext_tiny")}


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("head", ["avgstart", "slim"])
@torch.no_grad()
def test_outputs_of_many_networks_stay(net, head):
    build, size = NETS[net]
    model, x = build(), torch.randn(2, 3, size, size)
    before, maps = model(x), 8 if head == "avgstart" else 1
    assert swap_pool(model, head) is model
    assert (model(x) - before).abs().max() <= 1e-5 * max(1, before.abs().max())
    assert attention_maps(model, x).shape[:2] == (2, maps)
    swapped, = (m for m in model.modules() if isinstance(m, SwappedPool))
    if swapped.gamma is not None: swapped.gamma.fill_(1)
    else: nn.init.normal_(swapped.pool.query)
    assert not torch.equal(model(x), before)   # the pool is in the path
    assert torch.equal(restore_pool(model)(x), before)


@pytest.mark.parametrize("head", FITTING)
@pytest.mark.parametrize("build", [lambda: timm_net("resnet18"), lambda: trained(torchvision.models.resnet18(num_classes=7))])
def test_every_pool_starts_at_the_mean_and_trains(head, build):
    torch.manual_seed(2)
    model, x = build(), torch.randn(4, 3, 64, 80)
    weight, before = model.fc.weight.detach().clone(), model(x).detach()
    swap_pool(model, head)
    assert (model(x) - before).abs().max() <= 1e-5
    pool, swapped = next((n, m) for n, m in model.named_modules() if isinstance(m, SwappedPool))
    mean = slice(512 * (swapped.at or 0), 512 * (swapped.at or 0) + 512)
    assert torch.equal(model.fc.weight[:, mean], weight) and model.fc.weight.count_nonzero() == weight.count_nonzero()
    query = next(n for n, _ in swapped.pool.named_parameters() if n.endswith("query"))
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
    old = {n: p.detach().clone() for n, p in model.named_parameters()}
    for _ in range(2):   # gamma moves first, what stands behind it then
        opt.zero_grad()
        nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 2, 3])).backward()
        opt.step()
    assert not torch.equal(swapped.pool.get_parameter(query), old[f"{pool}.pool.{query}"])
    learned = model.fc.weight.detach().clone()
    restored = restore_pool(model)
    assert torch.equal(restored.fc.weight, learned[:, mean]) and restored.fc.weight.shape == (7, 512)
    assert restored(x).shape == (4, 7)


def test_swapped_networks_are_saved_folded_and_keep_dtype(tmp_path):
    model, x = swap_pool(timm_net("resnet18").double(), "concat"), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    torch.save(model.state_dict(), tmp_path / "m.pt")
    other = swap_pool(timm_net("resnet18").double(), "concat")
    other.load_state_dict(torch.load(tmp_path / "m.pt"))
    assert torch.equal(other(x), model(x))
    torch.testing.assert_close(fold(model)(x), model(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))


@pytest.mark.parametrize("head", ["avgstart", "slim"])
def test_in_fastais_own_head_the_average_alone_is_replaced(head):
    from fastai.vision.learner import create_head
    torch.manual_seed(3)
    x = torch.randn(4, 3, 20, 20)
    for theirs in (create_head(32, 5), PEERS["fastai"](32, 5)):
        model = trained(nn.Sequential(nn.Conv2d(3, 32, 3, 2), theirs))
        before, pooled = model(x), model[1][0](model[0](x)).flatten(1)
        swap_pool(model, head)
        assert (model(x) - before).abs().max() <= 1e-5 * before.abs().max()
        swapped, = (m for m in model.modules() if isinstance(m, SwappedPool))
        if head == "avgstart": nn.init.normal_(swapped.pool.query)
        else: nn.init.ones_(swapped.gamma)
        now = model[1][0](model[0](x)).flatten(1)
        assert torch.equal(now[:, :32], pooled[:, :32]) and (now[:, 32:] - pooled[:, 32:]).abs().max() > .01
        assert torch.equal(restore_pool(model)(x), before)


def test_random_queries_do_not_change_the_outputs_either():
    net, x = timm_net("resnet18").eval(), torch.randn(2, 3, 64, 64)
    before = net(x)
    assert (swap_pool(net, "avgstart-frozen").eval()(x) - before).abs().max() <= 1e-5


def test_options_and_callables():
    model = swap_pool(timm_net("resnet18"), "avgstart", n_queries=4, mix=.5)
    assert len(model.global_pool.pool.query) == 4 and model.global_pool.pool.mix == .5
    model = swap_pool(timm_net("resnet18"), LearnedAggregationHead, ffn_expand=1)
    assert model.global_pool.pool.ffn[0].out_features == 512
    ours = swap_pool(nn.Sequential(nn.Conv2d(3, 16, 3), AvgPoolHead(16, 4)), "concat")
    assert ours[1][2].in_features == 32 and ours(torch.randn(2, 3, 8, 8)).shape == (2, 4)


def test_in_a_pretrained_learner(tmp_path):
    pytest.importorskip("fastai")
    from attnpool.data.digits import digits_dls
    from attnpool.learner import vision_learner
    from attnpool.models.xresnet import xeca_resnext_tiny
    def arch(pretrained): return xeca_resnext_tiny(10)
    learn = vision_learner(digits_dls(n_train=64, n_valid=32), arch, pretrained=True, custom_head=AvgPoolHead)
    x = torch.randn(2, 3, 40, 40)
    before = learn.model.eval()(x)
    swap_pool(learn.model, "avgstart")
    assert (learn.model(x) - before).abs().max() <= 1e-5
    learn.opt = None
    learn.path = tmp_path
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2)
    assert attention_maps(learn.model, x).shape[:2] == (2, 8)


# Any network as body and head

@pytest.mark.parametrize("arch, ni, groups", [("resnet18", 512, 2), ("patchconvnet_s20", 384, 3), ("xeca_resnext_tiny", 256, 2),
                                              (torchvision.models.resnet18, 512, 3), (torchvision.models.squeezenet1_0, 512, 3)])
def test_build_network(arch, ni, groups):
    torch.manual_seed(4)
    network = build_network(arch, 7, "slim")
    *_, head = network.model
    assert type(head) is HEADS["slim"] and network.stats is None
    assert network.model.eval()(torch.randn(2, 3, 64, 64)).shape == (2, 7)
    parts = network.splitter(network.model)
    assert len(parts) == groups and sum(map(len, parts)) == len(list(network.model.parameters()))
    assert {id(p) for p in head.parameters()} <= {id(p) for p in parts[-1]}
    body = body_of(arch)
    assert body.ni == ni and body.model.eval()(torch.randn(1, 3, 64, 64)).shape[:2] == (1, ni)
    ready = AvgPoolHead(ni, 7)
    assert build_network(arch, 7, ready).model[-1] is ready


def test_our_networks_by_name_are_what_their_function_builds():
    from attnpool.models.xresnet import xeca_resnext_tiny
    torch.manual_seed(4)
    expected = xeca_resnext_tiny(7, custom_head=HEADS["avg"], stoch_depth=.1).state_dict()
    torch.manual_seed(4)
    network = build_network("xeca_resnext_tiny", 7, "avg", stoch_depth=.1)
    assert network.arch is xeca_resnext_tiny and network.model.state_dict().keys() == expected.keys()
    assert all(torch.equal(v, expected[k]) for k, v in network.model.state_dict().items())


def test_other_channels_and_cuts():
    assert body_of("resnet18", n_in=5).model(torch.randn(1, 5, 64, 64)).shape[1] == 512
    assert body_of(torchvision.models.resnet18, n_in=1, cut=-3).ni == 256
    assert build_network("xeca_resnext_tiny", 3, "avg", n_in=1).model(torch.randn(2, 1, 40, 40)).shape == (2, 3)


def test_importing_surgery_loads_no_fastai():
    code = "import sys, attnpool.models.surgery; print(*[m for m in ('fastai', 'fastxtend') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


@pytest.mark.parametrize("make, error, words", [
    (lambda: build_network("resnet18", 3, "slimm"), ValueError, "head: 'slimm' is unknown. Did you mean 'slim'"),
    (lambda: build_network("resnet18", 3, 3), TypeError, "head: expected a name"),
    (lambda: build_network("resnet18", 0, "slim"), ValueError, "n_out: expected at least 1 output"),
    (lambda: build_network("xeca_resnext_tiny", 3, "slim", pretrained=True), ValueError, "pretrained: there are no pretrained weights"),
    (lambda: body_of("resnet18", cut=-2), ValueError, "cut: a timm network is used whole"),
    (lambda: body_of("resnet_18"), ValueError, "arch: 'resnet_18' is unknown. Did you mean 'resnet18'"),
    (lambda: body_of(torchvision.models.shufflenet_v2_x0_5), ValueError, "of its 56 convolutions"),
    (lambda: swap_pool(swap_pool(timm_net("resnet18"))), ValueError, "model: its pool 'global_pool' is swapped already. Use restore_pool"),
    (lambda: swap_pool(build_network("resnet18", 3, "maxstart").model), ValueError, "model: its pool 1.0.pools.1 (AvgStartAttnPooling2d) has attention already. swap_pool is for"),
    (lambda: swap_pool(timm_net("resnet18"), "max+slim"), ValueError, "head: 'max+slim' has no attention pool that gives a vector of 512 channels: its SideBySide gives 1024"),
    (lambda: swap_pool(timm_net("convnext_atto"), "max+avgstart"), ValueError, "head: the max+avgstart pool gives 640 channels"),
    (lambda: restore_pool(timm_net("resnet18")), ValueError, "model: no pool in it is swapped"),
    (lambda: swap_pool(timm.create_model("deit_tiny_patch16_224")), ValueError, "model: the average pooling of this VisionTransformer cannot be found"),
    (lambda: swap_pool(torchvision.models.densenet121()), ValueError, "cannot be found"),   # it calls a function
    (lambda: swap_pool(timm.create_model("resnet18", global_pool="max")), ValueError, "cannot be found"),
    (lambda: swap_pool(nn.Sequential(timm_net("efficientnet_b0").blocks, nn.Linear(3, 3))), ValueError, "cannot be found"),
    (lambda: swap_pool(timm_net("resnet18"), "avgstrat"), ValueError, "Did you mean 'avgstart'"),
    (lambda: swap_pool(timm_net("resnet18"), "classquery"), ValueError, "head: 'classquery' has no attention pool that gives a vector of 512"),
    (lambda: swap_pool(timm_net("resnet18"), "avg"), ValueError, "head: 'avg' has no attention pool"),
    (lambda: swap_pool(timm_net("convnext_atto"), "concat"), ValueError, "head: the concat pool gives 640 channels"),
    (lambda: swap_pool(nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1))), ValueError, "ni: the layer after the pool"),
    (lambda: swap_pool(timm_net("resnet18"), 3), TypeError, "head: expected a name"),
    (lambda: swap_pool("resnet18"), TypeError, "model: expected an nn.Module, got str"),
    (lambda: swap_pool(timm_net("resnet18"), n_queries=7), ValueError, "n_queries: 7 does not divide the 512 channels"),
])
def test_bad_input(make, error, words):
    with pytest.raises(error) as e: make()
    assert words in str(e.value)
