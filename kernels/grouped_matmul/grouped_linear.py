"""One linear map per group of rows (the experts of MegaBlocks, Gale et al., arXiv 2211.15841)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from effjax.core import numerics, spmd, trees
from effjax.core.known import is_size, known
from effjax.core.typing import Array, Dim, Float, Int, PyTree
from effjax.core.weights import Weight, materialize, offset, product, within
from effjax.kernels.grouped_matmul import fused, reference, tiles
from effjax.kernels.quantized_matmul import as_it_lies

IMPLEMENTATIONS = (None, "tiles", "ragged", *fused.KERNELS, "reference")


def grouped_linear(
  x: Float[Array, "M D"],
  w,
  group_sizes: Int[Array | np.ndarray, "E"] | Int[Array | np.ndarray, "P E"],
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
      when x is P parts of M / P rows laid end to end, each sorted by itself. In `spmd.rows_split`
      each device multiplies its own.
    bias: [E, F], or None.
    implementation: "tiles" loops over tiles of rows and uses any `Weight` as it is; "gpu" and
      "tpu" are kernels of NVIDIA GPUs and of TPUs, which multiply what is packed as it lies, and
      leave types and weights that they do not know to "ragged"; that is `jax.lax.ragged_dot` on
      arrays, those of a `Weight` as its `product` says, which costs E times as much on CPUs and
      GPUs; "reference" is the dense definition. None compiles tiles for CPUs, and the kernels of
      this process's devices, ragged where these are several that XLA splits the operands over.

  Raises:
    ValueError: when shapes do not fit, for sizes that are no integers or, where they are known,
      negative or of more rows than there are, or for another implementation.

  Example:
    >>> w = jnp.array([[[1.0]], [[10.0]]])
    >>> grouped_linear(jnp.ones((4, 1)), w, jnp.array([1, 2])).tolist()
    [[1.0], [10.0], [10.0], [0.0]]
  """
  _check(x, w, group_sizes, bias, implementation)
  sizes = jnp.asarray(group_sizes).reshape(-1, group_sizes.shape[-1])

  def parts(w, x, sizes, bias):
    on_part = functools.partial(_on_parts, implementation)
    return spmd.map_rows(on_part, (x, sizes), (w, bias))

  return within(w, parts, x, sizes, bias)


def _on_parts(implementation: str | None, rows: tuple[Array, Array], params: PyTree) -> Array:
  """The product of parts laid end to end: nearly always one."""
  x, sizes = rows
  if x.shape[0] == 0:
    return jnp.zeros((0, params[0].shape[2]), x.dtype)
  on_part = lambda x, sizes: _on_part(implementation, x, sizes, params)
  if sizes.shape[0] == 1:
    return on_part(x, sizes[0])
  parts = jax.vmap(on_part)(x.reshape(sizes.shape[0], -1, x.shape[1]), sizes)
  return parts.reshape(x.shape[0], -1)


def _on_part(implementation: str | None, x: Array, sizes: Array, params: PyTree) -> Array:
  if implementation == "reference":
    multiply = lambda x, w, sizes: reference.grouped_matmul(x, materialize(w), sizes)
    return _dense(multiply, x, params, sizes)
  if isinstance(params[0], Weight) and params[0].by_parts:
    multiply = lambda x, w, sizes: _on_part(implementation, x, sizes, (w, None))
    return _dense(multiply, x, params, sizes)
  rows = x.shape[0]
  if not is_size(rows):  # so that it is known that there are as many as a tile has
    x = jnp.pad(x, ((0, tiles.HIGHEST), (0, 0)))
  operands = (x, _floats(params), _others(params), sizes)
  return _grouped(implementation, *numerics.vary_alike(operands, operands))[:rows]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(implementation: str | None, x: Array, floats, others, group_sizes: Array) -> Array:
  return _run(implementation, 0, x, floats, others, group_sizes)


def _forward(implementation, *operands):
  return _grouped(implementation, *operands), operands


def _backward(implementation, operands, dy):
  *_, others, group_sizes = operands
  dx, d_floats = _run(implementation, 1, *operands, dy)
  return dx, d_floats, jax.tree.map(_float0, others), _float0(group_sizes)


_grouped.defvjp(_forward, _backward)


def _run(implementation: str | None, which: int, *operands):
  """The product, or its gradients for `which` = 1."""
  if implementation is not None:
    return _WAYS[implementation][which](*operands)
  ways = {platform: _WAYS[name][which] for platform, name in _fused(operands).items()}
  tiled, ragged = _WAYS["tiles"][which], _WAYS["ragged"][which]
  return lax.platform_dependent(*operands, cpu=tiled, default=ragged, **ways)


