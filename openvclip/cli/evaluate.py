"""The subcommand ``openvclip evaluate``."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from openvclip.cli.options.contract import use_contract
from openvclip.cli.options.data import add_data_options, splits_of
from openvclip.cli.options.failures import plural, report_failures
from openvclip.cli.options.models import (
    add_frame_options,
    add_lam_option,
    add_model_options,
    amp_of,
    cache_of,
    device_of,
    load,
    pooling_of,
    require_effects,
    sampling_of,
    templates_of,
)
from openvclip.cli.options.retrieval import (
    NAMES,
    check_retrieval,
    is_retrieval,
    pixels_of,
    setting,
    test_set_of,
)
from openvclip.cli.options.types import Commands
from openvclip.commands.parsing import refuse_unused
from openvclip.errors import UsageError

if TYPE_CHECKING:
    from openvclip.evaluation import ProtocolEvaluation, RetrievalEvaluation, RunOptions

# Options that do not change the name of the default folder for the results. (The type of the
# device is added to the name separately.)
_NOT_SETTINGS = {"run", "command", "out", "json", "per_class", "confusion", "num_workers", "device"}
_NOT_SETTINGS |= {"leave_out_broken", "allow_missing_videos", "no_cache", "given", "dual_softmax"}

_DESCRIPTION = """\
Compute the zero-shot accuracy of a model on published protocols, or on your
own list of videos; or its recall on a protocol of text-to-video retrieval.

Every video is decoded once, and encoded once for each value of --lam. Several
protocols and splits share these features. Results are saved while they are
computed: the same command continues where it was stopped. Under torchrun, each
process encodes a part of the videos.
"""
_DUAL = (
    "With the dual softmax, which uses all captions of the test set at once: not comparable with "
    "results without it."
)
_EXAMPLES = """\
examples:
  openvclip evaluate --model ViT-B-16-quickgelu --pretrained openai \\
      --checkpoint swa.pth --lam 0.5 --protocol ucf101-ep1 \\
      --annotations ucfTrainTestlist/ --videos UCF-101/
  openvclip evaluate --protocol hmdb51-ep1 hmdb51-ep3 \\
      --annotations testTrainMulti_7030_splits/ --videos hmdb51/
  openvclip evaluate --checkpoint swa.pth --lam 0 0.2 0.4 0.6 0.8 \\
      --annotations test.csv --classes classes.txt --videos videos/
  openvclip evaluate --model runs/b16 --protocol msrvtt-1ka \\
      --annotations MSRVTT_JSFUSION_test.csv --videos MSRVTT/videos/
  torchrun --nproc-per-node 8 --no-python openvclip evaluate ...
