"""One linear map per group of rows (the experts of MegaBlocks, Gale et al., arXiv 2211.15841)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from effjax.core import numerics, spmd, trees
from effjax.core.known import is_size
from effjax.core.typing import Array, Float, Int, PyTree, Size
from effjax.core.weights import Weight, materialize, offset, product, within
from effjax.kernels.grouped_matmul import fused, reference, tiles
from effjax.kernels.grouped_matmul.groups import Groups, group_of_row
from effjax.kernels.quantized_matmul import as_it_lies

IMPLEMENTATIONS = (None, "tiles", "ragged", *fused.KERNELS, "reference")


def grouped_linear(
  x: Float[Array, "M D"],
  w,
  group_sizes: Int[Array | np.ndarray, "E"] | Int[Array | np.ndarray, "P E"] | Groups,
  bias: Float[Array, "E F"] | None = None,
  *,
  implementation: str | None = None,
) -> Float[Array, "M F"]:
  """out[m] = x[m] w[e] + bias[e], where e is the group that row m lies in.

  Rows are sorted by group: group 0 holds the first group_sizes[0] rows, and so on. Rows past the
  last group give zero, and zero gradient, whatever is in them; so does a group without rows. The
  work is that of a dense product of the same M, whatever E. Computed in the type of `x`;
  derivatives are those of reverse mode.

  Args:
    x: [M, D], sorted by group.
    w: an array [E, D, F], or a `Weight` of that shape; gradients reach its floating-point leaves.
    group_sizes: [E], non-negative, of sum at most M, which traced ones have to keep to; or [P, E],
      when x is P parts of M / P rows laid end to end, each sorted by itself; or `Groups`, which may
      lie otherwise. In `spmd.rows_split` each device multiplies its own.
    bias: [E, F], or None.
    implementation: "tiles" loops over tiles of rows and uses any `Weight` as it is; "gpu" and
      "tpu" are kernels of NVIDIA GPUs and of TPUs, which multiply what is packed as it lies, and
      leave types and weights that they do not know to "ragged"; that is `jax.lax.ragged_dot` on
      arrays, those of a `Weight` as its `product` says, which costs E times as much on CPUs and
      GPUs, and for groups with a capacity one batched product; "reference" is the dense definition.
      None compiles tiles for CPUs, and the kernels of this process's devices, ragged where these
      are several that XLA splits the operands over.

  Raises:
    ValueError: when shapes do not fit, for sizes that are no integers or, where they are known,
      negative or of more rows than there are, or for another implementation.

  Example:
    >>> w = jnp.array([[[1.0]], [[10.0]]])
    >>> grouped_linear(jnp.ones((4, 1)), w, jnp.array([1, 2])).tolist()
    [[1.0], [10.0], [10.0], [0.0]]
  """
  groups = Groups.of(group_sizes)
  _check(x, w, groups, bias, implementation)

  def parts(w, x, sizes, bias):
    on_parts = functools.partial(_on_parts, implementation, groups)
    return spmd.map_rows(on_parts, (x, sizes), (w, bias), groups.specs(w, bias))

  return within(w, parts, x, groups.sizes, bias)


def _on_parts(
  implementation: str | None, groups: Groups, rows: tuple[Array, Array], params: PyTree
) -> Array:
  """The product of parts laid end to end: nearly always one."""
  x, sizes = rows
  if x.shape[0] == 0:
    return jnp.zeros((0, params[0].shape[2]), x.dtype)
  sizes = groups.own(sizes)
  on_part = lambda x, sizes: _on_part(implementation, groups.capacity, x, sizes, params)
  if sizes.shape[0] == 1:
    return on_part(x, sizes[0])
  parts = jax.vmap(on_part)(x.reshape(sizes.shape[0], -1, x.shape[1]), sizes)
  return parts.reshape(x.shape[0], -1)


def _on_part(
  implementation: str | None, capacity: Size | None, x: Array, sizes: Array, params: PyTree
) -> Array:
  if implementation == "reference" or not _fills(capacity, x, sizes):
    multiply = lambda x, w, sizes: reference.grouped_matmul(x, materialize(w), sizes, capacity)
    return _dense(multiply, capacity, x, params, sizes)
  if isinstance(params[0], Weight) and params[0].by_parts:
    multiply = lambda x, w, sizes: _on_part(implementation, capacity, x, sizes, (w, None))
    return _dense(multiply, capacity, x, params, sizes)
  rows = x.shape[0]
  if not is_size(rows):  # so that it is known that there are as many as a tile has
    x = jnp.pad(x, ((0, tiles.HIGHEST), (0, 0)))
  operands = (x, _floats(params), _others(params), sizes)
  return _grouped(implementation, capacity, *numerics.vary_alike(operands, operands))[:rows]


def _fills(capacity: Size | None, x: Array, sizes: Array) -> bool:
  """Whether each group has rows of its own, where it may be that some share theirs."""
  return capacity is None or x.shape[0] == sizes.shape[0] * capacity


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _grouped(
  implementation: str | None, capacity: Size | None, x: Array, floats, others, group_sizes: Array
) -> Array:
  return _run(implementation, capacity, 0, x, floats, others, group_sizes)


def _forward(implementation, capacity, *operands):
  return _grouped(implementation, capacity, *operands), operands


def _backward(implementation, capacity, operands, dy):
  *_, others, group_sizes = operands
  dx, d_floats = _run(implementation, capacity, 1, *operands, dy)
  return dx, d_floats, jax.tree.map(_float0, others), _float0(group_sizes)


_grouped.defvjp(_forward, _backward)


def _run(implementation: str | None, capacity: Size | None, which: int, *operands):
  """The product, or its gradients for `which` = 1."""
  ways = {name: way[which] for name, way in _ways(capacity).items()}
  if implementation is not None:
    return ways[implementation](*operands)
  kernels = {platform: ways[name] for platform, name in _fused(operands).items()}
  return lax.platform_dependent(*operands, cpu=ways["tiles"], default=ways["ragged"], **kernels)


def _fused(operands: PyTree) -> dict[str, str]:
  """The kernels of this process's devices by XLA's platform; none where XLA splits operands."""
  x, *_ = operands
  split = jax.device_count() > 1 and not jax.typeof(x).manual_axis_type.varying
  if split or spmd.explicit_mesh(operands) is not None:
    return {}
  return {"gpu": {"cuda": "gpu"}, "tpu": {"tpu": "tpu"}}.get(jax.default_backend(), {})


def _ragged(capacity: Size | None, x, params, group_sizes):
  def multiply(x: Array, w: Any, sizes: Array) -> Array:
    w = materialize(w).astype(x.dtype)
    if capacity is None:
      return lax.ragged_dot(x, w, sizes)
    return jnp.matmul(x.reshape(w.shape[0], capacity, -1), w).reshape(x.shape[0], -1)

  return _dense(multiply, capacity, x, params, group_sizes)


def _by_kernels(name: str, capacity: Size | None, x, params, group_sizes):
  """By the kernels of a platform, and what these cannot multiply by ragged products.

  Rows with a capacity are all multiplied, arrays by one batched product.
  """

  def multiply(x: Array, w: Any, sizes: Array) -> Array:
    batched = capacity is not None and not isinstance(w, Weight)
    lying = None if batched else as_it_lies(w)
    if lying is None or not fused.fits(name, x, lying):
      return _ragged(capacity, x, (w, None), sizes)
    full = sizes if capacity is None else jnp.full_like(sizes, capacity)
    return fused.product(name, x, lying, full)

  if capacity is not None:
    return _dense(multiply, capacity, x, params, group_sizes)
  w, bias = params
  y = product(x, w, lambda x, w: multiply(x, w, group_sizes))
  return _biased(y, w, bias, group_of_row(group_sizes, x.shape[0]))


def _dense(multiply, capacity: Size | None, x, params, group_sizes):
  """`multiply` on the parts of the weight, the bias of each row, and zero where no group is."""
  w, bias = params
  group = group_of_row(group_sizes, x.shape[0], capacity)
  inside = (group < group_sizes.shape[0])[:, None]
  sizes = group_sizes.astype(jnp.int32)
  y = product(jnp.where(inside, x, jnp.zeros_like(x)), w, lambda x, w: multiply(x, w, sizes))
  return jnp.where(inside, _biased(y, w, bias, group), jnp.zeros_like(y))


def _biased(y, w, bias, group):
  """y + the bias of each row's group."""
  if bias is None:
    return y
  take = functools.partial(jnp.take, axis=0, mode="fill", fill_value=0)  # 0 where no group is
  return y + take(offset(w, bias).astype(y.dtype), group)


