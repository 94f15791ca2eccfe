"The GPU kernels without a GPU: their numbers in Triton's interpreter, which needs a process of its own, and their machine code from Triton's compiler."
import os
import re
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from attnpool import chunks, forms
from attnpool.fold import gather, gather_plain
from attnpool.forms import form, forms_used
from attnpool.functional import attention_pool, attention_pool_plain
from attnpool.heads import HEADS

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
runs = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="runs within test_in_the_interpreter")
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
EPS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_in_the_interpreter():
    run = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", __file__],
                         env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0 and int(re.search(r"(\d+) passed", run.stdout)[1]) > 60, run.stdout[-4000:] + run.stderr[-1000:]


@pytest.fixture
def calls(monkeypatch):
    "Which kernels were called, in order."
    from attnpool import kernels
    forms._kernels_on(torch.empty(0, device=DEVICE).device)   # with its number; checked once, here
    monkeypatch.setattr(chunks, "SMALL", 0)
    calls = []
    for name in ("pool_forward", "pool_backward"):
        f = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, f=f, name=name, **kw: (calls.append(name), f(*a, **kw))[1])
    return calls


def layout(x, last): return x.to(memory_format=torch.channels_last if last else torch.contiguous_format)


def core(x, u, centre, eps, mean):
    "In float64, by autograd."
    return [o for o in gather_plain(x, u, centre=centre, eps=eps, mean=mean) if o is not None]


def agree(a, b, tol):
    assert a.shape == b.shape and a.isfinite().all()
    assert (a.double() - b).abs().max() <= tol * b.abs().max().clamp(min=1)


@runs
@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("b, c, h, w, k, centre, eps, mean, offset", [
    (3, 48, 5, 10, 3, True, 1e-5, True, 0.), (2, 17, 7, 7, 1, True, 1e-5, False, 100.), (3, 33, 7, 1, 2, False, 1e-6, True, 0.), (2, 64, 14, 14, 1, False, None, True, 3.),
    (1, 40, 2, 4, 8, True, 1e-3, False, 0.), (5, 24, 1, 1, 2, True, 1e-5, True, 0.), (1, 7, 20, 20, 1, True, 1e-5, True, 0.), (2, 32, 7, 7, 1, True, 0., False, 0.)])
def test_the_numbers_of_the_core(calls, dtype, last, b, c, h, w, k, centre, eps, mean, offset):
    x = layout(torch.randn(b, c, h, w) + offset, last).to(DEVICE, dtype).requires_grad_()
    u = (torch.randn(k, c) / c**.5).to(DEVICE).requires_grad_()
    xs, us = x.detach().double().requires_grad_(), u.detach().double().requires_grad_()
    exact = core(xs.flatten(2), us, centre, eps, mean)
    ours = [o for o in gather(x.flatten(2), u, centre=centre, eps=eps, mean=mean) if o is not None]
    assert calls == ["pool_forward"] and all(o.dtype == torch.float32 for o in ours)
    for a, e in zip(ours, exact): agree(a, e, 2e-6 * (1 + offset))
    gs = [torch.randn_like(o) for o in ours]
    gx, gu = torch.autograd.grad(ours, (x, u), gs)
    assert calls == ["pool_forward", "pool_backward"]
    assert gx.dtype == dtype and (b == 1 or min(h, w) == 1 or gx.stride() == x.stride())   # strides of one number mean nothing
    egx, egu = torch.autograd.grad(exact, (xs, us), [g.double() for g in gs])
    agree(gx, egx, EPS[dtype] * (1 + offset / 30))
    agree(gu, egu, 1e-5 * (1 + offset))


@runs
@pytest.mark.parametrize("positions", [8, 16, 64])
def test_any_cut_of_the_positions_and_channels(calls, monkeypatch, positions):
    from attnpool import kernels
    monkeypatch.setattr(kernels, "_POSITIONS", positions)
    plan = kernels._plan
    monkeypatch.setattr(kernels, "_plan", lambda x: (*(p := plan(x))[:2], p[2] | dict(BC=16, EVEN=False)))
    x, u = torch.randn(2, 50, 9, 9, device=DEVICE, requires_grad=True), torch.randn(2, 50, device=DEVICE, requires_grad=True)
    exact = core(x.double().flatten(2), u.double(), True, 1e-5, True)
    z, _, mean = gather(x.flatten(2), u, centre=True, eps=1e-5, mean=True)
    for a, e in zip((z, mean), exact): agree(a, e, 1e-5)
    for a, e in zip(torch.autograd.grad(z.square().sum(), (x, u)), torch.autograd.grad(exact[0].square().sum(), (x, u))): agree(a, e, 1e-5)