"""


def add(commands: Commands) -> None:
    """Add the parser of the subcommand."""
    parser = commands.add_parser(
        "evaluate",
        help="compute the zero-shot accuracy of a model on a data set",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_data_options(parser, retrieval=NAMES)
    add_model_options(parser)
    add_lam_option(parser, several=True)
    add_frame_options(parser)
    _add_crop_options(parser)
    _add_run_options(parser)
    parser.set_defaults(run=_evaluate)


def _add_crop_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("crops")
    group.add_argument(
        "--crops",
        type=int,
        choices=(1, 3),
        default=1,
        help="number of crops of each clip: 1 takes the centre, 3 takes the centre and both ends "
        "of the long side (default: %(default)s)",
    )
    group.add_argument(
        "--short-side",
        type=int,
        metavar="PIXELS",
        help="short side of the frames before the crop (default: the image size of the model)",
    )


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run and results")
    group.add_argument(
        "--batch-size",
        type=int,
        default=8,
        help="videos to encode at a time (default: %(default)s)",
    )
    group.add_argument(
        "--num-workers",
        type=int,
        default=2,
        help="processes that decode; 0 decodes in the main process (default: %(default)s)",
    )
    group.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="folder for the results (default: a folder for these settings in openvclip-results/)",
    )
    group.add_argument(
        "--per-class", action="store_true", help="add the accuracy of each class to results.json"
    )
    group.add_argument(
        "--confusion", action="store_true", help="add confusion matrices to results.json"
    )
    group.add_argument(
        "--dual-softmax",
        action="store_true",
        help="for retrieval: add a table with the dual softmax, which weighs the similarities with "
        "all captions of the test set at once",
    )
    group.add_argument(
        "--json", action="store_true", help="print the results as JSON (default: as a table)"
    )


def _evaluate(options: argparse.Namespace) -> None:
    if is_retrieval(options):
        _evaluate_retrieval(options)
    else:
        _evaluate_splits(options)


def _evaluate_splits(options: argparse.Namespace) -> None:
    from openvclip.evaluation import Mixture, evaluate_protocol
    from openvclip.processes import joined_processes

    _check(options)
    splits = splits_of(options)
    loaded = load(options)
    title = ", ".join(options.protocol) or options.annotations.name
    folder = options.out or _default_folder(options)
    transform = loaded.transform.with_(short_side=options.short_side, crops=options.crops)
    with cache_of(options), joined_processes() as processes:
        if processes.is_first and not options.json:
            n_videos = len({path for split in splits for path, _ in split.samples})
            print(f"{title}: {plural(len(splits), 'split')}, {plural(n_videos, 'video')}")
        result = evaluate_protocol(
            loaded.model,
            loaded.tokenizer,
            splits,
            options.videos,
            mixture=Mixture(loaded.tuned, options.lam, options.text),
            sampling=sampling_of(options),
            transform=transform,
            templates=templates_of(options),
            out=folder,
            run=_run_options(options, title, loaded.name),
        )
        if processes.is_first:
            _report(result, options, loaded.name, folder)


def _evaluate_retrieval(options: argparse.Namespace) -> None:
    from openvclip.evaluation import Mixture, evaluate_retrieval
    from openvclip.processes import joined_processes

    check_retrieval(options)
    _check_run(options)
    test_set = test_set_of(options)
    loaded = load(options)
    folder = options.out or _default_folder(options)
    transform = pixels_of(options, loaded.transform)
    words = setting(test_set, transform, pooling_of(options))
    with cache_of(options), joined_processes() as processes:
        if processes.is_first and not options.json:
            captions = plural(sum(map(len, test_set.captions)), "caption")
            print(f"{test_set.name}: {plural(len(test_set.videos), 'video')}, {captions}\n{words}")
        result = evaluate_retrieval(
            loaded.model,
            loaded.tokenizer,
            test_set,
            options.videos,
            mixture=Mixture(loaded.tuned, options.lam, options.text),
            transform=transform,
            out=folder,
            run=_run_options(options, test_set.name, loaded.name),
        )
        if processes.is_first:
            _report_retrieval(result, options, loaded.name, folder, words)


def _check(options: argparse.Namespace) -> None:
    use_contract(options)
    require_effects(options)
    here = "without a retrieval protocol, such as --protocol msrvtt-1ka"
    refuse_unused(options.given, {"dual_softmax": here})
    _check_run(options)


def _check_run(options: argparse.Namespace) -> None:
    for name, least in (("batch_size", 1), ("num_workers", 0)):
        if getattr(options, name) < least:
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag} {getattr(options, name)}: expected at least {least}.")


def _run_options(options: argparse.Namespace, title: str, model_name: str) -> RunOptions:
    from openvclip.evaluation import RunOptions

    return RunOptions(
        batch_size=options.batch_size,
        num_workers=options.num_workers,
        amp=amp_of(options),
        description=title,
        pooling=pooling_of(options),
        leave_out_broken=options.leave_out_broken,
        allow_missing=options.allow_missing_videos,
        settings={"protocol": title, "model": model_name},
    )


def _default_folder(options: argparse.Namespace) -> Path:
    """Return a folder whose name depends on the settings. Other settings give another folder."""
    settings = {k: str(v) for k, v in sorted(vars(options).items()) if k not in _NOT_SETTINGS}
    if options.text == "own":
        del settings["text"]  # the folder is the same as before there was this option
    if options.contract is None:  # the folder is the same as before there were contracts
        del settings["contract"], settings["override"]
    settings["device"] = device_of(options).type
    digest = hashlib.blake2b(json.dumps(settings).encode(), digest_size=4).hexdigest()
    title = "+".join(options.protocol) or options.annotations.stem
    return Path("openvclip-results") / f"{title}-{digest}"


def _report(
    result: ProtocolEvaluation, options: argparse.Namespace, name: str, folder: Path
) -> None:
    """Write ``results.json``, ``table.md`` and the predictions, and print the results."""
    from openvclip.evaluation import as_json, as_table, save_results, time_spent

    content = as_json(result, per_class=options.per_class, confusion=options.confusion)
    table = as_table(result, name)
    save_results(folder, result, per_class=options.per_class, confusion=options.confusion)
    _write(folder, {"table.md": table})
    if options.json:
        print(json.dumps(content, indent=1))
    else:
        several = any(len(entry["splits"]) > 1 for entry in content["results"])
        spread = ", mean ± standard deviation over the splits" if several else ""
        print(f"\nAccuracy in %{spread}:\n\n{table}\n")
        print(f"{time_spent(result)}\nwrote {folder / 'results.json'}, {folder / 'table.md'}")
    wrong = "not counted" if options.leave_out_broken else "counted as wrong"
    report_failures([failure.reason for failure in result.failures], wrong, ", see results.json")


def _report_retrieval(
    result: RetrievalEvaluation, options: argparse.Namespace, name: str, folder: Path, words: str
) -> None:
    """Write ``results.json`` and the tables, and print the results."""
    from openvclip.evaluation import retrieval_json, retrieval_table, time_spent

    content = retrieval_json(result, dual_softmax=options.dual_softmax)
    about = f"{result.name}: {words}."
    tables = {"table.md": f"{retrieval_table(result, name)}\n\n{about}"}
    if options.dual_softmax:
        table = retrieval_table(result, name, dual_softmax=True)
        tables["table-dual-softmax.md"] = f"{table}\n\n{about} {_DUAL}"
    files = {"results.json": json.dumps(content, indent=1), **tables}
    _write(folder, files)
    if options.json:
        print(json.dumps(content, indent=1))
    else:
        for text in tables.values():
            print(f"\n{text}")
        print(f"\n{time_spent(result)}\nwrote {', '.join(str(folder / file) for file in files)}")
    wrong = "left out with their captions" if options.leave_out_broken else "with the worst ranks"
    report_failures([failure.reason for failure in result.failures], wrong, ", see results.json")


def _write(folder: Path, files: dict[str, str]) -> None:
    from openvclip.checkpoints.atomic import write_text

    for file, text in files.items():
        write_text(folder / file, [text, "\n"])
