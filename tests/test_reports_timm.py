"One network of every family of timm, as body of a head; networks that are built for one size."
import copy

import pytest

import timm
import torch
from timm.models import _registry

from attnpool.data.digits import digits_dls
from attnpool.heads import HEADS
from attnpool.learner import vision_learner
from attnpool.models.body import for_pictures, map_width, timm_net, TimmMap
from attnpool.models.surgery import body_of, build_network, restore_pool, swap_pool, with_head
from attnpool.recipe import recipe_learner
from attnpool.registry import BadInput

FAMILIES = {}
for _name in timm.list_models(): FAMILIES.setdefault(_registry._model_to_module[_name], []).append(_name)
SMALL = "test", "nano", "atto", "pico", "femto", "tiny", "xxs", "small", "18", "_t", "_s", "_m0", "0"
# what they end on is no map that could be told: lists, tokens without a grid, class tokens alone
WITHOUT_A_MAP = {"coat", "crossvit", "efficientformer", "efficientvim", "gemma4_vit", "hiera", "levit", "mlp_mixer", "mvitv2", "naflexvit",
                 "pit", "tnt", "twins", "vision_transformer_hybrid", "vitamin", "volo"}


def smallest(family): return min(FAMILIES[family], key=lambda n: (not any(word in n for word in SMALL), len(n), n))


@pytest.mark.parametrize("family", [pytest.param(f, marks=pytest.mark.slow) if f == "sequencer" else f for f in sorted(FAMILIES)])
def test_every_family_works_or_is_refused_in_words(family):
    arch = smallest(family)
    with torch.device("meta"):   # shapes alone: no numbers, no memory
        try: network = build_network(arch, 3, "slim")   # sends a picture through the body
        except BadInput as e:
            assert family in WITHOUT_A_MAP and str(e).startswith("arch: ") and "instead of a map (b, c, h, w)" in str(e)
            return
        assert network.model[-1].eval()(torch.zeros(2, network.model[-1][0].c_out, 3, 2)).shape == (2, 3)


@pytest.mark.parametrize("arch, options, size", [
    ("test_vit", {}, (160, 160)), ("test_vit", dict(img_size=64), (64, 64)), ("test_vit", dict(img_size=(48, 96)), (48, 96)),
    ("test_vit", dict(dynamic_img_size=True), (96, 64)), ("test_vit", dict(dynamic_img_size=True, dynamic_img_pad=True), (100, 64)),
    ("xcit_nano_12_p16_224", dict(depth=2), (64, 64)), ("xcit_nano_12_p16_224", dict(depth=2), (100, 70)),
    ("deit_tiny_distilled_patch16_224", dict(depth=1), (224, 224)), ("eva02_tiny_patch14_224", dict(depth=1, img_size=56), (56, 56)),
    ("cait_xxs24_224", dict(depth=1, img_size=64), (64, 64)), ("beit_base_patch16_224", dict(depth=1, embed_dim=48, num_heads=3, img_size=64), (64, 64)),
    ("swin_tiny_patch4_window7_224", dict(depths=(1, 1), img_size=56), (56, 56)), ("convnext_atto", dict(depths=(1, 1, 1, 1)), (96, 64))])
def test_the_map_is_that_of_timm(arch, options, size):
    torch.manual_seed(3)
    body = body_of(arch, **options).model.eval()
    x = torch.randn(2, 3, *size)
    last = body.model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)[-1]   # timm's own way to maps
    with torch.no_grad(): found = body(x)
    torch.testing.assert_close(found, last.detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("build", [
    lambda dls: recipe_learner(dls, "vit_tiny_patch16_224", "slim", epochs=1),
    lambda dls: recipe_learner(dls, "vit_tiny_patch16_224", "slim", epochs=1, drop_path=.1),
    lambda dls: vision_learner(dls, "vit_tiny_patch16_224", pretrained=False, custom_head=HEADS["slim"]),
])
def test_a_network_for_one_size_gets_that_of_the_pictures(build):
    dls = digits_dls(size=48, bs=8, n_train=16, n_valid=8)
    state = torch.get_rng_state()
    assert for_pictures("vit_tiny_patch16_224", dls, {}) == dict(img_size=(48, 48)) and torch.equal(torch.get_rng_state(), state)
    learn = build(dls)
    assert learn.model[0].model.default_cfg["input_size"] == (3, 48, 48)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    assert learn.model[-1][0].attention_map(learn.model[0](dls.one_batch()[0])).shape == (8, 1, 3, 3)
    with pytest.raises(BadInput, match="x: VisionTransformer is built for pictures of 48x48 px and fails on 64x64"):
        learn.model(torch.randn(2, 3, 64, 64))


def test_pretrained_weights_are_resampled(tmp_path):
    "From a file, as they would come from the hub."
    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "weights.pt")
    net = timm_net("test_vit", pretrained=True, img_size=96, pretrained_cfg_overlay=dict(file=str(tmp_path / "weights.pt"), num_classes=1000))
    torch.manual_seed(0)
    whole = timm.create_model("test_vit")
    assert net.pos_embed.shape[1] == 1 + 6 * 6 and torch.equal(net.blocks[0].attn.qkv.weight, whole.blocks[0].attn.qkv.weight)
    assert map_width(TimmMap(net)) == 64


