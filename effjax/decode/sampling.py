"""The distribution that a next token is drawn from, and the draw.

Everything is a pure function of logits [..., V]. `distribution` gives the probabilities that are
really sampled from, after temperature, top-k and top-p, greedy choice being a one-hot: speculative
sampling accepts and rejects by exactly these.

Temperature, top_k and top_p are numbers, or arrays [...] with one for each row of the logits. A
known one that defines no distribution is refused. Where a traced one does, or the logits do (NaN
among them, or −∞ only), probabilities are NaN and the token is −1.
"""

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core.known import known, number
from effjax.core.numerics import nan_unless
from effjax.core.typing import Array, Float, Int, Key, Scalar, Size

NO_TOKEN = -1
BOUNDS: dict[str, dict] = {
  "temperature": {"least": 0},
  "top_k": {"integer": True, "least": 1},
  "top_p": {"above": 0, "most": 1},
}
_FLOAT = np.finfo(np.float32)
_TINY = float(_FLOAT.tiny)


def keep_top_k(logits: Float[Array, "... V"], k: Size | Array) -> Float[Array, "... V"]:
  """`logits` with −inf for all but the k largest; what ties with the k-th stays (1805.04833).

  Raises:
    ValueError: for a k, where it is known, below 1.

  Example:
    >>> keep_top_k(jnp.array([1.0, 3.0, 2.0]), 2).tolist()
    [-inf, 3.0, 2.0]
  """
  k = _rows("top_k", k, logits)
  last = jnp.clip(k, 1, logits.shape[-1]) - 1
  smallest = jnp.take_along_axis(_descending(logits), last, axis=-1)
  return nan_unless(k >= 1, jnp.where(logits < smallest, -jnp.inf, logits))


def keep_top_p(logits: Float[Array, "... V"], p: Scalar) -> Float[Array, "... V"]:
  """Nucleus: −inf outside the fewest most likely tokens that hold p together (1904.09751).

  A token stays when those strictly more likely hold less than p. Sums that differ from p by no more
  than the rounding of float32 equal it. With p = 1 every token stays.

  Raises:
    ValueError: for a p, where it is known, outside (0, 1].

  Example:
    >>> keep_top_p(jnp.log(jnp.array([0.3, 0.1, 0.1, 0.5])), 0.8)[1:3].tolist()
    [-inf, -inf]
  """
  p = _rows("top_p", p, logits)
  descending = _descending(logits)
  log_p = jax.nn.log_softmax(_from_best(descending.astype(jnp.float32)), axis=-1)
  each = jnp.exp(log_p)
  before = jnp.pad(jnp.cumsum(each, axis=-1), [(0, 0)] * (each.ndim - 1) + [(1, 0)])[..., :-1]
  rest = jax.lax.cumsum(each, axis=each.ndim - 1, reverse=True)
  # p − before, without the rounding that 1 − rest or 1 − before would have near 0 and 1, and the
  # error of it: of sums of exp(logit), where the logit is rounded too, and of p itself.
  missing = p * rest - (1 - p) * before
  error = float(_FLOAT.eps) * (before * rest * (8 - jnp.maximum(log_p, -100)) + p / 2)
  smallest = jnp.where(missing > error, descending, jnp.inf).min(axis=-1, keepdims=True)
  smallest = jnp.minimum(smallest, descending[..., :1])
  kept = jnp.where((logits < smallest) & (p < 1), -jnp.inf, logits)
  return nan_unless((p > 0) & (p <= 1), kept)


def adjust(
  logits: Float[Array, "... V"],
  temperature: Scalar = 1.0,
  top_k: Size | Array | None = None,
  top_p: Scalar | None = None,
) -> Float[Array, "... V"]:
  """Logits whose softmax is the sampling distribution: temperature, then top-k, then top-p.

  The largest is 0; all are NaN where there is no distribution.

  Raises:
    ValueError: as `checked`.
  """
  temperature = _rows("temperature", temperature, logits)
  below = _from_best(logits.astype(jnp.float32))
  possible = below > -jnp.inf
  divisor = jnp.where(temperature < _TINY, 1, temperature)
  cooled = jnp.where(possible, jnp.where(possible, below, 0) / divisor, -jnp.inf)
  places = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
  first = places == below.argmax(axis=-1, keepdims=True)
  cooled = jnp.where(temperature < _TINY, jnp.where(first, 0, -jnp.inf), cooled)
  defined = (temperature >= 0) & (temperature < jnp.inf) & ~jnp.isnan(below)
  cooled = nan_unless(defined, cooled)
  if top_k is not None:
    cooled = keep_top_k(cooled, top_k)
  return cooled if top_p is None else keep_top_p(cooled, top_p)