def _both(run):
  """`run(x, params, group_sizes)` and its gradients, one of a batch after the other.

  Under vmap loops of traced length would run as long as the longest and copy every array in each
  turn, and `lax.ragged_dot` has no rule for what is asked here.
  """

  @jax.custom_batching.sequential_vmap
  def forward(x, floats, others, group_sizes):
    return run(x, trees.merge(floats, others), group_sizes)

  @jax.custom_batching.sequential_vmap
  def backward(x, floats, others, group_sizes, dy):
    apply = lambda x, floats: forward.fun(x, floats, others, group_sizes)
    return jax.vjp(apply, x, floats)[1](dy)

  return forward, backward


@functools.cache
def _ways(capacity: Size | None) -> dict:
  """Name of an implementation → the product and its gradients."""
  tiled = (functools.partial(tile, capacity) for tile in (tiles.forward, tiles.backward))
  kernels = {name: functools.partial(_by_kernels, name, capacity) for name in fused.KERNELS}
  return {
    "tiles": tuple(map(jax.custom_batching.sequential_vmap, tiled)),
    "ragged": _both(functools.partial(_ragged, capacity)),
    **{name: _both(run) for name, run in kernels.items()},
  }


def _floats(params: PyTree) -> PyTree:
  return jax.tree.map(lambda leaf: leaf if _is_float(leaf) else None, params)


