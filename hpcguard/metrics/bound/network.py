"""A network as a list of affine and elementwise steps, traced by torch.fx, in float64."""

import copy
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from hpcguard.errors import InputError
from hpcguard.metrics.bound.activations import GELU, RELU, SILU, SOFTPLUS, Activation

Linear = Callable[..., Tensor]  # rows [m, ...] of each input to rows [m, ...]


@dataclass(frozen=True)
class Step:
    """Affine: linear(inputs) + offset, its absolute weights in `magnitude`; or an activation or GroupNorm of one input.

    inputs: numbers of earlier steps, 0 is the image. terms: the most products added up for one output or, in the
    transpose, one input: what rounding errors grow with.
    """

    name: str
    inputs: tuple[int, ...]
    shape: torch.Size
    linear: Linear | None = None
    magnitude: Linear | None = None
    offset: Tensor | None = None
    terms: int = 2
    activation: Activation | None = None
    normalisation: nn.GroupNorm | None = None


def trace(model: nn.Module, shape: torch.Size) -> list[Step]:
    """The steps of `model` in eval mode for images of `shape` [C, H, W]; the last one gives the logits.

    Raises InputError, naming the layer, for what is neither affine nor a known activation.
    """
    net = copy.deepcopy(model).cpu().double().eval()
    _refuse_hooks(net)
    net = _without_max_pooling(net)
    try:
        graph = fx.symbolic_trace(net)
    except Exception as error:  # torch.fx raises what it likes, and code that looks at values anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"bound: the model cannot be traced by torch.fx ({reason}); {REMEDY}") from error
    steps = _Builder(graph, shape).build()
    _check_same(steps, net, shape)
    return steps


REMEDY = "certified bounds need a plain feed-forward net; set evaluation.bound.certified to false for the other grades"


