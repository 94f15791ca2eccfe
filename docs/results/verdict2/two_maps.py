"""A body that ends on two maps: its last one and the one before, averaged to the same sides, each normed over its
channels at every position, side by side. For a head that attends to both:

    attnpool bench digits-4 --arch two_maps:net --heads avg,avgstart      # in this file's folder
"""
import torch
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d

from attnpool.models.pyramid import build_pyramid
from attnpool.models.surgery import body_of


class TwoMaps(nn.Module):
    "Pictures `(b, 3, H, W)` to `(b, 128 + 256, H / 8, W / 8)`."
    def __init__(self, arch):
        super().__init__()
        self.maps, levels = build_pyramid(body_of(arch).model, 'stages', levels=(4, 8))
        self.norms = nn.ModuleList(nn.LayerNorm(m.channels) for m in levels.maps)

    def forward(self, x):
        maps = self.maps(x)
        side = maps[-1].shape[-2:]
        normed = [norm(adaptive_avg_pool2d(m, side).movedim(1, -1)) for norm, m in zip(self.norms, maps)]
        return torch.cat(normed, -1).movedim(-1, 1)


def net(pretrained=False): return TwoMaps('xeca_resnext_tiny')
