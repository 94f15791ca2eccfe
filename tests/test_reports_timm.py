"One network of every family of timm, as body of a head; networks that are built for one size."
import copy

import pytest
import timm
import torch
from fastai.data.core import DataLoaders
from timm.models import _registry
from torch import nn

from attnpool.data.digits import digits_dls
from attnpool.models.surgery import body_of, build_network, map_width, swap_pool, TimmMap, with_head
from attnpool.models.body import picture_size, timm_net
from attnpool.recipe import scratch_network
from attnpool.registry import BadInput

FAMILIES = {}
for _name in timm.list_models(): FAMILIES.setdefault(_registry._model_to_module[_name], []).append(_name)
SMALL = "test", "nano", "atto", "pico", "femto", "tiny", "xxs", "small", "18", "_t", "_s", "_m0", "0"
# what they end on is no map that could be told: lists, tokens without a grid, class tokens alone
WITHOUT_A_MAP = {"coat", "crossvit", "efficientformer", "efficientvim", "gemma4_vit", "hiera", "levit", "mlp_mixer", "mvitv2", "naflexvit",
                 "pit", "tnt", "twins", "vision_transformer_hybrid", "vitamin", "volo"}


def smallest(family): return min(FAMILIES[family], key=lambda n: (not any(word in n for word in SMALL), len(n), n))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_works_or_is_refused_in_words(family):
    arch = smallest(family)
    with torch.device("meta"):   # shapes alone: no numbers, no memory
        try: network = build_network(arch, 3, "slim")
        except BadInput as e:
            assert family in WITHOUT_A_MAP and str(e).startswith("arch: ") and "instead of a map (b, c, h, w)" in str(e)
            return
        n_in, *size = network.model[0].model.default_cfg["input_size"]
        assert network.model.eval()(torch.zeros(2, n_in, *size)).shape == (2, 3)
