"""Change the texts in the headers of safetensors files. The bytes of the entries stay the same."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from openvclip.checkpoints.atomic import atomic_path, write_errors
from openvclip.checkpoints.layout import header_bytes, json_object, open_file
from openvclip.checkpoints.sharding import is_index, read_index


def add_texts(path: str | os.PathLike[str], texts: Mapping[str, str]) -> None:
    """Store texts in the header of a safetensors file, or in the index of a sharded model.

    Other texts of the file stay. A text of the same name is replaced. Each file is written
    atomically.

    Args:
        path: a safetensors file; or the index of a sharded model, whose shards get no texts.
        texts: texts by name.

    Raises:
        CheckpointError: the file can't be read, is no safetensors file, or can't be written.
    """
    file = Path(path)
    if is_index(file):
        read_index(file)  # raises if the index is invalid
        index: dict[str, Any] = json_object(file.read_bytes(), "the index")
        index["metadata"] = {**(index.get("metadata") or {}), **texts}
        with write_errors(file), atomic_path(file) as temporary:
            temporary.write_bytes((json.dumps(index, indent=2) + "\n").encode())
        return
    with ExitStack() as stack:
        opened = open_file(file, stack)
        header = header_bytes(opened.header.sizes, {**opened.header.metadata, **texts})
        with write_errors(file), atomic_path(file) as temporary, temporary.open("wb") as target:
            target.write(header)
            opened.file.seek(opened.header.length)
            shutil.copyfileobj(opened.file, target, 16 << 20)
            opened.file.close()  # Windows does not replace a file that is open
