"""Merging of weights: the published methods, each of which is a function on state dicts.

All methods follow the rules of :func:`openvclip.interpolate`. Entries are matched by their
canonical names. The result is new memory without a graph. Half precision is computed in float32
and rounded once. Integer and boolean entries are copied from the first state dict that is passed
to a function; :func:`slerp` copies them from ``theta_b``, as ``interpolate`` does. Extra state of
modules (``get_extra_state``) is copied from the same state dict. A complex number counts as a pair
of real numbers. Sharded entries are gathered one at a time, and the result is sharded like the
first state dict.

A LoRA fine-tune is passed as :class:`openvclip.weights.Adapter` in the place of a fine-tuned state
dict. Its entries are merged with those of the first state dict one at a time.

Quantised, sparse and offloaded weights raise a ``WeightTypeError``. So do state dicts with factors
of adapters such as LoRA, unless only one factor of each product differs between the models: pass
the adapter, or merge it into the base model first.

A method raises a :class:`~openvclip.errors.NonFiniteMergeError` if a model holds NaN, or an
infinity that not all models hold in the same place. The infinities of an attention mask are the
same in all models, and are kept. A model whose weight is 0 is not checked. Functions that merge
files do the same. :func:`openvclip.interpolate` returns what its equation gives for NaN and
infinity.

All methods except ``ties(trim="model")`` and ``greedy_soup`` use one entry at a time. They return
the same result for state dicts of one entry each, so :func:`openvclip.merge_files` can apply them
to files.

To add a method, write one file in this package with the function and a :class:`Method` that
describes it, add the description to ``METHODS`` in ``registry.py``, and export the function below.
``openvclip merge``, its list and the tests of the rules above read the registry. A method that
needs more than files, such as ``greedy_soup``, is not in the registry.
"""

from openvclip.merging.angles import model_stock, slerp
from openvclip.merging.dare_dropping import dare
from openvclip.merging.distances import lam_of_same_distance
from openvclip.merging.lines_scaling import lines
from openvclip.merging.matrix_merging import iso_c, iso_cts, tsv_merge
from openvclip.merging.methods import Method, Option
from openvclip.merging.monosoup_scaling import monosoup
from openvclip.merging.registry import METHODS, method
from openvclip.merging.soups import GreedySoup, average, greedy_soup
from openvclip.merging.task_arithmetic import apply_task_vectors, task_vector
from openvclip.merging.ties_merging import ties
from openvclip.weights.lambdas import by_depth, visual_only

__all__ = [
    "METHODS",
    "GreedySoup",
    "Method",
    "Option",
    "apply_task_vectors",
    "average",
    "by_depth",
    "dare",
    "greedy_soup",
    "iso_c",
    "iso_cts",
    "lam_of_same_distance",
    "lines",
    "method",
    "model_stock",
    "monosoup",
    "slerp",
    "task_vector",
    "ties",
    "tsv_merge",
    "visual_only",
]