def distribution(
  logits: Float[Array, "... V"],
  *,
  temperature: Scalar = 1.0,
  top_k: Size | Array | None = None,
  top_p: Scalar | None = None,
) -> Float[Array, "... V"]:
  """Probabilities of the next token, float32.

  softmax(logits / temperature) restricted to the top k and then to the nucleus p; at temperature 0
  a one-hot at the largest logit, the first of equal ones.

  Args:
    logits: [..., V].
    temperature: from 0.
    top_k: tokens kept, or None for all.
    top_p: probability kept, or None for all.

  Raises:
    ValueError: as `checked`.

  Example:
    >>> logits = jnp.log(jnp.array([0.5, 0.3, 0.2]))
    >>> distribution(logits, top_k=2).round(3).tolist()
    [0.625, 0.375..., 0.0]
    >>> distribution(logits, temperature=0).tolist()
    [1.0, 0.0, 0.0]
  """
  return jax.nn.softmax(adjust(logits, temperature, top_k, top_p), axis=-1)


def sample(
  logits: Float[Array, "... V"],
  key: Key | None = None,
  *,
  temperature: Scalar = 1.0,
  top_k: Size | Array | None = None,
  top_p: Scalar | None = None,
) -> Int[Array, "..."]:
  """One token drawn from `distribution` of the same arguments; greedy needs no key.

  Raises:
    ValueError: as `checked`, and for a key that is missing.

  Example:
    >>> sample(jnp.array([[0.0, 9.0], [9.0, 0.0]]), temperature=0).tolist()
    [1, 0]
  """
  adjusted = adjust(logits, temperature, top_k, top_p)
  if is_greedy(temperature):
    token = adjusted.argmax(axis=-1)
  elif key is None:
    raise ValueError(f"key is None with temperature {temperature}; allowed: a jax.random key")
  else:
    token = jax.random.categorical(key, adjusted, axis=-1)
  return jnp.where(jnp.isnan(adjusted).any(axis=-1), NO_TOKEN, token).astype(jnp.int32)


def is_greedy(temperature: Scalar) -> bool:
  """Whether `temperature` is known to be 0 in float32, in every row."""
  values = known(temperature)
  return values is not None and bool((values < _TINY).all())


def checked(name: str, value: Scalar, rows: tuple[int, ...]) -> Array:
  """The argument `name` of a sampling function as an array that a program may be given.

  Args:
    name: "temperature", "top_k" or "top_p".
    value: a number, or an array of the shape `rows`.
    rows: the leading axes of the logits.

  Raises:
    ValueError: for a temperature below 0, a top_k below 1, or a top_p outside (0, 1], where they
      are known; for what is no finite number, and for arrays of another shape.
  """
  bounds = BOUNDS[name]
  value = number(name, value, shape=rows, **bounds)
  values, dtype = known(value), np.int32 if "integer" in bounds else np.float32
  if values is None:
    return value.astype(dtype)
  most = np.iinfo(np.int32).max if "integer" in bounds else _FLOAT.max
  return jnp.asarray(np.clip(values, _TINY if "above" in bounds else 0, most), dtype)


def _rows(name: str, value: Scalar, logits: Float[Array, "... V"]) -> Array:
  """A checked argument as [..., 1], of each row of the logits."""
  rows = logits.shape[:-1]
  return jnp.broadcast_to(checked(name, value, rows), rows)[..., None]


def _descending(logits: Float[Array, "... V"]) -> Float[Array, "... V"]:
  return -jnp.sort(-logits, axis=-1)


def _from_best(logits: Float[Array, "... V"]) -> Float[Array, "... V"]:
  """Logits less their maximum, which becomes 0, also where it is ∞; NaN where nothing is likely."""
  best = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
  below = jnp.where(logits == best, 0, logits - best)
  return nan_unless(best > -jnp.inf, below)
