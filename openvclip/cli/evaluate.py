"""``openvclip evaluate``."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from openvclip.cli.options.data import add_data_options, splits_of
from openvclip.cli.options.models import (
    add_frame_options,
    add_model_options,
    amp_of,
    device_of,
    load,
    sampling_of,
    templates_of,
)
from openvclip.cli.options.types import Commands
from openvclip.errors import UsageError

if TYPE_CHECKING:
    from openvclip.evaluation import ProtocolEvaluation
    from openvclip.video.transforms import Transform

# Options that change neither what is encoded nor what it is called.
_NOT_SETTINGS = {"run", "command", "out", "json", "per_class", "confusion", "num_workers", "device"}
_NOT_SETTINGS |= {"leave_out_broken", "allow_missing_videos"}

_EVALUATE = """\
Zero-shot accuracy on published protocols, or on a list of your own.

Every video is read and encoded once, for all protocols, splits and values of
--lam.
Results are kept as they come: the same command goes on where it was stopped.
Under torchrun each process takes a part of the videos.
"""
_EXAMPLES = """\
examples:
  openvclip evaluate --model ViT-B-16-quickgelu --pretrained openai \\
      --checkpoint swa.pth --lam 0.5 --protocol ucf101-ep1 \\
      --annotations ucfTrainTestlist/ --videos UCF-101/
  openvclip evaluate --protocol hmdb51-ep1 hmdb51-ep3 \\
      --annotations testTrainMulti_7030_splits/ --videos hmdb51/
  openvclip evaluate --checkpoint swa.pth --lam 0 0.2 0.4 0.6 0.8 \\
      --annotations test.csv --classes classes.txt --videos videos/
  torchrun --nproc-per-node 8 --no-python openvclip evaluate ...
"""


def add(commands: Commands) -> None:
    """Add the parser of the subcommand."""
    parser = commands.add_parser(
        "evaluate",
        help="zero-shot accuracy on a published protocol",
        description=_EVALUATE,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_data_options(parser)
    add_model_options(parser)
    parser.add_argument(
        "--lam",
        type=float,
        nargs="+",
        default=[],
        help="weights of the original CLIP to interpolate with; 0 is the checkpoint itself (0)",
    )
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
        help="crops of each clip: the middle, or also the ends of the long side (%(default)s)",
    )
    group.add_argument(
        "--short-side",
        type=int,
        metavar="PIXELS",
        help="of the frames before they are cropped (the model's size)",
    )


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run and results")
    group.add_argument(
        "--batch-size", type=int, default=8, help="videos encoded at a time (%(default)s)"
    )
    group.add_argument(
        "--num-workers", type=int, default=2, help="processes that decode (%(default)s)"
    )
    group.add_argument(
        "--out",
        type=Path,
        help="folder of results (openvclip-results/, and there one for these settings)",
    )
    group.add_argument("--per-class", action="store_true", help="accuracy on each class, to JSON")
    group.add_argument("--confusion", action="store_true", help="confusion matrices, to JSON")
    group.add_argument("--json", action="store_true", help="print the results as JSON")


def _evaluate(options: argparse.Namespace) -> None:
    from openvclip.evaluation import evaluate_protocol
    from openvclip.processes import joined_processes

    _check(options)
    splits = splits_of(options)
    loaded = load(options)
    title = ", ".join(options.protocol) or options.annotations.name
    folder = options.out or _default_folder(options)
    with joined_processes() as processes:
        if processes.is_first and not options.json:
            videos = len({path for split in splits for path, _ in split.samples})
            print(f"{title}: {_plural(len(splits), 'split')}, {_plural(videos, 'video')}")
        result = evaluate_protocol(
            loaded.model,
            loaded.tokenizer,
            splits,
            options.videos,
            tuned=loaded.tuned,
            lams=options.lam,
            transform=_cropped(loaded.transform, options),
            sampling=sampling_of(options),
            templates=templates_of(options),
            batch_size=options.batch_size,
            num_workers=options.num_workers,
            amp=amp_of(options),
            out=folder,
            leave_out_broken=options.leave_out_broken,
            allow_missing=options.allow_missing_videos,
            settings={"protocol": title, "model": loaded.name},
            description=title,
        )
        if processes.is_first:
            _report(result, options, loaded.name, folder)


def _cropped(transform: Transform, options: argparse.Namespace) -> Transform:
    return transform.with_(short_side=options.short_side, crops=options.crops)


def _check(options: argparse.Namespace) -> None:
    if options.lam and options.checkpoint is None:
        raise UsageError("--lam interpolates with fine-tuned weights: give --checkpoint too.")
    for name, least in (("batch_size", 1), ("num_workers", 0)):
        if getattr(options, name) < least:
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag} {getattr(options, name)}: expected at least {least}.")


def _default_folder(options: argparse.Namespace) -> Path:
    """A folder for these settings, so that another call with others has one of its own."""
    kept = {k: str(v) for k, v in sorted(vars(options).items()) if k not in _NOT_SETTINGS}
    kept["device"] = device_of(options).type
    mark = hashlib.blake2b(json.dumps(kept).encode(), digest_size=4).hexdigest()
    title = "+".join(options.protocol) or options.annotations.stem
    return Path("openvclip-results") / f"{title}-{mark}"


def _report(
    result: ProtocolEvaluation, options: argparse.Namespace, name: str, folder: Path
) -> None:
    from openvclip.checkpoints.atomic import atomic_path, write_errors
    from openvclip.evaluation.tables import as_json, as_table, time_spent

    found = as_json(result, per_class=options.per_class, confusion=options.confusion)
    table = as_table(result, name)
    for file, text in (("results.json", json.dumps(found, indent=1)), ("table.md", table)):
        with write_errors(folder / file), atomic_path(folder / file) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        several = any(len(entry["splits"]) > 1 for entry in found["results"])
        spread = ", mean ± standard deviation over the splits" if several else ""
        print(f"\nAccuracy in %{spread}:\n\n{table}\n")
        print(f"{time_spent(result)}\nwrote {folder / 'results.json'}, {folder / 'table.md'}")
    _report_failures(result, options)


def _report_failures(result: ProtocolEvaluation, options: argparse.Namespace) -> None:
    if not result.failures:
        return
    n = len(result.failures)
    fate = "not counted" if options.leave_out_broken else "counted as wrong"
    print(f"{_plural(n, 'video')} that can't be read, {fate}:", file=sys.stderr)
    for failure in result.failures[:5]:
        print(f"  {failure.reason}", file=sys.stderr)
    if n > 5:
        print(f"  and {n - 5} more, in results.json", file=sys.stderr)


def _plural(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"
