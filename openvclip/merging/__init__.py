"""Merging of weights: the published methods, each a function on state dicts.

All follow the rules of :func:`openvclip.interpolate`: entries are matched by plain names, the
result is new memory without a graph, half precision is computed in float32 and rounded once.
Integer and boolean entries are carried from the first state dict that a function is given (of
:func:`slerp`, from ``theta_b``, as in ``interpolate``). Complex entries count as pairs of real
numbers. Every method but ``ties(trim="model")`` and ``greedy_soup`` looks at one entry at a time,
so that it gives the same for state dicts of one entry each.
"""

from openvclip.merging.angles import model_stock, slerp
from openvclip.merging.soups import GreedySoup, average, greedy_soup
from openvclip.merging.tasks import apply_task_vectors, dare, lines, task_vector, ties
from openvclip.weights.lambdas import by_depth, visual_only

__all__ = [
    "GreedySoup",
    "apply_task_vectors",
    "average",
    "by_depth",
    "dare",
    "greedy_soup",
    "lines",
    "model_stock",
    "slerp",
    "task_vector",
    "ties",
    "visual_only",
]