@pytest.mark.parametrize("call, words", [
    (lambda: with_head("coat_tiny"), "arch: CoaT ends on a list instead of a map (b, c, h, w)"),
    (lambda: with_head("twins_svt_small"), "arch: Twins ends on (1, 49, 512) instead of a map"),
    (lambda: build_network("swin_tiny_patch4_window7_224", 3, "slim").model(torch.randn(1, 3, 64, 64)), "is built for pictures of 224x224 px and fails on 64x64"),
    (lambda: build_network("halonet_h1", 3, "slim").model(torch.randn(1, 3, 36, 36)), "is built for pictures of 256x256 px and fails on 36x36")])
def test_refusals(call, words):
    with torch.device("meta"), pytest.raises(BadInput) as e: call()
    assert words in str(e.value)


def test_an_error_of_another_kind_stays_what_it_is():
    body = body_of("resnet10t").model
    with pytest.raises(RuntimeError, match="channels"): body(torch.randn(2, 1, 64, 64))


def test_networks_without_a_pool_to_leave_out_and_other_channels():
    for arch, options in (("efficientvit_b0", dict(in_chans=1)), ("inception_next_atto", {}), ("xcit_nano_12_p16_224", dict(depth=1))):
        channels = options.get("in_chans", 3)
        assert with_head(arch, "avgstart", 5, **options)(torch.randn(2, channels, 64, 64)).shape == (2, 5)


def test_fastais_own_head_on_a_network_for_one_size():
    learn = vision_learner(digits_dls(size=48, bs=8, n_train=16, n_valid=8), "vit_tiny_patch16_224", pretrained=False)
    assert learn.model(torch.randn(2, 3, 48, 48)).shape == (2, 10)


def test_a_size_that_cannot_be_built():
    with pytest.raises(BadInput, match=r"img_size: nest_tiny cannot be built for pictures of \(96, 128\) px"): timm_net("nest_tiny", img_size=(96, 128))
    with pytest.raises(BadInput, match="fails on a picture of 12x12 px"): body_of("test_vit", img_size=12).ni


def test_a_pool_is_taken_out_only_where_the_classifier_can_be_cut():
    net, x = timm.create_model("resnet10t", num_classes=3).eval(), torch.randn(2, 3, 64, 64)
    before = swap_pool(net, "concat")(x)
    handle = net.fc.register_forward_hook(lambda *a: None)
    with pytest.raises(BadInput, match="model: its classifier 'fc' has a hook"): restore_pool(net)
    assert torch.equal(net(x), before)
    handle.remove()
    assert restore_pool(net).fc.in_features == 512


class Child(timm.models.vision_transformer.VisionTransformer):
    "One of somebody's own, that goes by its parent's methods."
    def forward_features(self, x): return super().forward_features(x)
    def forward_head(self, x, pre_logits=False): return super().forward_head(self.norm(x), pre_logits)


def test_what_a_parents_method_needs_stays(monkeypatch):
    monkeypatch.setitem(_registry._model_entrypoints, "child_vit", child_vit)
    net = timm_net("child_vit")
    assert isinstance(net.norm, torch.nn.LayerNorm) and net.forward_features(torch.randn(1, 3, 32, 32)).shape == (1, 5, 16)


def child_vit(num_classes=0, **_): return Child(img_size=32, patch_size=16, embed_dim=16, depth=1, num_heads=1, num_classes=num_classes)


def test_a_file_of_the_whole_network_loads_into_a_body_and_a_new_classifier_has_its_own(tmp_path):
    options = dict(embed_dim=16, depth=1)
    whole = timm.create_model("patchconvnet_s20", **options)
    torch.save(whole.state_dict(), tmp_path / "w.pth")
    body = with_head("patchconvnet_s20", "slim", 4, checkpoint_path=str(tmp_path / "w.pth"), **options)[0].model
    assert torch.equal(body.stem[0].weight, whole.stem[0].weight)
    body.reset_classifier(3, "avg")
    other = copy.deepcopy(body)
    other.reset_classifier(3, "avg")
    other.load_state_dict(body.state_dict())
    assert torch.equal(other.head.weight, body.head.weight) and torch.equal(other.norm.weight, body.norm.weight)
