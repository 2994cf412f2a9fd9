"""The texts of a model that several threads use: token ids, features, and kept classifiers."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any

from torch import Tensor, nn

from openvclip.models.classifier import (
    Template,
    ZeroShotClassifier,
    encode_texts,
    require_names,
    require_templates,
)
from openvclip.models.features import device_of
from openvclip.models.labels import warn_of_single_label
from openvclip.models.tokenizers import Tokenizer, as_tokenizer, tokens_left_out
from openvclip.towers.view import Pooling

__all__ = ["TextSide"]

_KEPT = 16  # classifiers of different labels
_TEXTS = 256  # texts that are encoded at a time


class TextSide:
    """Encodes texts, and keeps the classifiers of the labels that were used last. Thread-safe.

    Args:
        model: a CLIP model of open_clip or transformers.
        tokenizer: see :class:`openvclip.ZeroShotClassifier`.
    """

    def __init__(self, model: nn.Module, tokenizer: Tokenizer) -> None:
        self._model = model
        self._tokenize = as_tokenizer(tokenizer, model)
        # Held while texts are tokenised, because the tokenizers of transformers are not
        # thread-safe, and while a classifier is made, so that it is made once.
        self._lock = threading.RLock()
        self._classifiers: OrderedDict[Hashable, ZeroShotClassifier] = OrderedDict()

    def encode(self, texts: list[str]) -> Tensor:
        """Return the features ``[n, D]`` of texts with unit length."""
        with self._lock:
            starts = range(0, len(texts), _TEXTS)
            tokens = [self._tokenize(texts[i : i + _TEXTS]) for i in starts]
        return encode_texts(self._model, tokens)

    def left_out(self, text: str) -> int:
        """Return the number of tokens of a text that the tokenizer cuts off."""
        with self._lock:
            return tokens_left_out(self._tokenize, text)

    def classifier(
        self, labels: Sequence[str], templates: Sequence[Template], pooling: Pooling
    ) -> ZeroShotClassifier:
        """Return the classifier of labels, a kept one if it fits the present weights."""
        names = require_names(labels, "labels")
        templates = require_templates(templates)
        key = (tuple(names), templates, pooling)
        with self._lock:
            kept = self._classifiers.pop(key, None)
            if kept is None or not self._is_current(kept):
                kept = ZeroShotClassifier(
                    self._model, self._tokenize, names, templates, pooling=pooling
                )
                warn_of_single_label(names)
            self._classifiers[key] = kept
            while len(self._classifiers) > _KEPT:
                self._classifiers.popitem(last=False)
        return kept

    def clear(self) -> None:
        """Remove the kept classifiers."""
        with self._lock:
            self._classifiers.clear()

    def _is_current(self, classifier: ZeroShotClassifier) -> bool:
        here = classifier.text_features.device == device_of(self._model)
        return here and classifier.text_is_current(quick=True)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        del state["_lock"], state["_classifiers"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()
        self._classifiers = OrderedDict()