@torch.no_grad()
def _check_same(steps: list[Step], net: nn.Module, shape: torch.Size) -> None:
    """Refuse a net that does not compute what was traced, on three random images."""
    images = torch.rand(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values = [images]
    for step in steps[1:]:
        inputs = [values[each] for each in step.inputs]
        if step.activation is not None:
            values.append(step.activation.function(inputs[0]))
        elif step.normalisation is not None:
            values.append(step.normalisation(inputs[0]))
        else:
            assert step.linear is not None and step.offset is not None
            values.append(step.linear(*inputs) + step.offset)
    answer = net(images)
    if not (values[-1] - answer).abs().max() <= 1e-6 * answer.abs().max():
        raise InputError(f"bound: the traced steps do not compute what the model does; {REMEDY}")


class MaxAsRelu(nn.Module):
    """Max-pooling without padding as max(a, b) = a + relu(b - a), which is affine steps and ReLUs."""

    def __init__(self, pool: nn.MaxPool2d) -> None:
        super().__init__()
        self.kernel, self.stride = _pair(pool.kernel_size), _pair(pool.stride)

    def forward(self, maps: Tensor) -> Tensor:
        (height, width), (down, right) = self.kernel, self.stride
        largest = None
        for i in range(height):
            for j in range(width):
                stop_i, stop_j = i - height + 1, j - width + 1
                window = maps[:, :, i : stop_i or None : down, j : stop_j or None : right]
                largest = window if largest is None else largest + torch.relu(window - largest)
        return cast(Tensor, largest)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _refuse_hooks(net: nn.Module) -> None:
    for name, layer in net.named_modules():
        if layer._forward_hooks or layer._forward_pre_hooks:
            raise InputError(f"bound: layer {name or 'model'} has hooks, unseen by a trace; {REMEDY}")


def _without_max_pooling(net: nn.Module) -> nn.Module:
    for parent in list(net.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.MaxPool2d):
                if _pair(child.padding) != (0, 0) or _pair(child.dilation) != (1, 1) or child.ceil_mode:
                    raise InputError(f"bound: layer {name}: max-pooling with padding, dilation or ceil_mode; {REMEDY}")
                setattr(parent, name, MaxAsRelu(child))
    return net


class _Record(fx.Interpreter):
    """Runs the graph, keeping every value."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph, garbage_collect_values=False)

    def run_node(self, n: fx.Node) -> Any:
        self.values = {**getattr(self, "values", {}), n: super().run_node(n)}
        return self.values[n]


class _Builder:
    def __init__(self, graph: fx.GraphModule, shape: torch.Size) -> None:
        self.graph = graph
        record = _Record(graph)
        with torch.no_grad():
            record.run(torch.zeros(2, *shape, dtype=torch.float64))
        self.values = record.values
        self.number: dict[fx.Node, int] = {}
        self.steps: list[Step] = []

    def build(self) -> list[Step]:
        for node in self.graph.graph.nodes:
            if node.op == "placeholder":
                self._add(node, Step("image", (), self.values[node].shape[1:]))
            elif node.op == "output":
                break
            elif isinstance(self.values[node], Tensor) and any(each in self.number for each in node.all_input_nodes):
                self._add(node, self._step(node))
        last = next(node for node in self.graph.graph.nodes if node.op == "output").args[0]
        if last not in self.number or self.number[last] != len(self.steps) - 1 or len(self.steps[-1].shape) != 1:
            raise InputError(f"bound: the model's answer is not one table of logits [B, K]; {REMEDY}")
        return self.steps

    def _add(self, node: fx.Node, step: Step) -> None:
        self.number[node] = len(self.steps)
        self.steps.append(step)

    def _step(self, node: fx.Node) -> Step:
        operands = [each for each in node.args if isinstance(each, fx.Node) and each in self.number]
        inputs, shape = tuple(self.number[each] for each in operands), self.values[node].shape[1:]
        name = _label(self.graph, node)
        activation = _activation(self.graph, node)
        if activation is not None and len(operands) == 1:
            return Step(name, inputs, shape, activation=activation)
        layer = self.graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if type(layer) is nn.GroupNorm and len(operands) == 1:
            return Step(name, inputs, shape, normalisation=layer)
        known = {*operands} == {each for each in node.all_input_nodes if each in self.number}
        found = self._affine(node, operands) if known and len(self.values[node]) == 2 else None
        if found is None:
            raise InputError(f"bound: layer {name} is not supported; {REMEDY}")
        linear, magnitude, terms = found
        with torch.no_grad():
            zeros = [torch.zeros(1, *self.values[each].shape[1:], dtype=torch.float64) for each in operands]
            offset = self._run(node, operands, zeros)
        return Step(name, inputs, shape, linear, magnitude, offset, terms)

    def _run(self, node: fx.Node, operands: list[fx.Node], rows: list[Tensor]) -> Tensor:
        given = dict(zip(operands, rows, strict=True))
        args = fx.node.map_arg(node.args, lambda each: given.get(each, self.values[each]))
        kwargs = fx.node.map_arg(node.kwargs, lambda each: given.get(each, self.values[each]))
        if self._reshapes(node):
            return rows[0].reshape(1, *self.values[node].shape[1:])
        if node.op == "call_module":
            return self.graph.get_submodule(str(node.target))(*args)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return cast(Callable[..., Tensor], node.target)(*args, **kwargs)

    def _reshapes(self, node: fx.Node) -> bool:
        module = self.graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        return isinstance(module, nn.Flatten) or node.target in RESHAPES

    def _affine(self, node: fx.Node, operands: list[fx.Node]) -> tuple[Linear, Linear, int] | None:
        """The linear part, the same with absolute weights, and its terms; None for what is not affine."""
        if self._reshapes(node):
            shape = self.values[node].shape[1:]
            reshape: Linear = lambda rows: rows.reshape(len(rows), *shape)  # noqa: E731
            return reshape, reshape, 1
        if node.op == "call_module":
            return _layer(self.graph.get_submodule(str(node.target)), self.values[operands[0]].shape)
        if node.target in ARITHMETIC:
            return self._arithmetic(node, operands)
        if self._averages(node):
            same: Linear = lambda rows: self._run(node, operands, [rows])  # noqa: E731
            return same, same, self.values[operands[0]].shape[2:].numel()
        return None

    def _averages(self, node: fx.Node) -> bool:
        """Functions with weights of their own that are not negative and of one input, image by image."""
        if node.target is functional.pad:
            plain = node.kwargs.get("mode", "constant") == "constant" and not node.kwargs.get("value")
            return bool(plain) and len(node.args) == 2
        if node.target is operator.getitem:
            return isinstance(node.args[1], tuple) and node.args[1][0] == slice(None)
        if node.target in ("mean", torch.mean):
            dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
            rank = self.values[cast(fx.Node, node.args[0])].ndim
            every = dims if isinstance(dims, tuple | list) else [dims]
            return dims is not None and all(cast(int, each) % rank for each in every)
        return node.target in POOLS

    def _arithmetic(self, node: fx.Node, operands: list[fx.Node]) -> tuple[Linear, Linear, int] | None:
        """Sums and differences, and products and quotients by a constant."""
        kind = ARITHMETIC[node.target]
        shapes = {self.values[each].shape for each in (node, *operands)}
        if node.kwargs or len(node.args) != 2 or len(shapes) > 1:  # torch.add's alpha, broadcast operands
            return None
        sign = -1 if kind == "-" else 1
        if kind in "+-" and len(operands) == 2:
            return (lambda one, other: one + sign * other), (lambda one, other: one + other), 2
        if kind in "+-":
            factor = torch.tensor(1 if node.args[0] in self.number else sign)
        elif len(operands) == 1 and (kind == "*" or node.args[0] is operands[0]):
            constant = node.args[1] if node.args[0] is operands[0] else node.args[0]
            value = torch.as_tensor(self.values[constant] if isinstance(constant, fx.Node) else constant).double()
            factor = value if kind == "*" else 1 / value
        else:
            return None
        return (lambda rows: rows * factor), (lambda rows: rows * factor.abs()), 4


RESHAPES = (torch.flatten, "flatten", "view", "reshape", torch.reshape, "contiguous")
POOLS = (functional.avg_pool2d, functional.adaptive_avg_pool2d)
ARITHMETIC: dict[Any, str] = {
    operator.add: "+", operator.iadd: "+", torch.add: "+", "add": "+", operator.sub: "-", operator.isub: "-",
    torch.sub: "-", operator.mul: "*", torch.mul: "*", operator.truediv: "/", torch.div: "/",
}  # fmt: skip
ACTIVATED: dict[Any, Activation] = {
    nn.ReLU: RELU, torch.relu: RELU, functional.relu: RELU, "relu": RELU, "relu_": RELU, torch.relu_: RELU,
    nn.GELU: GELU, functional.gelu: GELU, nn.SiLU: SILU, functional.silu: SILU, nn.Softplus: SOFTPLUS,
    functional.softplus: SOFTPLUS,
}  # fmt: skip


def _label(graph: fx.GraphModule, node: fx.Node) -> str:
    if node.op == "call_module":
        return f"{node.target} ({type(graph.get_submodule(str(node.target))).__name__})"
    return f"{node.name} ({getattr(node.target, '__name__', node.target)})"


def _activation(graph: fx.GraphModule, node: fx.Node) -> Activation | None:
    if node.op != "call_module":
        plain = not {*node.kwargs} - {"inplace"} and len(node.args) == 1
        return ACTIVATED.get(node.target) if plain else None
    layer = graph.get_submodule(str(node.target))
    if isinstance(layer, nn.GELU) and layer.approximate != "none":
        return None
    if isinstance(layer, nn.Softplus) and (layer.beta, layer.threshold) != (1, 20):
        return None
    return ACTIVATED.get(type(layer))


def _layer(layer: nn.Module, shape: torch.Size) -> tuple[Linear, Linear, int] | None:
    if isinstance(layer, nn.Identity | nn.Dropout | nn.Dropout2d):
        return (lambda rows: rows), (lambda rows: rows), 1
    if type(layer) in (nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.ZeroPad2d):
        return layer, layer, shape[2:].numel()
    if type(layer) is nn.Conv2d and layer.padding_mode == "zeros":
        terms = max(layer.in_channels, layer.out_channels) * layer.weight[0, 0].numel()
    elif type(layer) is nn.Linear:
        terms = max(layer.weight.shape)
    elif type(layer) is nn.BatchNorm2d and layer.running_mean is not None:
        terms = 8
    else:
        return None
    return _unbiased(layer), _unbiased(layer, absolute=True), terms


def _unbiased(layer: nn.Module, absolute: bool = False) -> nn.Module:
    """The linear part of a layer, or the same with absolute weights."""
    linear = copy.deepcopy(layer).requires_grad_(False)
    for name, values in [*linear.named_parameters(), *linear.named_buffers()]:
        if name in ("bias", "running_mean"):
            values.zero_()
        elif name == "weight" and absolute:
            values.abs_()
    return linear
