"""The distribution that a next token is drawn from, and the draw.

Everything is a pure function of logits [..., V]. `distribution` gives the probabilities that are
really sampled from, after temperature, top-k and top-p, greedy choice being a one-hot: speculative
sampling accepts and rejects by exactly these.
"""

import jax
import jax.numpy as jnp

from effjax.core.typing import Array, Float, Int, Key

Scalar = int | float | Array


def keep_top_k(logits: Float[Array, "... V"], k: int | Array) -> Float[Array, "... V"]:
  """`logits` with −inf for all but the k largest; what ties with the k-th stays (1805.04833).

  Example:
    >>> keep_top_k(jnp.array([1.0, 3.0, 2.0]), 2).tolist()
    [-inf, 3.0, 2.0]
  """
  descending = -jnp.sort(-logits, axis=-1)
  last = jnp.minimum(k, logits.shape[-1]) - 1
  smallest = jnp.take(descending, last, axis=-1)[..., None]
  return jnp.where(logits < smallest, -jnp.inf, logits)


def keep_top_p(logits: Float[Array, "... V"], p: Scalar) -> Float[Array, "... V"]:
  """Nucleus: −inf outside the fewest most likely tokens that hold p together (1904.09751).

  A token stays when those strictly more likely hold less than p; the most likely always stays.

  Example:
    >>> keep_top_p(jnp.log(jnp.array([0.5, 0.3, 0.2])), 0.6)[2].item()
    -inf
  """
  descending = -jnp.sort(-logits, axis=-1)
  probabilities = jax.nn.softmax(descending, axis=-1)
  before = jnp.cumsum(probabilities, axis=-1) - probabilities
  kept = jnp.where(before < p, descending, jnp.inf)
  smallest = jnp.minimum(kept.min(-1, keepdims=True), descending[..., :1])
  return jnp.where(logits < smallest, -jnp.inf, logits)


def adjust(
  logits: Float[Array, "... V"],
  temperature: Scalar = 1.0,
  top_k: int | Array | None = None,
  top_p: Scalar | None = None,
) -> Float[Array, "... V"]:
  """Logits whose softmax is the sampling distribution: temperature, then top-k, then top-p."""
  logits = logits.astype(jnp.float32) / temperature
  if top_k is not None:
    logits = keep_top_k(logits, top_k)
  return logits if top_p is None else keep_top_p(logits, top_p)


def distribution(
  logits: Float[Array, "... V"],
  *,
  temperature: Scalar = 1.0,
  top_k: int | Array | None = None,
  top_p: Scalar | None = None,
) -> Float[Array, "... V"]:
  """Probabilities of the next token, float32.

  softmax(logits / temperature) restricted to the top k and then to the nucleus p; at temperature 0
  a one-hot at the largest logit, the first of equal ones.

  Args:
    logits: [..., V].
    temperature: from 0; 0 must be a Python number, for it changes the computation.
    top_k: tokens kept, or None for all.
    top_p: probability kept, or None for all.

  Raises:
    ValueError: as `check_sampling`.

  Example:
    >>> logits = jnp.log(jnp.array([0.5, 0.3, 0.2]))
    >>> distribution(logits, top_k=2).round(3).tolist()
    [0.625, 0.375..., 0.0]
    >>> distribution(logits, temperature=0).tolist()
    [1.0, 0.0, 0.0]
  """
  check_sampling(temperature, top_k, top_p)
  if is_greedy(temperature):
    return jax.nn.one_hot(logits.argmax(-1), logits.shape[-1], dtype=jnp.float32)
  return jax.nn.softmax(adjust(logits, temperature, top_k, top_p), axis=-1)


def sample(
  logits: Float[Array, "... V"],
  key: Key | None = None,
  *,
  temperature: Scalar = 1.0,
  top_k: int | Array | None = None,
  top_p: Scalar | None = None,
) -> Int[Array, "..."]:
  """One token drawn from `distribution` of the same arguments; greedy needs no key.

  Raises:
    ValueError: as `check_sampling`, and for a key that is missing.

  Example:
    >>> sample(jnp.array([[0.0, 9.0], [9.0, 0.0]]), temperature=0).tolist()
    [1, 0]
  """
  check_sampling(temperature, top_k, top_p)
  if is_greedy(temperature):
    return logits.argmax(-1).astype(jnp.int32)
  if key is None:
    raise ValueError(f"key is None with temperature {temperature}; allowed: a jax.random key")
  adjusted = adjust(logits, temperature, top_k, top_p)
  return jax.random.categorical(key, adjusted, axis=-1).astype(jnp.int32)


def is_greedy(temperature: Scalar) -> bool:
  """Whether `temperature` is the number 0; a traced one never is."""
  return isinstance(temperature, int | float) and temperature == 0


def check_sampling(temperature: Scalar, top_k, top_p) -> None:
  """Refuses arguments that define no distribution; traced ones are taken as they are.

  Raises:
    ValueError: for a temperature below 0, a top_k below 1, or a top_p outside (0, 1].
  """
  if isinstance(temperature, int | float) and not 0 <= temperature < float("inf"):
    raise ValueError(f"temperature {temperature}; allowed: finite, from 0")
  if isinstance(top_k, int | float) and (top_k != int(top_k) or top_k < 1):
    raise ValueError(f"top_k {top_k}; allowed: integers from 1, or None")
  if isinstance(top_p, int | float) and not 0 < top_p <= 1:
    raise ValueError(f"top_p {top_p}; allowed: above 0, up to 1, or None")
