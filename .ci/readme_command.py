"""Print the shell commands of the README that stand below ``<!-- command: NAME -->``.

One command on a line: lines continued with a backslash are joined, comments and blank lines left
out. A block that is missing, empty or there twice is an error.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

_BLOCK = r"^<!-- command: {name} -->[ \t]*\n+```bash[ \t]*\n(.*?)^```[ \t]*$"


def commands(readme: str, name: str) -> list[str]:
    """The commands of one block.

    Raises:
        ValueError: there is not exactly one such block, it is empty, or its last command ends in
            a comment (the CI appends arguments to it).
    """
    pattern = _BLOCK.format(name=re.escape(name))
    blocks = re.findall(pattern, readme, re.DOTALL | re.MULTILINE)
    if len(blocks) != 1:
        raise ValueError(
            f"{len(blocks)} blocks marked '<!-- command: {name} -->'; expected one, the mark on a "
            "line of its own just before a ```bash fence."
        )
    joined = re.sub(r"\\\n\s*", "", blocks[0])
    lines = [line.strip() for line in joined.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise ValueError(f"the block '<!-- command: {name} -->' holds no command.")
    if re.search(r"\s#", lines[-1]):
        raise ValueError(f"the last command of the block '{name}' ends in a comment: {lines[-1]}")
    return lines


def main() -> int:
    """``readme_command.py README NAME``."""
    path, name = sys.argv[1:]
    try:
        found = commands(Path(path).read_text(encoding="utf-8"), name)
    except (OSError, ValueError) as error:
        print(f"{path}: {error}", file=sys.stderr)
        return 1
    print("\n".join(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
