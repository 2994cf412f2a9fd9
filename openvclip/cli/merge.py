"""The subcommand ``openvclip merge``."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from openvclip.cli.options.outputs import add_merge_output_options, require_free, write_options
from openvclip.cli.options.types import Commands
from openvclip.commands.parsing import Parser, refuse_unused
from openvclip.errors import UsageError

if TYPE_CHECKING:
    from openvclip.merging import Method

_DESCRIPTION = """\
Merge files of weights by a published method. "openvclip merge --list" shows the
methods and what each of them merges. "openvclip merge METHOD --help" shows the
options of a method.
"""
_EXAMPLES = """\
examples:
  openvclip merge --list
  openvclip merge monosoup tuned.safetensors --base clip.safetensors \\
      -o mono.safetensors
  openvclip merge iso_c a.safetensors b.safetensors --base clip.safetensors \\
      --scale 0.5 -o both.safetensors
  openvclip merge task_vector a.safetensors --base clip.safetensors \\
      -o vector.safetensors
"""
_FILES = """\
Files are read entry by entry: a few entries of each file are in memory at a
time. A model may be a folder of peft with a LoRA fine-tune of the
{first}, or a task vector of the {first}
("openvclip merge task_vector --help").
"""
_VECTOR = "task_vector"
_VECTOR_SUMMARY = "write the change of a model as a file"
_VECTOR_DESCRIPTION = """\
Write the task vector MODEL - CLIP: the change of a model as a file.

"openvclip merge" takes this file in the place of the model, together with the
same original CLIP. Commands that need a model refuse the file.
"""
_FILE_HELP = "safetensors or PyTorch file, or the index of a sharded model"


def add(commands: Commands) -> None:
    """Add the parser of the subcommand."""
    parser = commands.add_parser(
        "merge",
        help="merge files of weights by a published method",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        complete=_add_methods,
    )
    parser.add_argument(
        "--list", action="store_true", help="show the methods and end (default: merge)"
    )
    parser.set_defaults(run=_without_method)


def _add_methods(parser: Parser) -> None:
    # The import takes 10 ms, which all other subcommands would pay.
    from openvclip.merging import METHODS

    methods = parser.add_subparsers(dest="method", metavar="METHOD")
    for method in METHODS.values():
        _add_method(methods, method)
    vector = methods.add_parser(
        _VECTOR,
        help=_VECTOR_SUMMARY,
        description=_VECTOR_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    vector.add_argument("model", metavar="MODEL", type=Path, help=_FILE_HELP)
    _add_base(vector)
    add_merge_output_options(vector)
    vector.set_defaults(run=_write_vector)


def _add_method(methods: Commands, method: Method) -> None:
    first = "original CLIP" if method.base else "first model"
    parser = methods.add_parser(
        method.name,
        help=method.summary,
        description=f"{method.summary[0].upper()}{method.summary[1:]}.\nMerges: {method.inputs}. "
        f"From: {method.paper}.\n\n{_FILES.format(first=first)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "models",
        metavar="MODEL",
        type=Path,
        nargs="+",
        help=f"{_FILE_HELP}; all files must have the same names and shapes",
    )
    if method.base:
        _add_base(parser)
    for option in method.options:
        default = "" if option.default is None else f" (default: {option.default})"
        parser.add_argument(
            f"--{option.name.replace('_', '-')}",
            type=option.type,
            default=option.default,
            required=option.required,
            choices=option.choices or None,
            metavar=None if option.choices else "N" if option.type is int else "X",
            help=option.help + default,
        )
    add_merge_output_options(parser)
    parser.set_defaults(run=functools.partial(_merge, method))


def _add_base(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base", metavar="CLIP", type=Path, required=True, help=f"the original CLIP: {_FILE_HELP}"
    )


def _without_method(options: argparse.Namespace) -> None:
    if not options.list:
        raise UsageError(
            "expected the name of a method. `openvclip merge --list` shows the methods, and "
            "`openvclip merge METHOD --help` the options of a method."
        )
    from openvclip.merging import METHODS

    rows = [(m.name, m.summary, m.inputs, m.paper) for m in METHODS.values()]
    rows += [(_VECTOR, _VECTOR_SUMMARY, "CLIP and 1 model", "Ilharco et al., ICLR 2023")]
    width = max(len(row[0]) for row in rows)
    for name, summary, inputs, paper in rows:
        print(f"{name:<{width}}  {summary}")
        print(f"{'':<{width}}  of {inputs}; {paper}")


def _write_vector(options: argparse.Namespace) -> None:
    from openvclip.checkpoints.streaming import task_vector_file

    _refuse_list(options)
    require_free([options.output], overwrite=options.overwrite)
    task_vector_file(options.base, options.model, options.output, **write_options(options))
    print(f"{'wrote':<12} {options.output} (task vector of {options.model})")


def _merge(method: Method, options: argparse.Namespace) -> None:
    from openvclip.checkpoints.streaming import average_files, interpolate_files, merge_files

    _refuse_list(options)
    models: list[Path] = options.models
    method.require_count(len(models))
    refuse_unused(
        options.given,
        {
            name: f"with --{other} {value}" if getattr(options, other) == value else ""
            for name, (other, value) in (method.unused or {}).items()
        },
    )
    require_free([options.output], overwrite=options.overwrite)
    written = write_options(options)
    settings = {o.name: getattr(options, o.name) for o in method.options}
    # These two work on parts of an entry, in less memory.
    if method.name == "interpolate":
        interpolate_files(options.base, models[0], options.output, settings["lam"], **written)
    elif method.name == "average":
        average_files(models, options.output, **written)
    else:
        files = [options.base, *models] if method.base else models
        merge_files(
            files,
            options.output,
            functools.partial(
                _merge_entry,
                method,
                {**settings, **_names(method, settings, files[0]), "dtype": written["dtype"]},
            ),
            method=method.name,
            settings=settings,
            base=method.base,
            **written,
        )
    print(f"{'wrote':<12} {options.output} ({method.name} of {_count(models)})")


def _merge_entry(
    method: Method, settings: Mapping[str, Any], states: list[dict[str, Tensor]]
) -> Mapping[str, Tensor]:
    """Apply a merge method to one entry of each file."""
    base = states[0] if method.base else None
    return method.run(base, states[1:] if method.base else states, **settings)


def _names(method: Method, settings: Mapping[str, Any], first: Path) -> dict[str, Any]:
    """Return the setting that holds the names of all entries, if it is not given."""
    if not method.names or settings[method.names] is not None:
        return {}
    from openvclip.checkpoints.streaming import entry_names

    return {method.names: entry_names(first)}


def _refuse_list(options: argparse.Namespace) -> None:
    refuse_unused(options.given, {"list": "with a method"})


def _count(models: Sequence[Path]) -> str:
    return str(models[0]) if len(models) == 1 else f"{len(models)} models"
