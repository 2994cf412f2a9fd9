"""Change the program of an exported model: leave out what it does not use, and store 8-bit weights.

The functions change a ``torch.export.ExportedProgram`` in place, and no tensor of the model.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

_SUFFIXES = ("_int8", "_scale")


def remove_unused(program: Any) -> None:
    """Remove the weights that the program does not use, and the example of the inputs.

    A program holds all weights of its model. The program of an image tower would hold the weights
    of the text tower too. The source lines of the model, with the paths of its files, are removed.

    Args:
        program: a ``torch.export.ExportedProgram``.
    """
    specs = program.graph_signature.input_specs
    for node in list(program.graph.nodes):
        node.meta.pop("stack_trace", None)
        if node.op != "placeholder" or node.users:
            continue
        spec = next(spec for spec in specs if spec.arg.name == node.name)
        if spec.target is not None:
            program.graph.erase_node(node)
            specs.remove(spec)
            program.state_dict.pop(spec.target, None)
            program.constants.pop(spec.target, None)
    for name, value in program.state_dict.items():
        if isinstance(value, nn.Parameter):  # the features of an exported model need no gradients
            program.state_dict[name] = nn.Parameter(value.detach(), requires_grad=False)
    program.graph_module.recompile()
    program.example_inputs = None


def quantise_linear(program: Any) -> None:
    """Store the weights of linear layers as 8-bit integers, with a scale for each output.

    torchao chooses integers and scales (``Int8WeightOnlyConfig``). The program multiplies them when
    it runs, and computes in float32. Embeddings, convolutions, biases and norms are not changed.

    Args:
        program: a ``torch.export.ExportedProgram`` that :func:`remove_unused` has changed.
    """
    by_node = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    weights = {
        node.args[1]
        for node in program.graph.nodes
        if node.op == "call_function" and node.target is torch.ops.aten.linear.default
    }
    for node in sorted((w for w in weights if w.op == "placeholder"), key=lambda w: w.name):
        spec = by_node[node.name]
        weight = program.state_dict.get(spec.target)
        if weight is None or weight.ndim != 2 or not weight.is_floating_point():
            continue
        _replace(program, node, spec, _eight_bits(weight))
    program.graph_module.recompile()


def _eight_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the integers ``[out, in]`` of a weight and the scale ``[out, 1]`` of each output."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach().float(), requires_grad=False)
    quantize_(layer, Int8WeightOnlyConfig(version=2))
    stored: Any = layer.weight
    return stored.qdata, stored.scale.float()


def _replace(program: Any, node: Any, spec: Any, parts: tuple[Tensor, Tensor]) -> None:
    """Replace a weight by the product of two new weights: the integers and the scales."""
    specs, graph = program.graph_signature.input_specs, program.graph
    place = specs.index(spec)
    made = []
    for number, (suffix, value) in enumerate(zip(_SUFFIXES, parts, strict=True)):
        with graph.inserting_before(node):
            new = graph.placeholder(f"{node.name}{suffix}")
        mode = node.meta["val"].fake_mode
        new.meta["val"] = mode.from_tensor(value, static_shapes=True)
        argument = type(spec.arg)(name=new.name)
        target = f"{spec.target}{suffix}"
        specs.insert(place + number, type(spec)(spec.kind, argument, target, spec.persistent))
        program.state_dict[target] = nn.Parameter(value, requires_grad=False)
        made.append(new)
    _multiply(program, node, *made)
    specs.remove(spec)
    graph.erase_node(node)
    del program.state_dict[spec.target]


def _multiply(program: Any, node: Any, integers: Any, scales: Any) -> None:
    graph = program.graph
    first = next(n for n in graph.nodes if n.op != "placeholder")
    aten = torch.ops.aten
    with graph.inserting_before(first):
        floats = graph.call_function(aten.to.dtype, (integers, torch.float32))
        weight = graph.call_function(aten.mul.Tensor, (floats, scales))
    floats.meta["val"] = integers.meta["val"].to(torch.float32)
    weight.meta["val"] = floats.meta["val"] * scales.meta["val"]
    node.replace_all_uses_with(weight)


def weight_bytes(program: Any) -> int:
    """Return the size of all weights and constants of a program, in bytes."""
    tensors = [*program.state_dict.values(), *program.constants.values()]
    sizes = (t.element_size() * math.prod(t.shape) for t in tensors if isinstance(t, Tensor))
    return sum(sizes)