@runs
@pytest.mark.parametrize("x", [torch.full((2, 32, 5, 5), 1e4), torch.zeros(2, 32, 5, 5), 1e4 * torch.randn(2, 32, 5, 5), torch.full((2, 32, 5, 5), 3.)], ids=["large", "zero", "spread", "constant"])
def test_fp16_of_any_size_stays_finite(calls, x):
    x = x.to(DEVICE, torch.float16).requires_grad_()
    u = torch.randn(1, 32, device=DEVICE, requires_grad=True)
    z, *_ = gather(x.flatten(2), u, centre=True, eps=1e-5)
    assert all(g.isfinite().all() for g in (z, *torch.autograd.grad(z.sum(), (x, u)))) and calls == ["pool_forward", "pool_backward"]


@runs
@pytest.mark.parametrize("head", [h for h in HEADS if hasattr(HEADS[h](8, 2)[0], "attn")])
def test_heads_run_through_the_kernels(calls, head):
    torch.manual_seed(0)
    model = HEADS[head](32, 5).to(DEVICE).eval()
    for p in model.parameters(): p.data += .1 * torch.randn_like(p)
    x = torch.randn(2, 32, 6, 6, device=DEVICE, requires_grad=True)
    leaves = (x, *model.parameters())
    out = model(x)
    grads = torch.autograd.grad(out.square().sum(), leaves)
    assert calls == ["pool_forward", "pool_backward"]
    x64 = x.detach().double().requires_grad_()
    exact = model.double()(x64)
    agree(out, exact, 1e-5)
    for g, e in zip(grads, torch.autograd.grad(exact.square().sum(), (x64, *model.parameters()))): agree(g, e, 1e-4)
    assert len(calls) == 2   # not in float64


@runs
def test_results_may_be_changed_in_place(calls):
    x, u = torch.randn(2, 12, 3, 3, device=DEVICE, requires_grad=True), torch.randn(1, 12, device=DEVICE)
    for centre in (True, False):
        z, _, mean = gather(x.flatten(2), u, centre=centre, eps=1e-5, mean=True)
        torch.autograd.grad(z.sum() + mean.relu_().sum(), x)


@runs
def test_the_default_dtype_is_not_theirs(calls):
    x, u = torch.randn(2, 12, 3, 3, device=DEVICE), torch.randn(1, 12, device=DEVICE)
    expected = gather(x.flatten(2), u, centre=True, eps=1e-5)[0]
    torch.set_default_dtype(torch.bfloat16)
    try:
        forms._kernels_on.cache_clear()
        out = gather(x.flatten(2), u, centre=True, eps=1e-5)[0]
    finally: torch.set_default_dtype(torch.float32)
    assert out.dtype == torch.float32 and torch.equal(out, expected) and forms._kernels_on(x.device)


@runs
def test_forward_mode(calls):
    x, u, dx = torch.randn(2, 12, 3, 3, device=DEVICE), torch.randn(1, 12, device=DEVICE), torch.randn(2, 12, 3, 3, device=DEVICE)
    with torch.autograd.forward_ad.dual_level():
        out = gather(torch.autograd.forward_ad.make_dual(x, dx).flatten(2), u, centre=True, eps=1e-5)[0]
        tangent = torch.autograd.forward_ad.unpack_dual(out).tangent
    exact = torch.func.jvp(lambda x: gather_plain(x.flatten(2), u.double(), centre=True, eps=1e-5)[0], (x.double(),), (dx.double(),))[1]
    agree(tangent, exact, 1e-4)


@runs
def test_second_derivatives(calls):
    x, u = torch.randn(2, 12, 3, 3, device=DEVICE, requires_grad=True), torch.randn(1, 12, device=DEVICE, requires_grad=True)
    def curvature(x, u, f):
        g, = torch.autograd.grad(f(x.flatten(2), u, centre=True, eps=1e-5)[0].square().sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), (x, u))
    for a, e in zip(curvature(x, u, gather), curvature(x.double(), u.double(), gather_plain)): agree(a, e.double(), 1e-4)
    assert calls[0] == "pool_forward"


