"""ONNX as torch: a graph of torch functions (torch.fx) that computes what an ONNX file says.

Strict: an operator, an attribute or an opset that is not written down here is refused by name, so that nothing is
computed in another way than the file means. What is here covers the networks of the platform's own recipes: layers of
convolution, of BERT, of tables.

Integers that describe shapes stay Python numbers (`Host`) and never become tensors, so that `torch.compile` sees shapes
and not data. Semantics are those of the ONNX operator specification, opset 13 to 24.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, fx, nn
from torch.nn import functional

from mlmesh_inference.engines.base import EngineError

OPSETS: Final = range(13, 25)
Host: TypeAlias = int | tuple[int, ...]
Value: TypeAlias = Tensor | Host

_DTYPES: Final[dict[int, torch.dtype]] = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.DOUBLE: torch.float64,
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.BFLOAT16: torch.bfloat16,
    onnx.TensorProto.INT8: torch.int8,
    onnx.TensorProto.UINT8: torch.uint8,
    onnx.TensorProto.INT16: torch.int16,
    onnx.TensorProto.INT32: torch.int32,
    onnx.TensorProto.INT64: torch.int64,
    onnx.TensorProto.BOOL: torch.bool,
}
_HOST_ELEMENTS_MAX: Final = 64
_END: Final = 1 << 62


def _tensor(value: Value, like: Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.int64, device=like.device)


def _list(value: Value) -> tuple[int, ...]:
    """Numbers of a shape."""
    if isinstance(value, Tensor):
        raise EngineError("a shape depends on data")
    return value if isinstance(value, tuple) else (value,)


def _elementwise(
    function: Callable[..., Tensor], host: Callable[[int, int], int] | None = None
) -> Callable[..., Value]:
    def apply(left: Value, right: Value) -> Value:
        if not isinstance(left, Tensor) and not isinstance(right, Tensor):
            if host is None:
                raise EngineError("an operator on shapes that is not translated")
            ones, others = _list(left), _list(right)
            size = max(len(ones), len(others))
            pairs = zip(ones * (size // len(ones)), others * (size // len(others)), strict=True)
            result = tuple(host(one, other) for one, other in pairs)
            return result[0] if isinstance(left, int) and isinstance(right, int) else result
        like = left if isinstance(left, Tensor) else right
        assert isinstance(like, Tensor)  # noqa: S101  for the reader
        return function(_tensor(left, like), _tensor(right, like))

    return apply


def _divide(left: Tensor, right: Tensor) -> Tensor:
    return left / right if left.is_floating_point() else torch.div(left, right, rounding_mode="trunc")


def _folded(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """An operator of any number of inputs, as one of two."""

    def apply(first: Tensor, *others: Tensor) -> Tensor:
        for other in others:
            first = function(first, other)
        return first

    return apply


def _identity(x: Value) -> Value:
    return x


def _dropout(x: Tensor, _ratio: Any = None, _training: Any = None, *, seed: int = 0) -> Tensor:  # noqa: ARG001
    return x


def _cast(x: Value, *, to: torch.dtype, saturate: int = 1) -> Value:  # noqa: ARG001  saturation is of FP8 only
    if isinstance(x, Tensor):
        return x.to(to)
    return x if to is torch.int64 else torch.tensor(x).to(to)


def _matmul(left: Tensor, right: Tensor) -> Tensor:
    return torch.matmul(left, right)


def _gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,  # noqa: N803  the operator's own names
    transB: int = 0,  # noqa: N803
) -> Tensor:
    left, right = (a.t() if transA else a), (b.t() if transB else b)
    if c is None:
        return alpha * (left @ right)
    return torch.addmm(c, left, right, beta=beta, alpha=alpha)


def _padding(x: Tensor, pads: Sequence[int], value: float) -> tuple[Tensor, list[int]]:
    """Padding as torch's layers take it; what is not the same on both sides is added before."""
    dims = len(pads) // 2
    begins, ends = list(pads[:dims]), list(pads[dims:])
    if begins == ends:
        return x, begins
    around = [side for pair in zip(reversed(begins), reversed(ends), strict=True) for side in pair]
    return functional.pad(x, around, value=value), [0] * dims