def _fused(operands: PyTree) -> dict[str, str]:
  """The kernels of this process's devices by XLA's platform; none where XLA splits operands."""
  x, *_ = operands
  split = jax.device_count() > 1 and not jax.typeof(x).manual_axis_type.varying
  if split or spmd.explicit_mesh(operands) is not None:
    return {}
  return {"gpu": {"cuda": "gpu"}, "tpu": {"tpu": "tpu"}}.get(jax.default_backend(), {})


def _ragged(x, params, group_sizes):
  multiply = lambda x, w, sizes: lax.ragged_dot(x, materialize(w).astype(x.dtype), sizes)
  return _dense(multiply, x, params, group_sizes)


def _by_kernels(name: str, x, params, group_sizes):
  """By the kernels of a platform, and what these cannot multiply by ragged products."""
  w, bias = params

  def by_group(x: Array, w: Any) -> Array:
    lying = as_it_lies(w)
    if lying is None or not fused.fits(name, x, lying):
      return _ragged(x, (w, None), group_sizes)
    return fused.product(name, x, lying, group_sizes)

  return _biased(product(x, w, by_group), w, bias, group_sizes)


def _dense(multiply, x, params, group_sizes):
  """`multiply` on the parts of the weight, the bias of each row, and zero past the last group."""
  w, bias = params
  group = reference.group_of_row(group_sizes, x.shape[0])
  inside = (group < w.shape[0])[:, None]
  sizes = group_sizes.astype(jnp.int32)
  by_group = lambda x, w: multiply(x, w, sizes)
  y = product(jnp.where(inside, x, jnp.zeros_like(x)), w, by_group)
  return jnp.where(inside, _biased(y, w, bias, sizes), jnp.zeros_like(y))


def _biased(y, w, bias, group_sizes):
  """y + the bias of each row's group."""
  if bias is None:
    return y
  group = reference.group_of_row(group_sizes, y.shape[0])
  take = functools.partial(jnp.take, axis=0, mode="fill", fill_value=0)  # 0 past the last group
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


_WAYS = {
  "tiles": tuple(map(jax.custom_batching.sequential_vmap, (tiles.forward, tiles.backward))),
  "ragged": _both(_ragged),
  **{name: _both(functools.partial(_by_kernels, name)) for name in fused.KERNELS},
}


def _floats(params: PyTree) -> PyTree:
  return jax.tree.map(lambda leaf: leaf if _is_float(leaf) else None, params)


def _others(params: PyTree) -> PyTree:
  return jax.tree.map(lambda leaf: None if _is_float(leaf) else leaf, params)


def _is_float(leaf: Array) -> bool:
  return jnp.issubdtype(leaf.dtype, jnp.floating)


def _float0(leaf: Array) -> np.ndarray:
  return np.zeros(leaf.shape, jax.dtypes.float0)


def _check(x, w, group_sizes, bias, implementation) -> None:
  if len(w.shape) != 3 or x.ndim != 2 or x.shape[1] != w.shape[1]:
    given = f"x {x.shape}, w {tuple(w.shape)}"
    raise ValueError(f"grouped_linear: {given}; allowed: x [M, D], w [E, D, F]")
  experts, _, width = w.shape
  parts = group_sizes.shape[0] if group_sizes.ndim == 2 else 1
  if group_sizes.shape not in ((experts,), (parts, experts)) or x.shape[0] % parts:
    allowed = f"({experts},), or (P, {experts}) with a P that divides {x.shape[0]} rows"
    raise ValueError(f"grouped_linear: group_sizes {group_sizes.shape}; allowed: {allowed}")
  _check_sizes(group_sizes, x.shape[0] // parts)
  if bias is not None and bias.shape != (experts, width):
    raise ValueError(f"grouped_linear: bias {bias.shape}; allowed: ({experts}, {width})")
  elsewhere = set(fused.KERNELS) - {jax.default_backend()}
  here = tuple(name for name in IMPLEMENTATIONS if name not in elsewhere)
  if implementation not in here:
    allowed = f"one of {here} on {jax.default_backend()}"
    raise ValueError(f"grouped_linear: implementation={implementation!r}; allowed: {allowed}")


def _check_sizes(group_sizes, rows: Dim) -> None:
  if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
    raise ValueError(f"grouped_linear: group_sizes of {group_sizes.dtype}; allowed: integers")
  sizes = known(group_sizes)
  if sizes is None:
    return
  if sizes.min(initial=0) < 0 or sizes.sum(axis=-1).max(initial=0) > rows:
    allowed = f"from 0, together up to {rows} rows"
    raise ValueError(f"grouped_linear: group_sizes {sizes.tolist()}; allowed: {allowed}")