@runs
def test_it_saves_the_map_and_little_else(calls):
    x, saved = torch.randn(2, 64, 6, 6, device=DEVICE, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        gather(x.flatten(2), torch.randn(1, 64, device=DEVICE, requires_grad=True), centre=True, eps=1e-5)
    assert sum(t.numel() for t in saved if t.data_ptr() != x.data_ptr()) == 64 + 2 * (3 * 36 + 64)


def layer(c=16, dtype=torch.float32):
    norm = nn.LayerNorm(c).to(DEVICE, dtype)
    return dict(query=torch.randn(1, c).to(DEVICE, dtype), norm=norm) | {k: (torch.randn(c, c).to(DEVICE, dtype) / 4, torch.randn(c).to(DEVICE, dtype)) for k in ("q", "k", "v", "proj")}


@runs
@pytest.mark.parametrize("change", [dict(dropout_p=.5), dict(num_heads=16), dict(dtype=torch.float64), dict(side=130)], ids=str)
def test_what_they_do_not_handle_is_left_to_pytorch(calls, change):
    dtype, side = change.pop("dtype", torch.float32), change.pop("side", 4)
    assert attention_pool(torch.randn(2, 16, side, side).to(DEVICE, dtype), **layer(dtype=dtype), **change).isfinite().all() and not calls


@runs
def test_compiled_models_read_the_plain_operations(calls):
    args, x = layer(), torch.randn(2, 16, 4, 4, device=DEVICE)
    out = torch.compile(lambda x: attention_pool(x, **args), backend="eager", fullgraph=True)(x)
    agree(out, attention_pool_plain(x.double(), **{k: [t.double() for t in v] if isinstance(v, tuple) else v.double() for k, v in args.items()}), 1e-4)
    assert not calls


@runs
@pytest.mark.parametrize("broken, words", [
    (lambda *a: 1 / 0, "they cannot be built: ZeroDivisionError: division by zero"),
    (lambda x, u, *a: (torch.zeros(len(x), len(u), 12, device=x.device), None, None, torch.ones(len(x), 1, 55, device=x.device), torch.ones(len(x), len(u), 55, device=x.device)), r"a result is off by \d")])
def test_kernels_that_do_not_work_here_are_left_out_with_a_warning(calls, monkeypatch, broken, words):
    from attnpool import kernels
    args, x = layer(), torch.randn(2, 16, 4, 4, device=DEVICE)
    expected = attention_pool(x, **args)
    monkeypatch.setattr(kernels, "pool_forward", broken)
    forms._kernels_on.cache_clear()
    try:
        with pytest.warns(kernels.KernelWarning, match=words): out = attention_pool(x, **args)
    finally: forms._kernels_on.cache_clear()
    agree(out, expected.double(), 1e-5)
    assert calls.count("pool_forward") == 1   # the first call only


@runs
def test_forms(calls):
    args, x, outs = layer(), torch.randn(2, 16, 4, 4, device=DEVICE), []
    for name in (None, "folded", "plain"):
        with form(name) if name else nullcontext(), forms_used() as used: outs.append(attention_pool(x, **args))
        assert used == {name or "kernels"} and calls == ["pool_forward"]
    for out in outs[1:]: agree(out, outs[0].double(), 1e-5)


@runs
def test_switched_off(calls, monkeypatch):
    monkeypatch.setenv("ATTNPOOL_KERNELS", "0")
    forms._kernels_on.cache_clear()
    try: attention_pool(torch.randn(2, 16, 4, 4, device=DEVICE), **layer())
    finally: forms._kernels_on.cache_clear()
    assert not calls


def test_without_triton_nothing_changes():
    code = ("import sys; sys.modules['triton'] = None; import torch; from attnpool import chunks, forms; forms.INTERPRETED, chunks.SMALL = True, 0\n"
            "from attnpool.heads import LearnedAggregationHead; print(forms._kernels_on(torch.device('cpu')), LearnedAggregationHead(16, 3)(torch.randn(2, 16, 4, 4)).shape[1])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == ["None", "3"]


@pytest.mark.skipif(INTERPRETED or sys.platform != "linux", reason="needs Triton's compiler")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("last", [False, True])
def test_they_compile_for_nvidia_gpus(tmp_path, monkeypatch, capability, last):
    "As for bf16 maps of (1024, 14, 14): machine code, with loads of several numbers at once."
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from attnpool import kernels
    common = dict(ALIGN=1 if last else 4, FIRST=not last, EVEN=True, BC=128, BN=32, K=1, CENTRE=True, NORM=True, MEAN=True, **{"stride_c" if last else "stride_n": 1})
    for kernel, extra in ((kernels._pool, dict(WHOLE=False)), (kernels._pool_backward, dict(NEED_X=True)), (kernels._join, None)):
        constants = common | extra if extra else dict(P=8, BC=1024, BN=1024, K=1, MEAN=True)
        names = kernel.arg_names
        kinds = {n: "constexpr" if n in constants else "*bf16" if n in ("x_ptr", "gx_ptr") else "*fp32" if n.endswith("_ptr") else "fp32" if n == "eps" else "i32" for n in names}
        multiples = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n.endswith("_ptr") or n == "c" or (last and n in ("stride_b", "stride_n"))}
        built = triton.compile(ASTSource(kernel, kinds, {(names.index(n),): v for n, v in constants.items()}, multiples), target=GPUTarget("cuda", capability, 32), options=dict(num_warps=8))
        assert len(built.asm["cubin"]) > 1000 and ("ld.global.v4" if last or extra is None else "ld.global.v2") in built.asm["ptx"]
