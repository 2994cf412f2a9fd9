"""Docstrings' reST parts as Markdown, for mkdocstrings: roles, ``.. math::`` and ``::`` blocks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import griffe

_ROLE = re.compile(r":(func|class|meth|mod|attr|exc|data):`(~?)([\w.]+)`")
_MATH_ROLE = re.compile(r":math:`([^`]+)`")


class RestDocstrings(griffe.Extension):
    """Rewrites every docstring of a package once it is loaded."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Called by griffe for each package, when all names in it can be resolved."""
        _rewrite(pkg, pkg["errors"])


def _rewrite(obj: griffe.Object, errors: griffe.Module) -> None:
    if obj.docstring:
        obj.docstring.value = _to_markdown(obj.docstring.value, obj)
        for section in obj.docstring.parsed:
            if isinstance(section, griffe.DocstringSectionRaises):
                section.value = [
                    part for item in section.value for part in _errors_of(item, errors)
                ]
            elif isinstance(section, griffe.DocstringSectionWarns):
                for warning in section.value:
                    warning.annotation = _linked(str(warning.annotation), errors)
            elif isinstance(section, griffe.DocstringSectionReturns):
                _keep_text(section.value, obj)
    for member in obj.members.values():
        if isinstance(member, griffe.Object):
            _rewrite(member, errors)


def _errors_of(
    item: griffe.DocstringRaise, errors: griffe.Module
) -> Iterator[griffe.DocstringRaise]:
    """One entry for each error of ``AError, BError: when``, linked to its documentation."""
    names = re.findall(r"[\w.]+", str(item.annotation))
    for name in names:
        if len(names) == 1 and name not in errors.members:
            yield item
        else:
            annotation = _linked(name, errors)
            yield griffe.DocstringRaise(annotation=annotation, description=item.description)


def _linked(name: str, errors: griffe.Module) -> str | griffe.Expr:
    return griffe.ExprName(name, parent=errors) if name in errors.members else name


def _keep_text(returns: list[griffe.DocstringReturn], obj: griffe.Object) -> None:
    """Put back what the parser took for a type: the first words, up to a colon in the text."""
    annotation = obj.returns if isinstance(obj, griffe.Function) else None
    for item in returns:
        if annotation is not None and str(item.annotation) != str(annotation):
            item.description = f"{item.annotation}: {item.description}"
            item.annotation = annotation


def _to_markdown(text: str, obj: griffe.Object) -> str:
    out: list[str] = []
    lines = text.split("\n")
    i = 0
    while i < len(lines):
        line = lines[i]
        i += 1
        if line.strip() == "Example:":  # the section that knows doctests is called Examples
            out.append(line.replace("Example:", "Examples:"))
        elif line.strip().startswith(".. math::"):
            block, i = _indented(lines, i, _indent(line))
            first = line.strip().removeprefix(".. math::")
            tex = " ".join([first, *(part.strip() for part in block)]).strip()
            out += ["", " " * _indent(line) + f"$${tex}$$", ""]
        elif line.rstrip().endswith("::"):
            block, i = _indented(lines, i, _indent(line))
            out += [_inline(line.rstrip()[:-1], obj), *_fenced(block, _indent(line))]
        else:
            out.append(_inline(line, obj))
    return "\n".join(out)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _indented(lines: list[str], start: int, indent: int) -> tuple[list[str], int]:
    """The lines from ``start`` on that are blank or deeper than ``indent``, and where they end."""
    end = start
    while end < len(lines) and (not lines[end].strip() or _indent(lines[end]) > indent):
        end += 1
    return lines[start:end], end


def _fenced(block: list[str], indent: int) -> list[str]:
    code = [line for line in block if line.strip()]
    if not code:
        return block
    depth = min(map(_indent, code))
    first, last = block.index(code[0]), len(block) - block[::-1].index(code[-1])
    margin = " " * indent
    inner = [(margin + line[depth:]).rstrip() for line in block[first:last]]
    return ["", margin + "```python", *inner, margin + "```", ""]


def _inline(line: str, obj: griffe.Object) -> str:
    line = _MATH_ROLE.sub(r"$\1$", line)
    return _ROLE.sub(lambda match: _reference(match, obj), line)


def _reference(match: re.Match[str], obj: griffe.Object) -> str:
    kind, short, name = match.groups()
    label = name.rsplit(".", 1)[-1] if short else name
    if kind in ("func", "meth"):
        label += "()"
    return f'<autoref identifier="{_resolved(name, obj)}" optional><code>{label}</code></autoref>'


def _resolved(name: str, obj: griffe.Object) -> str:
    first, *rest = name.split(".")
    if first == "openvclip":
        return name
    owner: griffe.Object | None = obj
    while owner is not None:  # a method's docstring may name its class's other members
        if first in owner.members:
            found = owner.members[first]
            path = found.target_path if isinstance(found, griffe.Alias) else found.path
            return ".".join([path, *rest])
        owner = owner.parent
    return name
