"""Attention on views of keys and values, the path of GPUs, proved on a CPU."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import vmap
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from openvclip.towers import attention, attention_cuda, attention_kernels
from openvclip.towers.attention import attend_with_copies, temporal_attention
from openvclip.towers.attention_cuda import InnerFrames, OneFrame, parts_of
from openvclip.towers.attention_kernels import KERNELS, choose_kernel, kernel_for
from openvclip.towers.view import FrameView
from tests.benchmarks import attention_kernels as attention_benchmark
from tests.towers.emulated_kernels import use_emulated_kernel
from tests.towers.test_temporal_reference import equation_3

BOUNDARIES = ("zero", "mask", "replicate")


def packed(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Queries, keys and values ``[B, T, N, 3, heads, d]`` in one tensor, as a tower makes them."""
    generator = torch.Generator().manual_seed(seed)
    b, t, n, heads, d = shape
    return torch.randn(b, t, n, 3, heads, d, generator=generator, dtype=torch.float64).to(dtype)


def results(function: Any, qkv: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """The output of a function, and the gradient of ``qkv`` for a fixed gradient of the output."""
    return packed_results(lambda x: function(*x.unbind(-3), *args, **options), qkv)


def packed_results(function: Any, qkv: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """:func:`results` of a function that takes queries, keys and values in one tensor."""
    qkv = qkv.clone().requires_grad_()
    out = function(qkv, *args)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).sin().to(out.dtype)
    (out * weight.view_as(out)).sum().backward()
    assert qkv.grad is not None
    return out.detach(), qkv.grad


# --- the arithmetic ----------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
@settings(deadline=None, max_examples=40)
@given(
    shape=st.tuples(
        st.integers(1, 5), st.integers(1, 9), st.sampled_from([1, 2, 5, 33]), st.integers(1, 2)
    ),
    view=st.builds(FrameView, st.integers(1, 3), st.sampled_from(BOUNDARIES)),
    scale=st.sampled_from([None, 0.3, 1.0]),
    layout=st.sampled_from(["packed", "apart", "tokens first", "not aligned"]),
    seed=st.integers(0, 99),
)
def test_equals_attention_on_copies(
    kernel: str,
    shape: tuple[int, ...],
    view: FrameView,
    scale: float | None,
    layout: str,
    seed: int,
) -> None:
    qkv = packed((*shape, 8), torch.float64, seed)

    def on_views(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (_laid_out(x, layout) for x in (q, k, v))
        return temporal_attention(q, k, v, view, scale=scale)

    expected = results(attend_with_copies, qkv, view, scale=scale)
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_emulated_kernel(monkeypatch, kernel)
        got = results(on_views, qkv)
    for x, y in zip(got, expected, strict=True):  # log-sum-exps are float32
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def _laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "apart":
        return x.contiguous()
    if layout == "tokens first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "not aligned":
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    return x


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize(("clips", "frames"), [(1, 7), (3, 2)])
def test_equals_the_loops_over_equation_3(
    monkeypatch: pytest.MonkeyPatch, kernel: str, boundary: Any, clips: int, frames: int
) -> None:
    def loops(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = [
            torch.stack(
                [equation_3(*(x[b, :, :, h] for x in (q, k, v)), 2, boundary) for h in range(2)],
                dim=2,
            )
            for b in range(clips)
        ]
        return torch.stack(heads).flatten(-2)

    qkv = packed((clips, frames, 3, 2, 8), torch.float64)
    expected = results(loops, qkv)
    use_emulated_kernel(monkeypatch, kernel)
    got = results(temporal_attention, qkv, FrameView(2, boundary))
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("clips", [1, 8])
@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_exact_as_with_copies(
    monkeypatch: pytest.MonkeyPatch, kernel: str, clips: int, boundary: Any, dtype: torch.dtype
) -> None:
    view = FrameView(1, boundary)
    qkv = packed((clips, 6, 5, 2, 16), dtype)
    exact = results(attend_with_copies, qkv.double(), view)
    copies = results(attend_with_copies, qkv, view)
    use_emulated_kernel(monkeypatch, kernel)
    got = results(temporal_attention, qkv, view)
    for x, y, z in zip(got, copies, exact, strict=True):
        assert x.dtype == dtype
        error, allowed = ((e.double() - z).square().mean().sqrt() for e in (x, y))
        assert error < 1.5 * allowed + torch.finfo(dtype).eps / 8


def test_scores_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """A zero key has the score 0, which can be far above or below the scores of the frames."""
    view = FrameView(1)
    for shift in (-300.0, 300.0):
        qkv = packed((2, 3, 4, 1, 8), torch.float64)
        qkv[:, :, :, 0, :, 0], qkv[:, :, :, 1, :, 0] = 1.0, shift * math.sqrt(8)
        expected = results(attend_with_copies, qkv, view)
        with pytest.MonkeyPatch.context() as patch:
            use_emulated_kernel(patch, "efficient")
            got = results(temporal_attention, qkv, view)
        for x, y in zip(got, expected, strict=True):  # log-sum-exps near 300 are float32
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3)


# --- calls and memory --------------------------------------------------------------------------


@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.builds(FrameView, st.integers(1, 4), st.sampled_from(BOUNDARIES)),
)
def test_parts_hold_each_frame_once(clips: int, frames: int, view: FrameView) -> None:
    counts = torch.zeros(clips, frames, 1, 1, 1)
    parts = parts_of(clips, frames, view)
    for part in parts:
        part.queries(counts).add_(1)
    assert (counts == 1).all()
    # Few clips of many frames have fewer calls than frames.
    assert len(parts) == min(frames, clips + 2 * view.window)
    assert {type(part) for part in parts} <= {OneFrame, InnerFrames}


class Kernels(TorchDispatchMode):
    """Counts the operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on a GPU without memory, as far as this version of PyTorch has them."""
    try:
        with FakeTensorMode():
            torch.empty(2, device="cuda").copy_(torch.empty(2, device="cuda"))
    except RuntimeError:
        pytest.skip("this version of PyTorch needs a GPU even for tensors without memory")
    monkeypatch.setattr(attention_kernels, "_abilities", lambda index: (90, True, True))


# Numbers of clips, frames, tokens, heads, and the width of a head.
SIZES = {
    "ViT-B/16": (32, 8, 197, 12, 64),
    "ViT-L/14, one long video": (1, 32, 257, 16, 64),
    "SigLIP at 384": (4, 8, 729, 16, 72),
    "SigLIP of 576 tokens": (2, 8, 576, 12, 64),
}
HALF, FULL = (torch.bfloat16, "flash"), (torch.float32, "efficient")


@pytest.mark.usefixtures("h100")
@pytest.mark.parametrize(
    ("model", "boundary", "precision"),
    [
        *((model, "zero", HALF) for model in SIZES),
        ("ViT-B/16", "mask", HALF),
        ("ViT-B/16", "replicate", HALF),
        ("ViT-B/16", "zero", FULL),
        ("SigLIP of 576 tokens", "replicate", FULL),
    ],
)
def test_the_real_operations_take_the_calls(model: str, boundary: Any, precision: Any) -> None:
    """PyTorch's own rules for the shapes and layouts of its operations, without a GPU."""
    (clips, frames, n, heads, d), (dtype, kernel) = SIZES[model], precision
    view = FrameView(1, boundary)
    calls = min(frames, clips + 2)
    with FakeTensorMode(), torch.no_grad():
        qkv = torch.empty(clips, frames, n, 3, heads, d, dtype=dtype, device="cuda")
        q, k, v = qkv.unbind(-3)
        assert kernel_for(q, k, v) == kernel
        with Kernels() as kernels:
            y = temporal_attention(q, k, v, view)
        assert (y.shape, y.dtype) == ((clips, frames, n, heads * d), dtype)
        assert y.is_contiguous()
        assert kernels.counts[f"_{kernel}_attention_forward"] == calls
        # Only the ends of a clip are copied, and only if they are repeated.
        assert kernels.counts.get("cat", 0) == (4 if boundary == "replicate" else 0)
        assert "clone" not in kernels.counts
        out, log_sums = attention_cuda._forward(q, k, v, view, None, KERNELS[kernel])
        grad = torch.empty_like(out)
        with Kernels() as kernels:
            saved = q, k, v, out, log_sums
            grads = attention_cuda._backward(grad, *saved, view, None, KERNELS[kernel])
        assert [x.shape for x in grads] == [q.shape] * 3
        assert all(x.is_contiguous() and x.dtype == dtype for x in grads)
        assert kernels.counts[f"_{kernel}_attention_backward"] == calls


def kept_elements(function: Any, qkv: Tensor) -> int:
    """Number of elements of the storages that a function keeps for its backward pass."""
    storages: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes() // x.element_size()
        return x

    qkv = qkv.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        function(*qkv.unbind(-3), FrameView(1))
        return sum(storages.values())


def test_memory_kept_for_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    qkv = packed((8, 8, 5, 2, 16), torch.bfloat16)
    one = qkv.numel() // 3  # elements of the queries, which are as many as those of the output
    log_sums = one // 16
    # Queries, keys, values and the output; copies of keys and values for each of 3 frames.
    assert kept_elements(attend_with_copies, qkv) == (3 + 1) * one + 3 * 2 * one + log_sums
    use_emulated_kernel(monkeypatch, "flash")
    assert kept_elements(temporal_attention, qkv) == (3 + 1) * one + log_sums


# --- the choice of the kernel ------------------------------------------------------------------

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("capability", [70, 75, 80, 90, 120])
def test_choice_by_dtype_and_device(dtype: torch.dtype, capability: int) -> None:
    def choice(head_dim: int, flash: bool = True, efficient: bool = True) -> str | None:
        return choose_kernel(
            dtype=dtype,
            head_dim=head_dim,
            capability=capability,
            flash=flash,
            efficient=efficient,
        )

    half = dtype in (torch.float16, torch.bfloat16)
    flash = half and capability >= 80
    efficient = dtype in (torch.float16, torch.float32) or flash
    for head_dim in (32, 64, 72, 80, 88, 104, 128, 192):
        assert choice(head_dim) == ("flash" if flash else "efficient" if efficient else None)
        assert choice(head_dim, flash=False) == ("efficient" if efficient else None)
        assert choice(head_dim, efficient=False) == ("flash" if flash else None)
        assert choice(head_dim, flash=False, efficient=False) is None
    assert choice(0) is choice(63) is choice(256) is None
    # 36 float32 numbers are 9 times 16 bytes; 36 half-precision numbers are 4.5 times 16 bytes.
    assert choice(36) == ("efficient" if dtype == torch.float32 else None)


@pytest.mark.usefixtures("h100")
def test_inputs_that_are_copied() -> None:
    with FakeTensorMode():
        x = torch.empty(2, 3, 5, 2, 64, dtype=torch.float16, device="cuda")
        assert kernel_for(x, x, x) == "flash"
        assert kernel_for(x, x, x.float()) is None
        assert kernel_for(*[x.double()] * 3) is None
        assert kernel_for(*[x[:0]] * 3) is None
        assert kernel_for(*[torch.empty(2, 3, 5, 2, 64, dtype=torch.float16)] * 3) is None
        names: list[str | None] = []
        vmap(lambda clip: (names.append(kernel_for(clip, clip, clip)), clip)[1])(x[None])
    assert names == [None]


def test_kernels_that_the_user_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    both = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    with FakeTensorMode():
        x = torch.empty(2, 3, 5, 2, 64, dtype=torch.float16, device="cuda")
        for allowed, expected in (
            (both, "flash"),
            (both[:1], "flash"),
            (both[1:], "efficient"),
            ([SDPBackend.MATH], None),
            ([SDPBackend.CUDNN_ATTENTION], None),
        ):
            with sdpa_kernel(allowed):
                assert kernel_for(x, x, x) == expected
        monkeypatch.setattr(torch.version, "hip", "6.0")
        assert kernel_for(x, x, x) is None


# pytorch#196678: with a mask, cuDNN's attention can return NaN gradients on H100 and H200 if the
# number of keys is 64 modulo 128. 576 tokens, of SigLIP at 384, are such a number.
@pytest.mark.usefixtures("h100")
@pytest.mark.parametrize("n", [197, 576])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dropout_p", "with_copies"), [(0.0, False), (0.1, False), (0.0, True)])
def test_mask_never_reaches_cudnn(
    monkeypatch: pytest.MonkeyPatch, n: int, dtype: torch.dtype, dropout_p: float, with_copies: bool
) -> None:
    abilities = (90, not with_copies, not with_copies)
    monkeypatch.setattr(attention_kernels, "_abilities", lambda index: abilities)
    called = []
    original = torch.nn.functional.scaled_dot_product_attention

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        assert kwargs.get("attn_mask") is None
        called.append(torch.backends.cuda.cudnn_sdp_enabled())
        return original(*args, **{**kwargs, "dropout_p": 0.0})

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    with FakeTensorMode(), torch.no_grad():
        x = torch.empty(2, 4, n, 2, 64, dtype=dtype, device="cuda")
        with Kernels() as kernels:
            temporal_attention(x, x, x, FrameView(1, "mask"), dropout_p=dropout_p)
    assert not any("cudnn" in name for name in kernels.counts)
    assert before is torch.backends.cuda.cudnn_sdp_enabled() is True
    copied = with_copies or dropout_p > 0 or dtype == torch.float64
    assert called == [False] * (3 if copied else 0)


# --- in a training loop ------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_second_derivative_is_refused(monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    use_emulated_kernel(monkeypatch, kernel)
    qkv = packed((1, 4, 2, 1, 8), torch.float64).requires_grad_()
    out = temporal_attention(*qkv.unbind(-3), FrameView(1))
    (grad,) = torch.autograd.grad(out.square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_activation_checkpointing(monkeypatch: pytest.MonkeyPatch, boundary: Any) -> None:
    use_emulated_kernel(monkeypatch, "flash")
    view, qkv = FrameView(1, boundary), packed((1, 5, 3, 2, 8), torch.float64)

    def checkpointed(*qkv: Tensor) -> Any:
        return checkpoint(temporal_attention, *qkv, view, use_reentrant=False)

    expected, got = results(temporal_attention, qkv, view), results(checkpointed, qkv)
    for x, y in zip(got, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.usefixtures("h100")
def test_autocast_gives_its_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """Normalised queries and keys are float32, values are in the dtype of autocast."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.bfloat16)
    with FakeTensorMode(), torch.no_grad():
        q, k = (torch.empty(2, 4, 5, 2, 64, device="cuda") for _ in range(2))
        with Kernels() as kernels:
            y = temporal_attention(q, k, q.bfloat16(), FrameView(1))
    assert y.dtype == torch.bfloat16
    assert kernels.counts["_flash_attention_forward"] == 4


@pytest.mark.usefixtures("h100")
def test_autocast_leaves_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """As autocast does at scaled_dot_product_attention: see the same call on a CPU."""
    x = torch.ones(1, 1, 2, 8, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert functional.scaled_dot_product_attention(x, x, x).dtype == torch.float64
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.bfloat16)
    with FakeTensorMode(), torch.no_grad():
        q = torch.empty(2, 4, 5, 2, 64, device="cuda", dtype=torch.float64)
        assert temporal_attention(q, q, q, FrameView(1)).dtype == torch.float64


# --- torch.compile -----------------------------------------------------------------------------


def test_compiled_graphs_take_every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    use_emulated_kernel(monkeypatch, "flash")
    monkeypatch.setattr(attention, "kernel_for", kernel_for)
    for module in (attention, attention_kernels):
        monkeypatch.setattr(module, "is_on_gpu", lambda x: True)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    torch._dynamo.reset()
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def function(qkv: Tensor, view: FrameView) -> Tensor:
        return temporal_attention(*qkv.unbind(-3), view)

    compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=True)
    # Sizes that differ from all others: torch.compile treats equal sizes as one size.
    counts = []
    for clips, frames in ((4, 6), (5, 11), (6, 7)):
        view, qkv = FrameView(1, "zero"), packed((clips, frames, 9, 2, 8), torch.bfloat16)
        expected = results(temporal_attention, qkv, view)
        for x, y in zip(packed_results(compiled, qkv, view), expected, strict=True):
            torch.testing.assert_close(x, y)
        counts.append(len(graphs))
    assert counts == [counts[0]] * 3
    names = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert sum("openvclip.temporal_attention" in name for name in names) == 1
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # of the check itself
def test_the_compiled_operations_keep_their_promises(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own check of custom operations: schema, shapes of results, and autograd."""
    use_emulated_kernel(monkeypatch, "efficient")
    leaves = [
        x.detach().requires_grad_() for x in packed((2, 5, 3, 2, 8), torch.float32).unbind(-3)
    ]
    arguments = (*leaves, 1, "replicate", None, "efficient")
    torch.library.opcheck(torch.ops.openvclip.temporal_attention.default, arguments)


def test_the_benchmark_of_the_kernels_runs() -> None:
    rows = attention_benchmark.measure((1, 3, 2, 1, 8), "cpu", torch.float32, rounds=1)
    assert list(rows) == ["plain", "copies", "views, cpu"]
    assert {tuple(row) for row in rows.values()} == {("forward", "forward + backward")}
    q, k, v = packed((2, 3, 2, 2, 8), torch.float64).unbind(-3)
    ways = attention_benchmark.candidates("cpu", torch.float64, FrameView(1))
    torch.testing.assert_close(ways["views, cpu"](q, k, v).flatten(-2), ways["copies"](q, k, v))
