"""JAX functions as ONNX graphs: the operations that the networks of this package use, and no more.

jax2onnx, which knows many more, does not install beside today's Orbax (its releases from 0.13 on) or does not
know `lax.platform_dependent` (0.12). An operation that is not in the table here is refused by name.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jaxcls.errors import UserError

_OPSET, _IR_VERSION = 18, 9  # of 2023: runtimes since then read them
_INPUT = 'image'
_END = np.iinfo(np.int64).max
_BY_SHAPE = ('convert_element_type', 'broadcast_in_dim')  # besides the tables at the end


class Tensor(NamedTuple):
    """A value of the graph.

    Attributes:
      data: the array of a constant, or the name of what is computed.
      shape: as it is in the graph, which may have 1 where JAX's has been broadcast already.
    """

    data: np.ndarray | str
    shape: tuple[Any, ...]


class Graph:
    """ONNX nodes as they are added."""

    def __init__(self):
        self.nodes, self.constants, self._names = [], [], {}

    def name(self, value: Tensor | np.ndarray) -> str:
        data = value.data if isinstance(value, Tensor) else value
        if isinstance(data, str):
            return data
        if id(data) not in self._names:
            from onnx import numpy_helper

            name, shown = f'c{len(self.constants)}', np.asarray(data)
            shown = shown.astype(np.float32) if shown.dtype == jnp.bfloat16 else shown
            self.constants.append(numpy_helper.from_array(shown, name))
            self._names[id(data)] = name, data  # kept, so that no other gets its id
        return self._names[id(data)][0]

    def add(self, op: str, *inputs: Tensor | np.ndarray, **attributes) -> str:
        from onnx import helper

        name = f't{len(self.nodes)}'
        names = [self.name(value) for value in inputs]
        self.nodes.append(helper.make_node(op, names, [name], **attributes))
        return name


def convert(function: Callable, image_shape: Sequence[int], output: str = 'output'):
    """An `onnx.ModelProto` of `function`: uint8 [B, H, W, C] of any B, named 'image', to one array.

    Args:
      output: the name of what it returns.

    Raises:
      UserError: an operation that is not in OPERATIONS.
    """
    from jax import export as jax_export
    from onnx import TensorProto, checker, helper

    (batch,) = jax_export.symbolic_shape('batch')
    shape = (batch, *image_shape)
    traced = jax.jit(function).trace(jax.ShapeDtypeStruct(shape, jnp.uint8)).jaxpr
    graph = Graph()
    [result] = _inline(graph, traced, [Tensor(_INPUT, shape)])
    [out] = traced.out_avals
    graph.nodes.append(
        helper.make_node('Identity', [graph.name(_full(graph, result, out))], [output])
    )

    def described(name, dtype, dims):
        return helper.make_tensor_value_info(name, dtype, [_dimension(d) for d in dims])

    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            'jaxcls',
            [described(_INPUT, TensorProto.UINT8, shape)],
            [described(output, _onnx_type(out.dtype), out.shape)],
            graph.constants,
        ),
        opset_imports=[helper.make_opsetid('', _OPSET)],
        ir_version=_IR_VERSION,
        producer_name='jaxcls',
    )
    checker.check_model(model)
    return model


def save(model, metadata: Mapping[str, str], path: Path):
    """Writes a model with key-value pairs in its `metadata_props`."""
    import onnx

    onnx.helper.set_model_props(model, dict(metadata))
    path.write_bytes(model.SerializeToString())


def load(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """`images -> output` by ONNX Runtime, on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path.read_bytes(), providers=['CPUExecutionProvider'])
    return lambda images: session.run(None, {_INPUT: images})[0]


def _dimension(d) -> int | str:
    return d if isinstance(d, int) else str(d)


def _onnx_type(dtype) -> int:
    from onnx import helper

    # Runtimes for CPUs have no convolutions in bfloat16.
    dtype = np.float32 if dtype == jnp.bfloat16 else dtype
    return helper.np_dtype_to_tensor_dtype(np.dtype(dtype))


