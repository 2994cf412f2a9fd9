"""Settings of the whole suite."""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from open_clip import SimpleTokenizer

from tests.on_device import CORE, CPU_ONLY, TESTS, MadeByTests, device_of, exact_kernels

# The first backward pass of a process starts threads for the devices that PyTorch knows then.
# torch.export adds devices, and a fork of a process with such threads can't run a backward pass. So
# the first backward pass comes before all tests, because some tests fork after others export.
torch.ones(1, requires_grad=True).backward()

# Test files and tests that take 1.5 seconds of a core or more. They get the mark "slow", so that
# pytest -m "not slow" answers in about a minute. A file is named as a whole if its tests share a
# slow fixture.
SLOW = frozenset(
    {
        "test_distributed.py",
        "test_finetune_distributed.py",
        "test_finetune_presets.py",
        "test_finetune_resume.py",
        "test_leaks.py",
        "test_quickstart.py",
        "test_ray.py",
        "test_real_clips.py",
        "test_real_footage.py",
        "test_resume.py",
        "test_shapes_pretrain.py",
        "test_shapes_run.py",
        "test_shapes_trials.py::test_a_killed_run_goes_on_and_comes_to_the_same_results",
        "test_standalone.py",
        "test_tradeoff.py",
        "test_browser.py",
        "test_report_browser.py",
        "test_averaging.py::test_ten_thousand_updates_of_a_bf16_model_equal_the_float64_mean",
        "test_checking.py::test_a_crash_costs_one_file",
        "test_checking.py::test_ctrl_c_leaves_what_was_found",
        "test_checking.py::test_processes_that_do_not_start",
        "test_checking.py::test_the_command",
        "test_checking.py::test_the_command_on_lists",
        "test_checking.py::test_the_command_on_real_clips",
        "test_checkpoints.py::test_full_disk_leaves_the_old_file",
        "test_cli.py::test_the_module_runs_as_the_command",
        "test_docs.py::test_code_of_a_page_runs_in_order",
        "test_ema.py::test_sharded_models_are_averaged_in_their_shards",
        "test_evaluate.py::test_a_killed_run_goes_on_where_it_stopped",
        "test_evaluate.py::test_two_processes_equal_one_bitwise",
        "test_evaluate.py::test_two_protocols_in_one_pass",
        "test_export.py::test_an_exported_tower_takes_one_clip_and_one_frame",
        "test_export.py::test_onnxruntime_takes_clips_of_every_size",
        "test_exported.py::test_each_part_equals_pytorch",
        "test_exported.py::test_int8_weights",
        "test_exported.py::test_prompts_and_their_classifier",
        "test_exported.py::test_texts_in_any_number",
        "test_exported.py::test_weights_beside_a_large_model",
        "test_families.py::test_importing_the_rooms_imports_no_library",
        "test_figures.py::test_figure_is_drawn",
        "test_finetune.py::test_recomputed_and_compiled_layers_change_nothing",
        "test_finetune_command.py::test_a_run_leaves_weights_numbers_and_a_card",
        "test_finetune_command.py::test_help_of_the_file_started_by_its_path",
        "test_finetune_image_clip.py::test_lambda_is_chosen_on_the_validation_images",
        "test_fuzz.py::test_damaged_files",
        "test_hf.py::test_compiled_in_one_graph",
        "test_loops.py::test_the_accelerate_loop_equals_one_by_hand",
        "test_loops.py::test_the_lightning_loop_equals_one_by_hand",
        "test_merge_two_finetunes.py::test_merges_are_evaluated_on_videos_and_on_images",
        "test_open_vclip.py::test_the_saved_model_is_the_interpolation_and_keeps_the_text_tower",
        "test_package.py::test_importing_openvclip_costs_little_beyond_torch",
        "test_package.py::test_rooms_load_on_first_use",
        "test_package.py::test_the_examples_in_docstrings_run",
        "test_prediction.py::test_every_real_clip_gets_an_answer",
        "test_project.py::test_a_test_that_hangs_is_ended",
        "test_protocols.py::test_few_shots",
        "test_public.py::test_importing_the_room_adds_no_optional_dependency",
        "test_public.py::test_the_index_command_starts_without_a_warning",
        "test_regularization_loops.py::test_a_step_holds_the_copy_of_the_weights_or_the_first_gradients_but_not_both",
        "test_runner.py::test_every_split_at_every_lambda_equals_its_own_slow_evaluation",
        "test_shapes_studies.py::test_a_worker_that_dies_ends_the_work",
        "test_shapes_studies.py::test_work_comes_back_whole_from_workers_of_one_thread",
        "test_shapes_world.py::test_the_command_writes_the_data_set_with_two_processes",
        "test_pictures.py::test_hdr",
        "test_standalone_examples.py::test_an_example_runs_in_an_empty_folder",
        "test_storage.py::test_a_kill_at_any_moment_leaves_whole_videos",
        "test_streaming_faults.py::test_a_full_disk_and_ctrl_c_leave_the_older_files",
        "test_streaming_faults.py::test_a_kill_at_any_moment_leaves_the_older_model_or_the_new_one",
        "test_streaming_faults.py::test_shards_that_a_kill_left_are_removed_by_the_next_write",
        "test_streaming_files.py::test_memory_does_not_grow_with_the_files",
        "test_temporal_hf.py::test_a_compiled_vision_model",
        "test_temporal_hf.py::test_compiled_in_one_graph",
        "test_temporal_hf.py::test_transformers_is_imported_only_where_its_models_are",
        "test_temporal_timm.py::test_compiled_in_one_graph",
        "test_temporal_training.py::test_batch_sizes_and_lengths_need_no_new_graph_where_shapes_are_dynamic",
        "test_temporal_training.py::test_batch_sizes_need_one_more_graph_by_default",
        "test_temporal_training.py::test_compiled_before_the_expansion",
        "test_temporal_training.py::test_compiled_in_one_graph",
        "test_temporal_training.py::test_dropout_of_the_shares_keeps_their_mean",
        "test_temporal_training.py::test_encode_video_is_compiled_in_one_graph",
        "test_temporal_training.py::test_images_and_videos_through_one_compiled_tower",
        "test_text.py::test_compiled_in_one_graph",
        "test_timm.py::test_compiled_in_one_graph",
        "test_vision.py::test_compiled_in_one_graph",
    }
)

