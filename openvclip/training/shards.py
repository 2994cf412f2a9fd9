r"""The files of WebDataset shards, and the index that holds the labels of each shard.

    python -m openvclip.training.shards "k400-{0000..0999}.tar" --out k400.json

A shard is a tar file. Each sample in it is a video ``<key>.mp4`` and a file ``<key>.cls`` with the
class, an index or a name. The command writes the index. The index tells a run its number of
steps, and lets a resumed run skip the shards of earlier steps. Shards on a disk can be used
without an index: a run then reads their labels at its start. Remote shards need an index.
:class:`openvclip.training.shard_batches.ShardBatches` reads the videos.
"""

from __future__ import annotations

import argparse
import json
import os
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from openvclip.checkpoints.atomic import atomic_path
from openvclip.commands.parsing import Parser
from openvclip.commands.streams import command
from openvclip.errors import AnnotationError, MissingDependencyError, listed
from openvclip.video.files import VIDEO_SUFFIXES

__all__ = [
    "class_indices",
    "class_of",
    "find_shards",
    "is_video_or_label",
    "label_of",
    "read_index",
    "require_webdataset",
]


def find_shards(pattern: str) -> list[str]:
    """Expand a pattern to the paths or addresses of shards, in the order of the pattern.

    Args:
        pattern: such as ``"k400-{0000..0999}.tar"``.

    Raises:
        AnnotationError: files are missing, or the pattern names a shard twice.
        MissingDependencyError: webdataset is not installed.
    """
    shards: list[str] = require_webdataset().shardlists.expand_urls(pattern)
    missing = [name for name in shards if not _is_remote(name) and not Path(name).is_file()]
    if missing:
        raise AnnotationError(
            f"--shards {pattern!r} means {len(shards)} files, of which {len(missing)} don't exist "
            f"({listed(missing)}). Check the folder, and the numbers with their leading zeros, as "
            "in 'k400-{0000..0999}.tar'; quote the pattern."
        )
    if len(set(shards)) < len(shards):
        raise AnnotationError(
            f"--shards {pattern!r} names some shards more than once; expected each shard once."
        )
    return shards


def read_index(shards: Sequence[str], path: Path | None) -> dict[str, list[str]]:
    """Return the labels of each shard, as texts.

    Args:
        shards: paths or addresses of the shards, from :func:`find_shards`.
        path: file of the index. ``None``: read the labels from the shards.

    Raises:
        AnnotationError: the file is no index or lacks shards; or a shard can't be read, is empty
            or has videos without labels.
    """
    if path is None:
        remote = [name for name in shards if _is_remote(name)]
        if remote:
            raise AnnotationError(
                f"{listed(remote)}: shards that are not on a disk need --shard-index FILE; "
                "python -m openvclip.training.shards PATTERN --out FILE writes this file."
            )
        return {name: _read_labels(name) for name in shards}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        index = {name: content[name] for name in shards if content.get(name)}
    except (OSError, ValueError, AttributeError) as error:
        raise AnnotationError(
            f"{path}: is no index of shards ({error}); expected a file that "
            "python -m openvclip.training.shards writes."
        ) from error
    missing = [name for name in shards if name not in index]
    if missing:
        raise AnnotationError(
            f"{path}: lacks {len(missing)} of {len(shards)} shards ({listed(missing)}). It names "
            f"shards such as {listed(sorted(content))}; write the index with the pattern that you "
            "give to --shards."
        )
    return index


def class_indices(index: Mapping[str, Sequence[str]], names: Sequence[str]) -> dict[str, list[int]]:
    """Return the class index of each label of an index.

    Args:
        index: the labels of each shard, from :func:`read_index`.
        names: names of the classes.

    Raises:
        AnnotationError: a label is neither a class name nor a class index.
    """
    return {
        shard: [class_of(label, names, shard) for label in labels]
        for shard, labels in index.items()
    }


def class_of(label: str, names: Sequence[str], source: str) -> int:
    """Return the class index of a label.

    Args:
        label: the name or the index of a class.
        names: names of the classes.
        source: name of the shard or the sample, for the error.

    Raises:
        AnnotationError: the label is neither a class name nor a class index.
    """
    if label in names:
        return list(names).index(label)
    if label.isascii() and label.isdigit() and int(label) < len(names):
        return int(label)
    raise AnnotationError(
        f"{source}: unknown class {label!r}; expected one of the {len(names)} class names, or a "
        f"class index below {len(names)}."
    )


def label_of(sample: Mapping[str, Any], name: str) -> str:
    """Return the label of a WebDataset sample.

    Args:
        sample: the contents of the sample's files, by ending.
        name: name of the sample, for the error.

    Raises:
        AnnotationError: the sample has no label.
    """
    if "cls" not in sample:
        raise AnnotationError(f"{name}: has no label; expected a file <key>.cls beside the video.")
    return str(sample["cls"].decode().strip())


def is_video_or_label(name: str) -> bool:
    """Return whether a file of a shard is a video or a label."""
    return _split(name)[1] in {".cls", *VIDEO_SUFFIXES}


def require_webdataset() -> Any:
    """Return the module ``webdataset``.

    Raises:
        MissingDependencyError: webdataset is not installed.
    """
    try:
        import webdataset
    except ImportError as error:
        raise MissingDependencyError(
            'Reading shards needs webdataset: pip install "openvclip[examples]"'
        ) from error
    return webdataset


def _is_remote(shard: str) -> bool:
    return "://" in shard or shard.startswith("pipe:")


def _split(name: str) -> tuple[str, str]:
    """Split a path into key and ending. The ending starts at the first dot of the file name."""
    folder, name = os.path.split(name)
    key, dot, ending = name.partition(".")
    return os.path.join(folder, key), (dot + ending).lower()


def _read_labels(shard: str) -> list[str]:
    """Read the label of each video in a shard. Videos are skipped."""
    labels: dict[str, str] = {}
    videos: list[str] = []
    try:
        with require_webdataset().gopen(shard) as file:
            mode: Any = "r|*" if _is_remote(shard) else "r:*"
            with tarfile.open(fileobj=file, mode=mode) as archive:
                for member in archive:
                    key, ending = _split(member.name)
                    content = archive.extractfile(member) if ending == ".cls" else None
                    if content is not None:
                        labels[key] = content.read().decode().strip()
                    elif ending in VIDEO_SUFFIXES:
                        videos.append(key)
    except (OSError, tarfile.TarError, UnicodeDecodeError) as error:
        raise AnnotationError(f"{shard}: can't be read as a shard ({error}).") from error
    unlabelled = [key for key in videos if key not in labels]
    if unlabelled or not videos:
        problem = f"{len(unlabelled)} videos have no label ({listed(unlabelled)})"
        raise AnnotationError(
            f"{shard}: {problem if videos else 'holds no videos'}; expected <key>.mp4 and "
            "<key>.cls for each sample."
        )
    return [labels[key] for key in videos]


@command
def main(arguments: list[str] | None = None, tell: Callable[[str], None] = print) -> None:
    """Write the index of shards from the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", metavar="PATTERN", help='such as "k400-{0000..0999}.tar"')
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="the index (JSON)")
    args = parser.parse_args(arguments)
    index = {name: _read_labels(name) for name in find_shards(args.shards)}
    with atomic_path(args.out) as temporary:
        temporary.write_text(json.dumps(index) + "\n", encoding="utf-8")
    tell(f"{len(index)} shards with {sum(map(len, index.values()))} videos in {args.out}.")


if __name__ == "__main__":
    main()
