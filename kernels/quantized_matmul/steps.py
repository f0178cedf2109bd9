"""What products on a CPU go through matrices with."""

import jax
import jax.numpy as jnp

from effjax.core.typing import Array, Float, Int

BLOCK_BYTES = 1 << 19  # of an expanded block, which should stay in a core's cache
LEAST_OUTPUTS = 128  # of a block; fewer make a product of matrices slow


def outputs_at_once(outputs: int, output_bytes: int, block_bytes: int = BLOCK_BYTES) -> int:
  """Outputs of a block of at most `block_bytes`, which has `output_bytes` for each.

  Where 128 outputs need more, a block has as many; and never more than half of them all.

  Example:
    >>> outputs_at_once(4096, 16_384), outputs_at_once(100, 256)
    (128, 50)
  """
  most = max(LEAST_OUTPUTS, block_bytes // output_bytes)
  return even(outputs, min(most, -(-outputs // 2)))


def even(length: int, most: int) -> int:
  """The size of the fewest parts of at most `most` that `length` is cut into.

  Example:
    >>> even(10, 4)
    4
  """
  return -(-length // -(-length // most))


def begin(i, size: int, length: int):
  """Where part i begins; the last ends at `length`, and may overlap the one before."""
  least = min if isinstance(i, int) else jnp.minimum
  return least(i * size, length - size)


def parts_of(x: Float[Array, "... D"], size: int) -> Float[Array, "... P size"]:
  """x in those parts, 0 where the last overlaps the one before.

  Example:
    >>> parts_of(jnp.array([1.0, 2.0, 3.0]), 2).tolist()
    [[1.0, 2.0], [0.0, 3.0]]
  """
  length = x.shape[-1]
  count = -(-length // size)
  first, last = jnp.split(x, [(count - 1) * size], -1)
  last = jnp.pad(last, [(0, 0)] * (x.ndim - 1) + [(count * size - length, 0)])
  return jnp.concatenate([first, last], -1).reshape(*x.shape[:-1], count, size)


def zero_after(out: Float[Array, "M F"]) -> Int[Array, ""]:
  """0, once `out` is there, NaN included: what begins at it waits for `out`."""
  return jnp.minimum(jnp.abs(out[0, 0]), 0).astype(jnp.int32)


def zeros_after(x: Float[Array, "M D"], shape: tuple[int, ...]) -> Float[Array, "M ..."]:
  """Zeros [M, …] that need x: the compiler makes others at once for all layers, and holds them."""
  zero = jnp.minimum(jnp.abs(x[:, 0]), 0)
  return jnp.broadcast_to(zero.reshape(-1, *(1,) * (len(shape) - 1)), shape)


def pairwise(terms: list[Array]) -> Array:
  """Their sum, for which one loop over memory multiplies, converts and adds."""
  while len(terms) > 1:
    odd = terms[-1:] if len(terms) % 2 else []
    terms = [a + b for a, b in zip(terms[::2], terms[1::2], strict=False)] + odd
  return terms[0]


def sum_of(x: Float[Array, "M A B"], axis: int) -> Float[Array, "M C"]:
  """The sum over axis 1 or 2 as a product: XLA would have a sum take in what makes its terms."""
  ones = jnp.ones((len(x), x.shape[axis]), x.dtype)
  return jax.lax.dot_general(ones, x, (((1,), (axis,)), ((0,), (0,))))