def _others(params: PyTree) -> PyTree:
  return jax.tree.map(lambda leaf: None if _is_float(leaf) else leaf, params)


def _is_float(leaf: Array) -> bool:
  return jnp.issubdtype(leaf.dtype, jnp.floating)


def _float0(leaf: Array) -> np.ndarray:
  return np.zeros(leaf.shape, jax.dtypes.float0)


def _check(x, w, groups: Groups, bias, implementation) -> None:
  if len(w.shape) != 3 or x.ndim != 2 or x.shape[1] != w.shape[1]:
    given = f"x {x.shape}, w {tuple(w.shape)}"
    raise ValueError(f"grouped_linear: {given}; allowed: x [M, D], w [E, D, F]")
  experts, _, width = w.shape
  if groups.sizes.shape[-1] != experts or x.shape[0] % groups.sizes.shape[0]:
    allowed = f"({experts},), or (P, {experts}) with a P that divides {x.shape[0]} rows"
    sizes = groups.sizes.shape[groups.sizes.shape[0] == 1 :]
    raise ValueError(f"grouped_linear: group_sizes {sizes}; allowed: {allowed}")
  groups.check(x.shape[0], "grouped_linear")
  if bias is not None and bias.shape != (experts, width):
    raise ValueError(f"grouped_linear: bias {bias.shape}; allowed: ({experts}, {width})")
  elsewhere = set(fused.KERNELS) - {jax.default_backend()}
  names = tuple(name for name in IMPLEMENTATIONS if name not in elsewhere)
  if implementation not in names:
    allowed = f"one of {names} on {jax.default_backend()}"
    raise ValueError(f"grouped_linear: implementation={implementation!r}; allowed: {allowed}")
