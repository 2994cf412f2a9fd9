"""Reading of command lines: close names for unknown ones, and options that have no effect."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn

from openvclip.errors import UsageError, did_you_mean

__all__ = ["Parser", "refuse_unused", "unused_option"]


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` that names close flags and choices, and notes which options are given.

    The namespace of :meth:`parse_args` has an attribute ``given``: the names of the options on the
    command line, without the options that have their default values.

    Args:
        complete: function that adds arguments which are slow to make. It is called once, when the
            parser first reads words. A command line that uses another subcommand does not call it.
        names: arguments of ``ArgumentParser`` by position.
        settings: arguments of ``ArgumentParser`` by name.
    """

    def __init__(
        self, *names: Any, complete: Callable[[Parser], object] | None = None, **settings: Any
    ) -> None:
        super().__init__(*names, **settings)
        self._complete = complete

    def complete(self) -> None:
        """Add the arguments that are slow to make."""
        complete, self._complete = self._complete, None
        if complete is not None:
            complete(self)

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Read a command line.

        Args:
            args: the words. Default: those of the process.
            namespace: see ``argparse``.
        """
        words = list(sys.argv[1:] if args is None else args)
        parsed = super().parse_args(words, namespace)
        with _without_defaults(self):
            given, _ = self.parse_known_args(words)
        parsed.given = frozenset(vars(given))
        return parsed

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Read the known parts of a command line.

        Args:
            args: the words. Default: those of the process.
            namespace: see ``argparse``.
        """
        # The parser of a subcommand starts here.
        self.complete()
        self._words = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(self._words, namespace)

    def error(self, message: str) -> NoReturn:
        """End with the status 2; name the flags that are close to unknown flags.

        Args:
            message: what is wrong.
        """
        known = list(_flags(self, self._words))
        hints = []
        for word in self._words:
            flag = word.partition("=")[0]
            if flag[:2] == "--" and not any(other.startswith(flag) for other in known):
                hint = did_you_mean(flag, known)
                hints += [f"{flag} is no option{hint}"] if hint else []
        super().error("; ".join([message, *dict.fromkeys(hints)]))

    def _print_message(self, message: str, file: Any = None) -> None:
        # argparse drops errors of writing, so a closed pipe would look like a success.
        if message:
            (file or sys.stderr).write(message)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            hint = did_you_mean(str(value), map(str, action.choices or ()))
            raise argparse.ArgumentError(action, error.message + hint) from None


def unused_option(given: Collection[str], reasons: Mapping[str, str]) -> str:
    """Return an error text for the first option that is given but has no effect, or ``""``.

    Args:
        given: names of the options on the command line, with underscores; see :class:`Parser`.
        reasons: why an option has no effect, by its name. An empty reason means that the option has
            an effect.
    """
    for name, reason in reasons.items():
        if reason and name in given:
            flag = ("-" if len(name) == 1 else "--") + name.replace("_", "-")
            return f"{flag} has no effect {reason}. Leave {flag} out."
    return ""


def refuse_unused(given: Collection[str], reasons: Mapping[str, str]) -> None:
    """Check that no option is given without an effect.

    Args:
        given: see :func:`unused_option`.
        reasons: see :func:`unused_option`.

    Raises:
        UsageError: an option has no effect.
    """
    text = unused_option(given, reasons)
    if text:
        raise UsageError(text)


def _flags(parser: argparse.ArgumentParser, words: Sequence[str]) -> Iterator[str]:
    """Yield the flags of a parser, and those of the subcommand that the command line names."""
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for word in words:
                if word in action.choices:
                    yield from _flags(action.choices[word], words)


@contextmanager
def _without_defaults(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Context manager in which the parser sets only the options that the command line names."""
    with ExitStack() as stack:
        for action in parser._actions:
            stack.callback(setattr, action, "default", action.default)
            action.default = argparse.SUPPRESS
            if isinstance(action, argparse._SubParsersAction):
                for subparser in dict.fromkeys(action.choices.values()):
                    stack.enter_context(_without_defaults(subparser))
        stack.callback(parser._defaults.update, dict(parser._defaults))
        parser._defaults.clear()
        yield
