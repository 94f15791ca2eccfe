"""Candidates of the screen that did not earn their place in the package: ways to leave the average more slowly, more
quickly, or not all the way. As a head of one's own, in this file's folder:

    attnpool bench digits-4 --heads avgstart,candidates:Candidate --options gate=.5

`gate=.5`, `learn_temperature=True`, `temperature=10` (queries at a tenth of the rate), `temperature=.1` (at ten times
the rate), `drop=.25` and its control `drop=.25,drop_random=True`; and `candidates:ep_zero`, Efficient Probing whose
queries start at zero. They ran as `avgstart-gate`, `-temperature`, `-slow`, `-fast`, `-drop`, `-droprandom` and `ep-zero`.
"""
import torch
from torch import Tensor, nn

from attnpool.classifiers import PoolHead
from attnpool.fold import gather_own, mixture, scores
from attnpool.forms import no_autocast, note_form, wide
from attnpool.functional import check_map
from attnpool.layers import check_rate
from attnpool.pooling import AvgStartAttnPooling2d
from attnpool.pooling.peers import PEERS
from attnpool.registry import BadInput

EPS = 1e-5   # added to the variance, as in `nn.LayerNorm`


def most(scores, part, at_random):
    "For half of the pictures the positions with the highest scores, or as many at random: `part` of them, as a mask."
    n, rank = scores.shape[-1], torch.rand_like(scores)
    if not at_random: rank = scores.detach() + 1e-6 * rank   # all are equal at the start: none before the others
    which = torch.zeros_like(rank).scatter_(-1, rank.topk(int(part * n), -1).indices, 1.)
    return which.bool() & (torch.rand(len(rank), 1, 1, device=rank.device) < .5)


class CandidatePooling2d(AvgStartAttnPooling2d):
    "`avgstart` with options. A gate starts beside queries that are zero: at the average, whatever the gate is."
    def __init__(self,
        ni: int, # Channels of the map, and of the result
        n_queries: int = 8, # As for `avgstart`
        mix: float = 0., # As for `avgstart`
        gate: float | None = None, # Share in (0, 1) of uniform weights as it starts, learned by query; None for no gate
        temperature: float = 1., # Divides the scores; 1/10 is a rate of the queries ten times as high, with Adam
        learn_temperature: bool = False, # One for each query, which starts at `temperature`
        drop: float = 0., # Share in [0, 1) of the positions, the most attended, hidden in training in half the pictures
        drop_random: bool = False, # Hides positions at random instead: the control
    ):
        super().__init__(ni, n_queries, mix)
        if gate is not None and not 0 < gate < 1:
            raise BadInput(f"gate: expected a share between 0 and 1, got {gate}. Use .5, or leave it out for no gate.")
        if not temperature > 0: raise BadInput(f"temperature: expected a number above 0, got {temperature}. Use 1.")
        self.temperature, self.drop, self.drop_random = temperature, check_rate('drop', drop), drop_random
        self.gate = self.sharpness = None
        if gate is not None: self.gate = nn.Parameter(torch.full((n_queries, 1), gate).logit())
        if learn_temperature: self.sharpness = nn.Parameter(torch.zeros(n_queries, 1))   # log of a factor

    def queries(self) -> Tensor:
        "The queries `(n_queries, ni)` as they ask: with their temperature."
        u = self.query / self.temperature
        return u if self.sharpness is None else u * self.sharpness.exp()

    def of_the_rest(self, m, *shares):
        "What the queries pool where `most` hides positions; all weights are among the others. By plain operations."
        note_form('plain')
        with no_autocast(m):
            s = scores(m, self.queries().to(m.dtype), centre=True, eps=EPS).scores
            hidden = most(s, self.drop, self.drop_random)
            a, even = (t.masked_fill(hidden, -torch.inf).softmax(-1) for t in (s, torch.zeros_like(s)))
            for share in shares: a = a + share * (even - a)
            return (m.unflatten(1, (len(self.query), -1)) * a[:, :, None]).sum(-1).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        "`(b, ni, h, w)` to `(b, ni)`."
        check_map(x, self.ni)
        m, share, dtype = x.flatten(2), self.mix or None, wide(x.dtype)
        if self.mix and self.training: share = (torch.rand(len(x), 1, 1, device=x.device) < self.mix).to(dtype)
        gate = None if self.gate is None else self.gate.to(dtype).sigmoid()
        if self.drop and self.training:
            return self.of_the_rest(m.to(dtype), *(s for s in (share, gate) if s is not None)).to(x.dtype)
        out = gather_own(m, self.queries(), share=share, eps=EPS)
        if gate is None: return out.to(x.dtype)
        gate = gate.expand(-1, self.ni // len(self.query)).flatten()   # for each channel
        return torch.lerp(out.to(dtype), m.mean(-1, dtype=dtype), gate).to(x.dtype)

    def attention_map(self, x: Tensor, combined: bool = False) -> Tensor:
        "As that of `avgstart`, in eval mode, the uniform shares of `mix` and `gate` included."
        check_map(x, self.ni)
        dtype = wide(x.dtype)
        with no_autocast(x): s = scores(x.flatten(2).to(dtype), self.queries().to(dtype), centre=True, eps=EPS).scores
        weights = mixture(s.softmax(-1), self.mix or None)
        if self.gate is not None: weights = mixture(weights, self.gate.to(dtype).sigmoid())
        weights = weights.unflatten(-1, x.shape[2:])
        return weights.mean(1, keepdim=True) if combined else weights


class Candidate(PoolHead):
    "`CandidatePooling2d`, linear."
    pool, start = CandidatePooling2d, 'xresnet'


def ep_zero(ni, n_out):
    "Efficient Probing whose queries start at zero, and so with uniform weights."
    head = PEERS['ep'](ni, n_out)
    nn.init.zeros_(head[0].layer.query)
    return head