# No law depends on the time an example takes; the machines that run the suite are shared. The
# weekly workflow takes four times as many examples: HYPOTHESIS_PROFILE=thorough.
for name, max_examples in (("openvclip", 20), ("thorough", 80)):
    settings.register_profile(
        name,
        deadline=None,
        max_examples=max_examples,
        suppress_health_check=[HealthCheck.too_slow],
    )
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "openvclip"))

# The models are tiny: threads that wait for each other on shared cores cost more than they bring.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the device of the core tests: ``pytest -m core --torch-device cuda``."""
    text = "device of the core tests (tests/on_device.py); default: OPENVCLIP_TEST_DEVICE, or cpu"
    default = os.environ.get("OPENVCLIP_TEST_DEVICE", "cpu")
    parser.addoption("--torch-device", default=default, help=text)


def pytest_configure(config: pytest.Config) -> None:
    """Let the tests of averages use a model with batch norm; one file tests the warning."""
    config.addinivalue_line("filterwarnings", "ignore::openvclip.errors.StatisticsWarning")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the core tests and the tests of ``SLOW``, and run the files of ``SLOW`` first.

    Each process takes one file after the other. With the long files first, the processes end at
    about the same time.
    """
    core = {(TESTS / file).resolve() for files in CORE.values() for file in files}
    elsewhere = config.getoption("--torch-device") != "cpu"
    for item in items:
        file, function = item.path.name, item.name.partition("[")[0]
        if item.path in core:
            item.add_marker(pytest.mark.core)
            reason = CPU_ONLY.get(file, {}).get(function)
            if elsewhere and reason:
                item.add_marker(pytest.mark.skip(reason=f"on the CPU only: {reason}"))
        if not SLOW.isdisjoint({file, f"{file}::{function}"}):
            item.add_marker(pytest.mark.slow)
    slow_files = {name.partition("::")[0] for name in SLOW}
    items.sort(key=lambda item: item.path.name not in slow_files)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Import all tests without collections of garbage, which cost a quarter of that time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_finish() -> None:
    """Leave what the imports made out of the collections of garbage, which it made slow."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device of the core tests, see ``--torch-device``."""
    return device_of(request.config.getoption("--torch-device"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Run core tests, with the fixtures that they set up, on the device."""
    name = item.config.getoption("--torch-device")
    if name == "cpu" or item.get_closest_marker("core") is None:
        return (yield)
    with exact_kernels(), MadeByTests(device_of(name)):
        return (yield)


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _vocabulary_of_clip() -> Iterator[None]:
    """Read the vocabulary once for each kind of tokenizer; the tests make hundreds of tokenizers.

    The tokenizers share their tables, which only this constructor writes.
    """
    read, tables = SimpleTokenizer.__init__, dict[str, dict[str, Any]]()

    @functools.wraps(read)
    def init(self: SimpleTokenizer, *args: Any, **kwargs: Any) -> None:
        kind = repr((args, sorted(kwargs.items())))
        if kind not in tables:
            read(self, *args, **kwargs)
            tables[kind] = dict(vars(self))
        vars(self).update(tables[kind])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SimpleTokenizer, "__init__", init)
        yield


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The tests use no cache of the user."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENVCLIP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
