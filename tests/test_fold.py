"Heads folded for inference, and what they export to."
import copy
from functools import partial

import pytest
import torch
from torch import nn

from attnpool.heads import AvgAttnConcatPoolHead, AvgPoolHead, fold, FoldedAttention, HEADS, LearnedAggregationHead
from attnpool.layers import TokenBatchNorm
from attnpool.pooling.attention import AttentionPool2d
from attnpool.registry import BadInput

ATTENTION = [name for name in HEADS if name != "avg"]
PROJECTED = [name for name in ATTENTION if hasattr(HEADS[name](16, 2)[0], "attn")]   # the others own `u` itself


def trained(head, seed=0):
    "A head whose weights are not those that it starts with."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in head.modules():
            if isinstance(m, TokenBatchNorm): m.running_mean.normal_(generator=g), m.running_var.uniform_(.5, 2, generator=g)
        for p in head.parameters(): p += torch.randn(p.shape, generator=g) * (.3 if p.ndim == 1 else 1 / p.shape[-1]**.5)
    return head.eval()


def relative(a, b): return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm, TokenBatchNorm])
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("name", PROJECTED)
def test_folded_equals_original(name, heads, norm):
    head = trained(HEADS[name](32, 5, num_heads=heads, norm=norm))
    folded = fold(head)
    for shape in ((3, 32, 7, 7), (1, 32, 1, 1), (2, 32, 5, 9)):
        for fmt in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(shape).to(memory_format=fmt)
            exact = copy.deepcopy(head).double()(x.double())
            assert relative(folded(x), exact) <= max(1e-6, 3 * relative(head(x), exact)) and folded(x).dtype == torch.float32
            assert (folded[0].attention_map(x) - head[0].attention_map(x)).abs().max() <= 1e-6


def test_the_original_stays_and_the_copy_has_no_gradients():
    head = trained(LearnedAggregationHead(16, 3))
    before = copy.deepcopy(head.state_dict())
    folded = fold(head)
    assert all(torch.equal(v, before[k]) for k, v in head.state_dict().items()) and all(p.requires_grad for p in head.parameters())
    assert not any(p.requires_grad for p in folded.parameters()) and isinstance(head[0].attn, AttentionPool2d)
    assert isinstance(folded[0].attn, FoldedAttention)
    assert sum(t.numel() for t in folded.state_dict().values()) < sum(t.numel() for t in before.values()) - 2 * 16 * 16
    with pytest.raises(BadInput, match="mode: a folded model has nothing left to train"): folded.train()


def test_inside_a_network_and_saved(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 16, 3), trained(AvgAttnConcatPoolHead(16, 4))).eval()
    folded, x = fold(model), torch.randn(2, 3, 9, 8)
    assert relative(folded(x), model(x)) <= 1e-6
    torch.save(folded.state_dict(), tmp_path / "folded.pth")
    again = fold(nn.Sequential(nn.Conv2d(3, 16, 3), AvgAttnConcatPoolHead(16, 4)).eval())
    again.load_state_dict(torch.load(tmp_path / "folded.pth"))
    assert torch.equal(again(x), folded(x))


@pytest.mark.parametrize("dtype, tol", [(torch.bfloat16, .03), (torch.float16, .004), (torch.float64, 1e-12)])
def test_other_dtypes(dtype, tol):
    head = trained(AvgAttnConcatPoolHead(32, 5)).to(dtype)
    x = torch.randn(4, 32, 5, 5).to(dtype)
    assert fold(head)(x).dtype == dtype and relative(fold(head)(x).double(), copy.deepcopy(head).double()(x.double())) <= tol


def test_autocast():
    head, x = trained(AvgAttnConcatPoolHead(32, 5)), torch.randn(4, 32, 5, 5)
    folded, exact = fold(head), head(x)
    with torch.autocast("cpu", torch.bfloat16):
        for inp in (x, x.bfloat16()): assert relative(folded(inp).float(), exact) <= .03


def sizes(): return ({i: torch.export.Dim(name) for i, name in {0: "batch", 2: "height", 3: "width"}.items()},)


@pytest.mark.parametrize("folding", [False, True])
@pytest.mark.parametrize("name", list(HEADS))
def test_export_at_any_size(name, folding):
    head = trained(HEADS[name](16, 3))
    model = fold(head) if folding and name in ATTENTION else head
    program = torch.export.export(model, (torch.randn(2, 16, 4, 5),), dynamic_shapes=sizes()).module()
    for shape in ((1, 16, 7, 7), (5, 16, 2, 9), (2, 16, 50, 50)):   # the last is one that is read in chunks
        x = torch.randn(shape)
        assert relative(program(x), head(x)) <= 2e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["learned", "concat"])
def test_export_to_onnx_runs_elsewhere(name, tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    ort = pytest.importorskip("onnxruntime")
    head, file = trained(HEADS[name](16, 3)), tmp_path / "head.onnx"
    torch.onnx.export(fold(head), (torch.randn(2, 16, 4, 5),), file, input_names=["map"], output_names=["logits"], dynamic_shapes=sizes(), dynamo=True, verbose=False)
    session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
    for shape in ((1, 16, 7, 7), (5, 16, 2, 9)):
        x = torch.randn(shape)
        logits, = session.run(None, {"map": x.numpy()})
        assert relative(torch.from_numpy(logits), head(x).detach()) <= 1e-5


def test_a_pool_of_somebody_elses_that_owns_its_query_passes():
    class Pool(nn.Module):
        def __init__(self):
            super().__init__()
            self.query = nn.Parameter(torch.randn(1, 8))
        def attention_map(self, x): return torch.einsum("kc,bchw->bkhw", self.query, x).flatten(2).softmax(-1).unflatten(2, x.shape[2:])
        def forward(self, x): return (x * self.attention_map(x)).sum((2, 3))
    pool, x = Pool().eval(), torch.randn(2, 8, 3, 4)
    assert torch.equal(fold(pool)(x), pool(x).detach())


def hooked(head):
    head[0].attn.k.register_forward_hook(lambda layer, given, found: 2 * found)
    return head


@pytest.mark.parametrize("model, error, words", [
    (lambda: LearnedAggregationHead(8, 2), BadInput, "model: it is in training mode"),
    (lambda: LearnedAggregationHead(8, 2, norm=lambda ni: nn.GroupNorm(1, ni)).eval(), BadInput, "0.attn is a GroupNorm that cannot be folded"),
    (lambda: LearnedAggregationHead(8, 2, norm=partial(TokenBatchNorm, track_running_stats=False)).eval(), BadInput, "a TokenBatchNorm that cannot be folded"),
    (lambda: AvgPoolHead(8, 2).eval(), BadInput, "no attention pool in it"),
    (lambda: hooked(LearnedAggregationHead(8, 2)).eval(), BadInput, "0.attn.k is a Linear with a hook or a forward of its own"),
    (lambda: torch.randn(2), TypeError, "model: expected an nn.Module, got Tensor"),
])
def test_bad_input(model, error, words):
    with pytest.raises(error) as e: fold(model())
    assert words in str(e.value)