def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] = (),
    group: int = 1,
    kernel_shape: Sequence[int] = (),  # noqa: ARG001  the weight's own
    pads: Sequence[int] = (),
    strides: Sequence[int] = (),
) -> Tensor:
    _explicit(auto_pad)
    dims = weight.dim() - 2
    x, padding = _padding(x, pads or [0] * (2 * dims), 0.0)
    function = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}[dims]
    return function(x, weight, bias, tuple(strides or [1] * dims), padding, tuple(dilations or [1] * dims), group)


def _max_pool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Sequence[int] = (),
    pads: Sequence[int] = (),
    storage_order: int = 0,  # noqa: ARG001  of the second output only
    strides: Sequence[int] = (),
) -> Tensor:
    _explicit(auto_pad)
    dims = len(kernel_shape)
    x, padding = _padding(x, pads or [0] * (2 * dims), -math.inf)
    function = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}[dims]
    return function(
        x,
        tuple(kernel_shape),
        tuple(strides or [1] * dims),
        tuple(padding),
        tuple(dilations or [1] * dims),
        bool(ceil_mode),
    )


def _explicit(auto_pad: str) -> None:
    if auto_pad not in ("", "NOTSET"):
        raise EngineError(f"auto_pad {auto_pad} is not translated")


def _global_average(x: Tensor) -> Tensor:
    return x.mean(dim=tuple(range(2, x.dim())), keepdim=True)


def _batch_norm(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,  # noqa: ARG001  of training only
    training_mode: int = 0,
) -> Tensor:
    if training_mode:
        raise EngineError("BatchNormalization in training is not translated")
    return functional.batch_norm(x, mean, variance, scale, bias, eps=epsilon)


