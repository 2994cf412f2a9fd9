"""The base class of the callbacks for Lightning, and functions that inspect a module."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from openvclip.errors import CheckpointError, MissingDependencyError, UsageError, listed

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def _callback_classes() -> tuple[type[Any], ...]:
    """Return the class ``Callback`` of each package of Lightning that is imported."""
    imported = [sys.modules[name] for name in _PACKAGES if name in sys.modules]
    if not imported:
        for name in _PACKAGES:
            try:
                imported = [importlib.import_module(name)]
                break
            except ImportError:
                continue
        else:
            raise MissingDependencyError(
                "The callbacks need Lightning, which is not installed: pip install lightning."
            )
    return tuple(module.Callback for module in imported)


_SUBCLASSES: dict[tuple[type[Any], ...], type[Any]] = {}


def _as_callback(*bases: type[Any]) -> type[Any]:
    """Return a subclass of all classes, with the names of the first one."""
    if bases not in _SUBCLASSES:
        own = bases[0]
        names = {name: getattr(own, name) for name in ("__module__", "__qualname__", "__doc__")}
        _SUBCLASSES[bases] = types.new_class(
            own.__name__, bases, exec_body=lambda space: space.update(names, _plain_class=own)
        )
    return _SUBCLASSES[bases]


def _new(cls: type[Any]) -> Any:
    return object.__new__(_as_callback(cls, *_callback_classes()))


class LightningCallback:
    """A callback of the imported packages of Lightning, which acts on a module or a part of it.

    ``lightning`` and ``pytorch_lightning`` have different classes, and most installations have
    both packages. So the base classes are chosen when a callback is created.
    """

    _plain_class: type[Any]

    def __new__(cls, *_: Any, **__: Any) -> LightningCallback:
        """Return an instance of a subclass, which Lightning takes for a callback."""
        instance: LightningCallback = _new(vars(cls).get("_plain_class", cls))
        return instance

    def __reduce__(self) -> Any:
        return _new, (type(self)._plain_class,), vars(self)

    def __init__(self, model: str) -> None:
        self._name_of_model = model
        self._saved: dict[str, Any] | None = None  # a state that is loaded when the run begins

    @property
    def state_key(self) -> str:
        """The key of the callback's state in a checkpoint."""
        return type(self).__qualname__

    def _model(self, pl_module: Any) -> nn.Module:
        """Return the module or the part of it that the callback acts on."""
        try:
            part: nn.Module = pl_module.get_submodule(self._name_of_model)
        except AttributeError as error:
            raise UsageError(
                f"{type(self).__name__}(model={self._name_of_model!r}): {error}. Give the name of "
                "a submodule of the LightningModule, as in module.get_submodule(name)."
            ) from error
        return part

    def require_once(self, trainer: Any, *, same_name: str | None = None) -> None:
        """Raise an error if the trainer has this callback twice."""
        others = [c for c in self._of_kind(trainer) if same_name in (None, c.state_key)]
        if len(others) > 1:
            raise UsageError(
                f"The trainer has {len(others)} callbacks {type(self).__name__}"
                f"{'' if same_name is None else f' with the key {same_name}'}; expected one. "
                "Look at the argument callbacks of the trainer and at configure_callbacks()."
            )

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Take the callback's changes to the module back.

        Args:
            trainer: see ``Callback.on_exception`` of Lightning.
            pl_module: see ``Callback.on_exception`` of Lightning.
            exception: see ``Callback.on_exception`` of Lightning.
        """
        self._stop()

    def _stop(self) -> None:
        """Take back what the callback changed for the run."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state of a checkpoint until the run begins.

        Args:
            state_dict: see ``Callback.load_state_dict`` of Lightning.
        """
        self._saved = state_dict

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that holds the state of such a callback under another name.

        Args:
            trainer: see ``Callback.on_load_checkpoint`` of Lightning.
            pl_module: see ``Callback.on_load_checkpoint`` of Lightning.
            checkpoint: see ``Callback.on_load_checkpoint`` of Lightning.
        """
        kind = type(self).__qualname__
        saved = {str(k) for k in checkpoint.get("callbacks", {}) if str(k).startswith(kind)}
        unused = sorted(saved - {callback.state_key for callback in self._of_kind(trainer)})
        if unused and self.state_key not in saved:
            raise CheckpointError(
                f"The checkpoint holds the state of {listed(unused)}, and none of "
                f"{self.state_key}. Give the callback the same name as in the saved run."
            )

    def _of_kind(self, trainer: Any) -> list[LightningCallback]:
        kind = type(self)._plain_class
        return [callback for callback in trainer.callbacks if isinstance(callback, kind)]


def runs_deepspeed(trainer: Any) -> bool:
    """Return whether the strategy of the trainer is one of DeepSpeed."""
    return "DeepSpeed" in type(trainer.strategy).__name__


def overrides(pl_module: Any, hook: str) -> bool:
    """Return whether the module has a hook of its own, and not that of ``LightningModule``."""
    module = str(getattr(getattr(pl_module, hook), "__module__", ""))
    return module.partition(".")[0] not in ("lightning", "pytorch_lightning")


@contextmanager
def without_log(pl_module: Any) -> Iterator[None]:
    """Let ``self.log()`` and ``self.log_dict()`` do nothing inside the block."""
    own = vars(pl_module).get("log")
    pl_module.log = _log_nothing
    try:
        yield
    finally:
        if own is None:
            del pl_module.log
        else:
            pl_module.log = own


def _log_nothing(*args: Any, **kwargs: Any) -> None:
    return None


@contextmanager
def keeping_metrics(pl_module: Any) -> Iterator[None]:
    """Restore the metrics of ``torchmetrics`` in a module after the block."""
    # A MetricCollection has no update_count. Its metrics are submodules of their own.
    names = ("metric_state", "update_count")
    metrics = [part for part in pl_module.modules() if all(hasattr(part, n) for n in names)]
    kept = [
        ({n: _copied(v) for n, v in metric.metric_state.items()}, metric.update_count)
        for metric in metrics
    ]
    try:
        yield
    finally:
        for metric, (state, count) in zip(metrics, kept, strict=True):
            for name, value in state.items():
                setattr(metric, name, value)
            metric._update_count, metric._computed = count, None


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else list(value)
