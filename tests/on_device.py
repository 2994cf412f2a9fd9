"""The core tests on another device: ``pytest -m core -n 4 --torch-device cuda``.

The core tests are written once. Without ``--torch-device``, they run on the CPU. With this option,
the tensors and the models that a core test makes are on the device, although the test names no
device: a torch function mode moves what the test makes. What the library makes stays where the
library puts it, so a tensor that the library leaves on the CPU raises an error, as it would in a
user's program.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

TESTS = Path(__file__).resolve().parent
_LIBRARY = str(TESTS.parent / "openvclip") + "/"
_TESTS = str(TESTS) + "/"

CORE: dict[str, tuple[str, ...]] = {
    "golden": (
        "towers/test_temporal_reference.py",
        "prompting/test_released.py",
    ),
    "towers": (
        "towers/test_temporal_model.py",
        "towers/test_temporal_variants.py",
        "towers/test_temporal_training.py",
        "towers/test_temporal_hf.py",
        "towers/test_temporal_timm.py",
        "towers/test_temporal_hf_more.py",
        "towers/test_temporal_timm_drops.py",
        "towers/test_temporal_naflex.py",
        "towers/test_entrances.py",
        "prompting/test_vision.py",
        "prompting/test_text.py",
        "prompting/test_variants.py",
        "prompting/test_together.py",
    ),
    "weights": (
        "weights/test_interpolation.py",
        "weights/test_averaging.py",
        "weights/test_ema.py",
        "weights/test_lawa.py",
        "weights/test_gaussian.py",
        "weights/test_tracker.py",
        "weights/test_moves.py",
        "weights/test_l2.py",
        "weights/test_buffers.py",
        "weights/test_overwriting.py",
        "weights/test_small_dtypes.py",
        "weights/test_statistics.py",
        "weights/test_regularization.py",
        "weights/test_regularization_gradients.py",
        "weights/test_regularization_closures.py",
        "weights/test_regularization_loops.py",
        "weights/test_regularization_setups.py",
        "weights/test_regularization_share.py",
        "weights/test_regularization_watch.py",
        "weights/test_adapters.py",
        "weights/test_adapter_values.py",
        "weights/test_adapter_training.py",
        "weights/test_algorithm.py",
        "merging/test_merging.py",
        "merging/test_merging_rules.py",
        "merging/test_merging_soups.py",
        "merging/test_not_finite.py",
        "training/test_distillation.py",
        "training/test_text_energy.py",
    ),
}
"""Files whose tests are core tests, below ``tests/``, by subject."""

_COMPILES = "the group compiled of tests.device runs torch.compile"
_LATE = "a GPU notices later: training/silent_changes of tests.device"
_KERNELS = "names kernels of the CPU"
_PIECES = "an update in pieces, which only a CPU makes"

CPU_ONLY: dict[str, dict[str, str]] = {
    "test_temporal_training.py": {
        "test_another_default_device_changes_nothing": "changes the default device",
        "test_fused_attention_does_the_work": _KERNELS,
        "test_the_score_matrix_is_never_there": _KERNELS,
        "test_compiled_in_one_graph": _COMPILES,
        "test_batch_sizes_and_lengths_need_no_new_graph_where_shapes_are_dynamic": _COMPILES,
        "test_batch_sizes_need_one_more_graph_by_default": _COMPILES,
        "test_images_and_videos_through_one_compiled_tower": _COMPILES,
        "test_encode_video_is_compiled_in_one_graph": _COMPILES,
        "test_compiled_before_the_expansion": _COMPILES,
    },
    "test_regularization_setups.py": {
        "test_nothing_is_page_locked_or_copied_where_all_is_on_the_cpu": "tests the CPU alone",
        "test_copies_are_not_waited_for_where_the_memory_is_page_locked": "a GPU copies by streams",
    },
    "test_regularization_share.py": {
        "test_parts_of_one_size_compile_once_more_at_most": _COMPILES,
    },
    "test_averaging.py": {
        "test_ten_thousand_updates_of_a_bf16_model_equal_the_float64_mean": "too many launches",
    },
    "test_regularization_watch.py": {
        "test_a_clamped_scale_does_not_hide_an_optimizer_that_is_not_recorded": _LATE,
        "test_an_optimizer_in_the_backward_pass_is_refused": _LATE,
        "test_other_changes_of_the_weights_inside_the_block": _LATE,
    },
    "test_moves.py": {
        "test_ctrl_c_leaves_the_average_before_or_after": _PIECES,
        "test_an_error_that_comes_back_each_time": _PIECES,
    },
    "test_adapter_training.py": {
        "test_what_does_not_work_on_factors_is_refused_by_name": "starts processes for the CPU",
    },
    "test_temporal_hf.py": {
        "test_compiled_in_one_graph": _COMPILES,
        "test_a_compiled_vision_model": _COMPILES,
    },
    "test_temporal_timm.py": {
        "test_compiled_in_one_graph": _COMPILES,
    },
    "test_vision.py": {
        "test_compiled_in_one_graph": _COMPILES,
    },
    "test_text.py": {
        "test_compiled_in_one_graph": _COMPILES,
    },
    "test_buffers.py": {
        "test_buffers_of_a_compiled_model": _COMPILES,
    },
    "test_regularization_loops.py": {
        "test_a_compiled_model": _COMPILES,
    },
}
"""Core tests that stay on the CPU: ``file -> function -> reason``."""


def device_of(name: str) -> torch.device:
    """Return the device of ``--torch-device``, with the index of the current device.

    Raises:
        RuntimeError: the machine has no such device.
    """
    return torch.empty(0, device=name).device


_entered: list[torch.device] = []


def placed(tensor: Tensor) -> Tensor:
    """Return a tensor that a test read from a file, on the device of the test."""
    return tensor.to(_entered[-1]) if _entered else tensor


class MadeByTests(TorchFunctionMode):
    """Put tensors that a test makes without a device on a device.

    The numbers are those of the CPU: the tensor is made there and moved. Whether a call comes from
    a test is decided by the innermost caller that is a file of the tests or of the library.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __enter__(self) -> Any:
        _entered.append(self.device)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _entered.pop()
        super().__exit__(*error)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if (
            func not in _makers()
            or kwargs.get("device") is not None
            or kwargs.get("out") is not None
            or any(isinstance(arg, Tensor) for arg in args)
            or not _called_by_a_test(sys._getframe(1))
        ):
            return func(*args, **kwargs)
        trains = kwargs.pop("requires_grad", False)
        return func(*args, **kwargs).to(self.device).requires_grad_(trains)


@functools.cache
def _makers() -> set[Callable[..., Any]]:
    names = "arange as_tensor empty eye full linspace ones rand randint randn randperm "
    names += "tensor zeros empty_strided"
    return {getattr(torch, name) for name in names.split()}


def _called_by_a_test(frame: FrameType | None) -> bool:
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_LIBRARY):
            return False
        if file.startswith(_TESTS) and file != __file__:
            return True
        frame = frame.f_back
    return False


@contextmanager
def exact_kernels() -> Iterator[None]:
    """Compute float32 convolutions and products in float32, not in TF32, as a CPU does.

    The same inputs give the same bits: some gradients of cuDNN add in any order by default.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    cudnn.deterministic = True
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic = before