def _layer_norm(
    x: Tensor, scale: Tensor, bias: Tensor | None = None, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    if stash_type != 1:
        raise EngineError(f"LayerNormalization with stash_type {stash_type} is not translated")
    return functional.layer_norm(x, x.shape[axis:], scale, bias, epsilon)


def _softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    return torch.softmax(x, axis)


def _log_softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    return torch.log_softmax(x, axis)


def _gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    return functional.gelu(x, approximate=approximate)


def _leaky_relu(x: Tensor, *, alpha: float = 0.01) -> Tensor:
    return functional.leaky_relu(x, alpha)


def _clip(x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    return x if low is None and high is None else torch.clamp(x, low, high)


def _shape(x: Value, *, start: int = 0, end: int = _END) -> Host:
    if not isinstance(x, Tensor):
        raise EngineError("the shape of a shape is not translated")
    return tuple(x.shape[start:end])


def _reshape(x: Value, shape: Value, *, allowzero: int = 0) -> Value:
    wanted = _list(shape)
    if not isinstance(x, Tensor):
        return x if wanted in ((-1,), (1,)) else _refuse_host("Reshape")
    return x.reshape([x.shape[place] if size == 0 and not allowzero else size for place, size in enumerate(wanted)])


def _flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    axis = axis % (x.dim() + 1)
    return x.reshape(math.prod(x.shape[:axis]), -1) if axis else x.reshape(1, -1)


def _transpose(x: Tensor, *, perm: Sequence[int] = ()) -> Tensor:
    return x.permute(tuple(perm) or tuple(reversed(range(x.dim()))))


def _unsqueeze(x: Value, axes: Value) -> Value:
    places = _list(axes)
    if not isinstance(x, Tensor):
        return (x,) if isinstance(x, int) and places == (0,) else _refuse_host("Unsqueeze")
    rank = x.dim() + len(places)
    for place in sorted(place % rank for place in places):
        x = x.unsqueeze(place)
    return x


def _squeeze(x: Value, axes: Value | None = None) -> Value:
    if not isinstance(x, Tensor):
        return x[0] if isinstance(x, tuple) and len(x) == 1 else _refuse_host("Squeeze")
    return x.squeeze() if axes is None else x.squeeze(tuple(place % x.dim() for place in _list(axes)))


def _expand(x: Tensor, shape: Value) -> Tensor:
    shapes: Callable[..., torch.Size] = torch.broadcast_shapes
    return torch.broadcast_to(x, shapes(x.shape, _list(shape)))


def _concat(*values: Value, axis: int) -> Value:
    tensors = [value for value in values if isinstance(value, Tensor)]
    if not tensors:
        return tuple(number for value in values for number in _list(value))
    return torch.cat([_tensor(value, tensors[0]) for value in values], axis)


def _slice(x: Value, starts: Value, ends: Value, axes: Value | None = None, steps: Value | None = None) -> Value:
    begins, stops = _list(starts), _list(ends)
    places = range(len(begins)) if axes is None else _list(axes)
    strides = (1,) * len(begins) if steps is None else _list(steps)
    if min(strides, default=1) < 1:
        raise EngineError("Slice with a negative step is not translated")
    if not isinstance(x, Tensor):
        return _list(x)[begins[0] : stops[0] : strides[0]]
    cut = [slice(None)] * x.dim()
    for place, begin, stop, stride in zip(places, begins, stops, strides, strict=True):
        cut[place] = slice(begin, min(stop, _END), stride)
    return x[tuple(cut)]


def _gather(x: Value, index: Value, *, axis: int = 0) -> Value:
    if not isinstance(x, Tensor):
        numbers = _list(x)
        return tuple(numbers[each] for each in index) if isinstance(index, tuple) else numbers[operator.index(index)]
    if isinstance(index, int):
        return x.select(axis, index)
    indexes = _tensor(index, x)
    size = x.shape[axis]
    indexes = torch.where(indexes < 0, indexes + size, indexes)
    if axis == 0 and x.dim() == 2:
        return functional.embedding(indexes, x)
    axis = axis % x.dim()
    return x.index_select(axis, indexes.reshape(-1)).reshape(*x.shape[:axis], *indexes.shape, *x.shape[axis + 1 :])


def _where(condition: Tensor, left: Value, right: Value) -> Tensor:
    return torch.where(condition, _tensor(left, condition), _tensor(right, condition))


def _reduction(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def apply(x: Tensor, axes: Value | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
        if axes is None and noop_with_empty_axes:
            return x
        dims = tuple(range(x.dim())) if axes is None else _list(axes)
        return function(x, dim=dims, keepdim=bool(keepdims))

    return apply


def _l2(x: Tensor, *, dim: tuple[int, ...], keepdim: bool) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dim=dim, keepdim=keepdim)
    return norm


def _refuse_host(name: str) -> Host:
    raise EngineError(f"{name} of a shape is not translated")


OPERATORS: Final[dict[str, Callable[..., Any]]] = {
    "Abs": torch.abs, "And": torch.logical_and, "Erf": torch.erf, "Exp": torch.exp, "Floor": torch.floor,
    "IsNaN": torch.isnan, "Log": torch.log, "Neg": torch.neg, "Not": torch.logical_not, "Or": torch.logical_or,
    "Reciprocal": torch.reciprocal, "Relu": torch.relu, "Sigmoid": torch.sigmoid, "Sqrt": torch.sqrt,
    "Tanh": torch.tanh,
    "Add": _elementwise(torch.add, operator.add), "Sub": _elementwise(torch.sub, operator.sub),
    "Mul": _elementwise(torch.mul, operator.mul), "Div": _elementwise(_divide, operator.floordiv),
    "Pow": _elementwise(torch.pow), "Equal": _elementwise(torch.eq),
    "Greater": _elementwise(torch.gt), "GreaterOrEqual": _elementwise(torch.ge),
    "Less": _elementwise(torch.lt), "LessOrEqual": _elementwise(torch.le),
    "Max": _folded(torch.maximum), "Min": _folded(torch.minimum),
    "BatchNormalization": _batch_norm, "Cast": _cast, "Clip": _clip, "Concat": _concat, "Conv": _conv,
    "Dropout": _dropout, "Expand": _expand, "Flatten": _flatten, "Gather": _gather, "Gelu": _gelu, "Gemm": _gemm,
    "GlobalAveragePool": _global_average, "Identity": _identity, "LayerNormalization": _layer_norm,
    "LeakyRelu": _leaky_relu, "LogSoftmax": _log_softmax, "MatMul": _matmul, "MaxPool": _max_pool,
    "ReduceL2": _reduction(_l2), "ReduceMax": _reduction(torch.amax), "ReduceMean": _reduction(torch.mean),
    "ReduceMin": _reduction(torch.amin), "ReduceSum": _reduction(torch.sum), "Reshape": _reshape, "Shape": _shape,
    "Slice": _slice, "Softmax": _softmax, "Squeeze": _squeeze, "Transpose": _transpose, "Unsqueeze": _unsqueeze,
    "Where": _where,
}  # fmt: skip


def translate(model: onnx.ModelProto, *, compute: torch.dtype) -> fx.GraphModule:
    """The model as a module: tensors in the order of its inputs in, a tuple in the order of its outputs out.

    Args:
        compute: dtype of everything that is FP32 in the file, constants and casts included; inputs must have it.

    Raises EngineError that names what is not translated.
    """
    _check(model)
    root, graph = nn.Module(), fx.Graph()
    values: dict[str, Any] = {"": None}
    for number, constant in enumerate(model.graph.initializer):
        values[constant.name] = _constant(root, graph, constant, f"weight_{number}", compute)
    for number, each in enumerate(model.graph.input):
        if each.name not in values:
            values[each.name] = graph.placeholder(f"input_{number}")
    for number, node in enumerate(model.graph.node):
        if node.op_type == "Constant":
            value = node.attribute[0]
            if value.name != "value":
                raise EngineError(f"a Constant with {value.name} is not translated")
            values[node.output[0]] = _constant(root, graph, value.t, f"constant_{number}", compute)
            continue
        function = OPERATORS[node.op_type]
        arguments = tuple(values[name] for name in node.input)
        values[node.output[0]] = graph.call_function(function, arguments, _attributes(node, function, compute))
    graph.output(tuple(values[each.name] for each in model.graph.output))
    graph.eliminate_dead_code()
    module = fx.GraphModule(root, graph)
    module.eval()
    return module


def _check(model: onnx.ModelProto) -> None:
    opset = next((each.version for each in model.opset_import if each.domain in ("", "ai.onnx")), 0)
    if opset not in OPSETS:
        raise EngineError(f"opset {opset} is not translated, only {OPSETS.start} to {OPSETS.stop - 1}")
    known = OPERATORS.keys() | {"Constant"}
    unknown = {
        node.op_type if not node.domain else f"{node.domain}.{node.op_type}"
        for node in model.graph.node
        if node.domain not in ("", "ai.onnx") or node.op_type not in known
    }
    unknown |= {
        f"{node.op_type} with {len(node.output)} outputs"
        for node in model.graph.node
        if node.op_type != "Dropout" and sum(map(bool, node.output)) > 1
    }
    if unknown:
        raise EngineError(f"operators that are not translated: {', '.join(sorted(unknown))}")


def _constant(
    root: nn.Module, graph: fx.Graph, proto: onnx.TensorProto, name: str, compute: torch.dtype
) -> fx.Node | Host:
    if proto.data_type not in _DTYPES:
        raise EngineError(f"a constant of type {onnx.TensorProto.DataType.Name(proto.data_type)} is not translated")
    size = math.prod(proto.dims)
    if proto.data_type == onnx.TensorProto.INT64 and len(proto.dims) < 2 and size <= _HOST_ELEMENTS_MAX:
        numbers = numpy_helper.to_array(proto).tolist()
        return tuple(numbers) if isinstance(numbers, list) else int(numbers)
    dtype = _DTYPES[proto.data_type]
    array = numpy_helper.to_array(proto)
    if dtype is torch.bfloat16:
        tensor = torch.from_numpy(array.view("uint16").copy()).view(torch.bfloat16)
    else:
        tensor = torch.from_numpy(array.copy())
    root.register_buffer(name, tensor.to(compute) if dtype is torch.float32 else tensor)
    return graph.get_attr(name)


def _attributes(node: onnx.NodeProto, function: Callable[..., Any], compute: torch.dtype) -> dict[str, Any]:
    if not node.attribute:
        return {}
    try:
        known = set(inspect.signature(function).parameters)
    except ValueError:  # torch's own functions; none of those here has attributes
        known = set()
    result: dict[str, Any] = {}
    for attribute in node.attribute:
        if attribute.name not in known:
            raise EngineError(f"attribute {attribute.name} of {node.op_type} is not translated")
        value = onnx.helper.get_attribute_value(attribute)
        if attribute.name == "to":
            if value not in _DTYPES:
                raise EngineError(f"Cast to {onnx.TensorProto.DataType.Name(value)} is not translated")
            value = compute if _DTYPES[value] is torch.float32 else _DTYPES[value]
        result[attribute.name] = value.decode() if isinstance(value, bytes) else value
    return result