def _inline(graph: Graph, closed: core.ClosedJaxpr, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The equations of a jaxpr as nodes."""
    jaxpr, values = closed.jaxpr, {}
    constants = [Tensor(np.asarray(c), np.shape(c)) for c in closed.consts]
    values.update(zip(jaxpr.constvars, constants, strict=True))
    values.update(zip(jaxpr.invars, inputs, strict=True))

    def value(atom) -> Tensor:
        if isinstance(atom, core.Literal):
            return Tensor(np.asarray(atom.val, atom.aval.dtype), atom.aval.shape)
        return values[atom]

    for equation in jaxpr.eqns:
        found = _equation(graph, equation, [value(atom) for atom in equation.invars])
        values.update(zip(equation.outvars, found, strict=True))
    return [value(atom) for atom in jaxpr.outvars]


def _equation(graph: Graph, equation, inputs: list[Tensor]) -> list[Tensor]:
    name, params = equation.primitive.name, equation.params
    if name == 'platform_index':
        # lax.platform_dependent: the branch of no platform in particular.
        index = next(i for i, names in enumerate(params['platforms']) if names is None)
        return [Tensor(np.int32(index), ())]
    if name == 'cond' and not isinstance(inputs[0].data, str):
        return _inline(graph, params['branches'][int(inputs[0].data)], inputs[1:])
    for key in ('jaxpr', 'call_jaxpr', 'call'):
        if name not in ('cond', 'scan', 'while') and key in params:
            return _inline(graph, params[key], inputs)
    if _computable(equation, inputs):
        return _compute(equation, inputs)
    if name in _ELEMENTWISE:
        return [_elementwise(graph, name, inputs)]
    if name == 'convert_element_type':
        to = _onnx_type(params['new_dtype'])
        return [Tensor(graph.add('Cast', inputs[0], to=to), inputs[0].shape)]
    if name == 'broadcast_in_dim':
        return [_broadcast(graph, equation, inputs[0])]
    if name not in OPERATIONS:
        raise UserError(
            f'The network has the operation {name!r}, which is not written as ONNX here. Export it '
            'with --format=stablehlo.'
        )
    inputs = [_full(graph, x, atom.aval) for x, atom in zip(inputs, equation.invars, strict=True)]
    found = OPERATIONS[name](graph, equation, *inputs)
    [out] = equation.outvars
    return [Tensor(found, out.aval.shape)]


def _computable(equation, inputs) -> bool:
    """Whether it depends on constants alone, and computes places in arrays or has no ONNX node here.

    Not all that does: a small program for each would take long to compile, and runtimes do it too.
    """
    name = equation.primitive.name
    avals = [atom.aval for atom in (*equation.invars, *equation.outvars)]
    written = name in _ELEMENTWISE or name in OPERATIONS or name in _BY_SHAPE
    return (
        not any(isinstance(x.data, str) for x in inputs)
        and all(isinstance(d, int) for aval in avals for d in aval.shape)
        and not (written and any(jnp.issubdtype(aval.dtype, jnp.floating) for aval in avals))
    )


def _compute(equation, inputs) -> list[Tensor]:
    arrays = [
        jnp.broadcast_to(jnp.asarray(x.data), atom.aval.shape)
        for x, atom in zip(inputs, equation.invars, strict=True)
    ]
    found = equation.primitive.bind(*arrays, **equation.params)
    found = found if equation.primitive.multiple_results else [found]
    return [Tensor(np.asarray(x), x.shape) for x in found]


def _elementwise(graph: Graph, name: str, inputs: list[Tensor]) -> Tensor:
    rank = max(len(x.shape) for x in inputs)
    padded = [(1,) * (rank - len(x.shape)) + tuple(x.shape) for x in inputs]
    shape = tuple(
        next((d for d in dims if not (isinstance(d, int) and d == 1)), 1)
        for dims in zip(*padded, strict=True)
    )
    return Tensor(_ELEMENTWISE[name](graph, *inputs), shape)


def _broadcast(graph: Graph, equation, x: Tensor) -> Tensor:
    """To the rank of the result, by dimensions of 1; `_full` does the rest where it must be done."""
    shape = [1] * len(equation.params['shape'])
    for d, place in zip(x.shape, equation.params['broadcast_dimensions'], strict=True):
        shape[place] = d
    return _reshape(graph, x, tuple(shape))


def _reshape(graph: Graph, x: Tensor, shape: tuple) -> Tensor:
    if shape == tuple(x.shape):
        return x
    if not isinstance(x.data, str):
        return Tensor(x.data.reshape(shape), shape)
    dims = np.array([d if isinstance(d, int) else -1 for d in shape], np.int64)
    return Tensor(graph.add('Reshape', x, dims), shape)


def _full(graph: Graph, x: Tensor, aval) -> Tensor:
    """With all dimensions as JAX has them."""
    shape = tuple(aval.shape)
    if tuple(x.shape) == shape:
        return x
    if all(isinstance(d, int) for d in shape):
        return Tensor(graph.add('Expand', x, np.array(shape, np.int64)), shape)
    batch = graph.add('Shape', Tensor(_INPUT, ()), start=0, end=1)
    wanted = []
    for d in shape:
        if isinstance(d, int):
            wanted.append(Tensor(np.array([d], np.int64), (1,)))
        elif str(d) == 'batch':
            wanted.append(Tensor(batch, (1,)))
        else:
            raise UserError(f'A dimension of {d} is not written as ONNX. Use --format=stablehlo.')
    return Tensor(graph.add('Expand', x, Tensor(graph.add('Concat', *wanted, axis=0), ())), shape)


def _constant(x: Tensor) -> np.ndarray:
    if isinstance(x.data, str):
        raise UserError('A weight that depends on the image is not written as ONNX.')
    return x.data


def _node(op: str, **attributes) -> Callable[..., str]:
    return lambda graph, *inputs: graph.add(op, *inputs, **attributes)


def _then(*ops: str) -> Callable[..., str]:
    def chain(graph, *inputs):
        for op in ops:
            inputs = [Tensor(graph.add(op, *inputs), ())]
        return inputs[0].data

    return chain


_ELEMENTWISE: dict[str, Callable[..., str]] = {
    'add': _node('Add'), 'sub': _node('Sub'), 'mul': _node('Mul'), 'div': _node('Div'),
    'max': _node('Max'), 'min': _node('Min'), 'pow': _node('Pow'), 'neg': _node('Neg'),
    'exp': _node('Exp'), 'log': _node('Log'), 'tanh': _node('Tanh'), 'erf': _node('Erf'),
    'abs': _node('Abs'), 'sign': _node('Sign'), 'sqrt': _node('Sqrt'), 'logistic': _node('Sigmoid'),
    'rsqrt': _then('Sqrt', 'Reciprocal'), 'floor': _node('Floor'), 'round': _node('Round'),
    'eq': _node('Equal'), 'lt': _node('Less'), 'le': _node('LessOrEqual'), 'gt': _node('Greater'),
    'ge': _node('GreaterOrEqual'), 'ne': _then('Equal', 'Not'), 'and': _node('And'), 'or': _node('Or'),
    'square': lambda graph, x: graph.add('Mul', x, x),
    'erfc': lambda graph, x: graph.add('Sub', np.float32(1), Tensor(graph.add('Erf', x), ())),
    'expm1': lambda graph, x: graph.add('Sub', Tensor(graph.add('Exp', x), ()), np.float32(1)),
    'log1p': lambda graph, x: graph.add('Log', Tensor(graph.add('Add', x, np.float32(1)), ())),
    'select_n': lambda graph, which, no, yes: graph.add('Where', which, yes, no),
    'clamp': lambda graph, low, x, high: graph.add(
        'Min', Tensor(graph.add('Max', x, low), ()), high
    ),
    'copy': _node('Identity'), 'stop_gradient': _node('Identity'), 'reduce_precision': _node('Identity'),
}  # fmt: skip


def _conv(graph, equation, x, kernel):
    params = equation.params
    numbers = params['dimension_numbers']
    if params['batch_group_count'] != 1 or set(params['lhs_dilation']) != {1}:
        raise UserError('A transposed convolution is not written as ONNX. Use --format=stablehlo.')
    x = graph.add('Transpose', x, perm=numbers.lhs_spec)
    if isinstance(kernel.data, str):
        kernel = Tensor(graph.add('Transpose', kernel, perm=numbers.rhs_spec), ())
    else:
        kernel = Tensor(kernel.data.transpose(numbers.rhs_spec), ())
    y = graph.add(
        'Conv',
        Tensor(x, ()),
        kernel,
        strides=params['window_strides'],
        dilations=params['rhs_dilation'],
        group=params['feature_group_count'],
        pads=[p[side] for side in (0, 1) for p in params['padding']],
    )
    return graph.add('Transpose', Tensor(y, ()), perm=np.argsort(numbers.out_spec).tolist())


def _dot(graph, equation, x, y):
    (x_axes, y_axes), (x_batch, y_batch) = equation.params['dimension_numbers']
    if not x_batch and y_axes == (0,) and x_axes == (len(x.shape) - 1,) and len(y.shape) == 2:
        return graph.add('MatMul', x, y)
    letters = iter('abcdefghijklmnop')
    of_x = [next(letters) for _ in x.shape]
    of_y = [next(letters) for _ in y.shape]
    for i, j in (*zip(x_axes, y_axes, strict=True), *zip(x_batch, y_batch, strict=True)):
        of_y[j] = of_x[i]
    out = [of_x[i] for i in x_batch]
    out += [letter for i, letter in enumerate(of_x) if i not in (*x_axes, *x_batch)]
    out += [letter for j, letter in enumerate(of_y) if j not in (*y_axes, *y_batch)]
    return graph.add('Einsum', x, y, equation=f'{"".join(of_x)},{"".join(of_y)}->{"".join(out)}')


def _pool(graph, equation, x, *, op):
    params = equation.params
    window, strides, padding = (
        params[name] for name in ('window_dimensions', 'window_strides', 'padding')
    )
    sides = [d for d in range(len(window)) if d not in (0, len(window) - 1)]
    fixed = [d for d in range(len(window)) if d not in sides]
    if any(window[d] != 1 for d in fixed) or set(params['window_dilation']) != {1}:
        raise UserError('A pool of this kind is not written as ONNX. Use --format=stablehlo.')
    order = [0, len(window) - 1, *sides]
    attributes = {'count_include_pad': 1} if op == 'AveragePool' else {}
    y = graph.add(
        op,
        Tensor(graph.add('Transpose', x, perm=order), ()),
        kernel_shape=[window[d] for d in sides],
        strides=[strides[d] for d in sides],
        pads=[padding[d][end] for end in (0, 1) for d in sides],
        **attributes,
    )
    if op == 'AveragePool':
        y = graph.add('Mul', Tensor(y, ()), np.float32(math.prod(window)))
    return graph.add('Transpose', Tensor(y, ()), perm=np.argsort(order).tolist())


def _pad(graph, equation, x, value):
    config = equation.params['padding_config']
    if any(inner for _, _, inner in config):
        raise UserError('Padding between elements is not written as ONNX. Use --format=stablehlo.')
    pads = [edge[end] for end in (0, 1) for edge in config]
    return graph.add('Pad', x, np.array(pads, np.int64), value)


def _slice(graph, equation, x):
    params, axes = equation.params, np.arange(len(x.shape))
    ends = [d if isinstance(d, int) else _END for d in params['limit_indices']]
    arrays = (params['start_indices'], ends, axes, params['strides'] or [1] * len(axes))
    return graph.add('Slice', x, *(np.array(a, np.int64) for a in arrays))


def _reduce(graph, equation, x, *, op):
    axes = np.array(equation.params['axes'], np.int64)
    return graph.add(op, x, axes, keepdims=0)


def _gather(graph, equation, x, indices):
    """`x[:, 2:5, i]`, a window at one place, and `x[:, ::2, ::2]`, a grid of places along some axes."""
    numbers, sizes = equation.params['dimension_numbers'], equation.params['slice_sizes']
    places, axes, rank = _constant(indices), numbers.start_index_map, len(x.shape)
    gone = numbers.collapsed_slice_dims
    if places.ndim == 1 and numbers.offset_dims == tuple(range(rank - len(gone))):
        ends = [start + sizes[axis] for start, axis in zip(places.tolist(), axes, strict=True)]
        window = Tensor(graph.add('Slice', x, *map(np.int64, (places, ends, axes))), ())
        return graph.add('Squeeze', window, np.array(gone, np.int64)) if gone else window.data
    along = [_along(places, i) for i in range(len(axes))]
    usual = (
        gone == axes == tuple(sorted(axes))
        and all(sizes[a] == (1 if a in axes else x.shape[a]) for a in range(rank))
        and numbers.offset_dims == tuple(a for a in range(rank) if a not in axes)
        and places.ndim == len(axes) + 1
    )
    if not usual or any(a is None for a in along):
        raise UserError('Gathering of this kind is not written as ONNX. Use --format=stablehlo.')
    for axis, place in zip(axes, along, strict=True):
        x = Tensor(graph.add('Gather', x, np.array(place, np.int64), axis=axis), ())
    return graph.name(x)


def _along(places: np.ndarray, axis: int) -> np.ndarray | None:
    """The places along an axis of a grid of them, [..., axes]; None where they are no grid."""
    if axis >= places.ndim - 1:
        return None
    first = np.moveaxis(places[..., axis], axis, 0)
    first = first.reshape(len(first), -1)
    return first[:, 0] if (first == first[:, :1]).all() else None


OPERATIONS: dict[str, Callable[..., str]] = {
    'conv_general_dilated': _conv,
    'dot_general': _dot,
    'reduce_window_max': functools.partial(_pool, op='MaxPool'),
    'reduce_window_sum': functools.partial(_pool, op='AveragePool'),
    'reduce_sum': functools.partial(_reduce, op='ReduceSum'),
    'reduce_max': functools.partial(_reduce, op='ReduceMax'),
    'reduce_min': functools.partial(_reduce, op='ReduceMin'),
    'pad': _pad,
    'slice': _slice,
    'gather': _gather,
    'integer_pow': lambda graph, equation, x: graph.add('Pow', x, np.float32(equation.params['y'])),
    'transpose': lambda graph, equation, x: graph.add(
        'Transpose', x, perm=list(equation.params['permutation'])
    ),
    'reshape': lambda graph, equation, x: graph.name(
        _reshape(graph, x, tuple(equation.outvars[0].aval.shape))
    ),
    'squeeze': lambda graph, equation, x: graph.add(
        'Squeeze', x, np.array(equation.params['dimensions'], np.int64)
    ),
    'concatenate': lambda graph, equation, *xs: graph.add(
        'Concat', *xs, axis=equation.params['dimension']
    ),
}
