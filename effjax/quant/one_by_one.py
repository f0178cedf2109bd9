"""Rounds one input after another, and moves the error of each onto those that are left.

Frantar et al., "GPTQ", arXiv 2210.17323, section 3.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from effjax.core.typing import Array, Bool, Float, Int, PyTree, Scalar

BLOCK = 128  # inputs whose errors are moved one by one, before all others are moved at once
Choose = Callable[[Float[Array, "F"], PyTree], tuple[Int[Array, "F"], Float[Array, "F"]]]


def one_by_one(
  w: Float[Array, "D F"], gram: Float[Array, "D D"], choose: Choose, constants: PyTree = ()
) -> tuple[Int[Array, "D F"], Bool[Array, ""]]:
  """The codes of W that GPTQ chooses, so that ‖X (W − Ŵ)‖² is small, and whether H allows any.

  Inputs are rounded in the order of falling Hᵢᵢ. The error of input i is moved onto the later ones:
  W_j ← W_j − U_ij (W_i − Ŵ_i) / U_ii with H⁻¹ = UᵀU, U upper triangular, which leaves the least
  error that rounding those of before allows.

  Args:
    w: the matrix.
    gram: H = XᵀX, positive definite: see `damped`.
    choose: (values [F], constants) of one input → their codes, and the numbers that these stand
      for.
    constants: [D, …] each.
  """
  D, _ = w.shape
  size = D + -D % BLOCK
  order = jnp.argsort(-jnp.diagonal(gram))
  pad = lambda x: jnp.pad(x[order], ((0, size - D), *[(0, 0)] * (x.ndim - 1)))
  upper = _upper(gram[order][:, order])
  known = jnp.isfinite(upper).all()
  upper = jax.scipy.linalg.block_diag(upper, jnp.eye(size - D))
  rows, constants = pad(w.astype(jnp.float32)), jax.tree.map(pad, constants)
  codes = _rounded(rows, upper, choose, constants)
  return jnp.zeros(w.shape, jnp.int32).at[order].set(codes[:D]), known


def damped(gram: Float[Array, "... D D"], damping: Scalar) -> Float[Array, "... D D"]:
  """H + damping · mean Hᵢᵢ · I; + damping · I where that mean is 0."""
  mean = jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None] / gram.shape[-1]
  identity = jnp.broadcast_to(jnp.eye(gram.shape[-1]), gram.shape)
  return gram + damping * jnp.where(mean == 0, 1, mean) * identity


def check_definite(known: Bool[Array, "..."], damping: Scalar) -> None:
  """Refuses what H allows no codes of, where that is known.

  Raises:
    ValueError: where H is not positive definite.
  """
  if not isinstance(known, jax.core.Tracer) and not known.all():
    raise ValueError(f"H is not positive definite with damping={damping}; allowed: more of it")


def _upper(h: Float[Array, "D D"]) -> Float[Array, "D D"]:
  """U, upper triangular, with H⁻¹ = UᵀU; NaN where H is not positive definite.

  H = R Rᵀ with R upper triangular is the Cholesky decomposition of H in opposite order, and
  U = R⁻¹.
  """
  lower = jnp.linalg.cholesky(h[::-1, ::-1])
  return jax.scipy.linalg.solve_triangular(lower[::-1, ::-1], jnp.eye(len(h)))


def _rounded(
  rows: Float[Array, "D F"], upper: Float[Array, "D D"], choose: Choose, constants: PyTree
) -> Int[Array, "D F"]:
  """The codes of each input, with the errors of those before moved onto it."""

  def block(rows, begin):
    cut = lambda x: jax.lax.dynamic_slice_in_dim(x, begin, BLOCK)
    within = jax.lax.dynamic_slice(upper, (begin, begin), (BLOCK, BLOCK))
    own_constants = jax.tree.map(cut, constants)

    def one(own, i):
      codes, numbers = choose(own[i], jax.tree.map(lambda c: c[i], own_constants))
      error = (own[i] - numbers) / within[i, i]
      return own - jnp.outer(within[i], error), (codes, error)

    _, (codes, errors) = jax.lax.scan(one, cut(rows), jnp.arange(BLOCK))
    return rows - jnp.matmul(cut(upper).T, errors), codes

  _, codes = jax.lax.scan(block, rows, jnp.arange(0, len(rows), BLOCK))
  return codes.reshape(rows.shape)
