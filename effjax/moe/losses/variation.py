"""Losses on the variation between experts: of their gates, and of how many tokens they get.

Shazeer et al., arXiv 1701.06538, section 4 and appendix A; V-MoE, arXiv 2106.05974, appendix A.
"""

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtr

from effjax.core.known import number
from effjax.core.numerics import zero_unless
from effjax.core.typing import Array, Bool, Float, Int, Scalar, Size
from effjax.moe.losses.tokens import check_mask, token_sum

ESTIMATORS = ("shazeer", "v_moe")


def variation(values: Float[Array, "E"]) -> Float[Array, ""]:
  """CV² = variance / mean² with the population's variance; 0 where the mean is 0.

  Example:
    >>> float(variation(jnp.array([1.0, 3.0]))), float(variation(jnp.zeros(3)))
    (0.25, 0.0)
  """
  values = values.astype(jnp.float32)
  mean = values.mean()
  return jnp.square(values / jnp.where(mean == 0, 1, mean) - (mean != 0)).mean()


def chosen_gates(
  experts: Int[Array, "... k"], gates: Float[Array, "... k"], count: int
) -> Float[Array, "... E"]:
  """The gate of each token for every expert, 0 for those that it did not choose.

  Example:
    >>> chosen_gates(jnp.array([[2, 0]]), jnp.array([[0.75, 0.25]]), 3).tolist()
    [[0.25, 0.0, 0.75]]
  """
  return (jax.nn.one_hot(experts, count, dtype=jnp.float32) * gates[..., None]).sum(axis=-2)


def importance_loss(
  gates: Float[Array, "... E"], *, mask: Bool[Array, "..."] | None = None
) -> Float[Array, ""]:
  """CV² over experts of the importance Σ_tokens gate.

  Args:
    gates: of each token for each expert: Shazeer's are `chosen_gates`, with zeros for the others
      (equations 6 and 7); V-MoE's the softmax over all, without noise.
    mask: False where a token is padding and must not count.

  Example:
    >>> float(importance_loss(jnp.array([[1.0, 0.0], [0.5, 0.5]])))
    0.25
  """
  return variation(token_sum(gates, mask))


def load_loss(
  clean: Float[Array, "... E"],
  noisy: Float[Array, "..."],
  stddev: Float[Array, "... E"] | Scalar,
  *,
  k: Size,
  mask: Bool[Array, "..."] | None = None,
  estimator: str = "shazeer",
) -> Float[Array, ""]:
  """CV² over experts of the load that `smooth_load` expects, which has a gradient.

  Args:
    clean, noisy, stddev, k, estimator: as in `smooth_load`.
    mask: False where a token is padding and must not count.

  Example:
    >>> clean = jnp.array([[0.0, 0.0], [0.0, 0.0]])
    >>> float(load_loss(clean, clean, 1.0, k=1))
    0.0
  """
  check_mask(mask, clean)
  clean, noisy = zero_unless(mask, clean), zero_unless(mask, noisy)
  if getattr(stddev, "shape", ()) and mask is not None:
    stddev = jnp.where(mask[..., None], stddev, 1)
  load = smooth_load(clean, noisy, stddev, k=k, estimator=estimator)
  return variation(token_sum(load, mask))


def smooth_load(
  clean: Float[Array, "... E"],
  noisy: Float[Array, "..."],
  stddev: Float[Array, "... E"] | Scalar,
  *,
  k: Size,
  estimator: str = "shazeer",
) -> Float[Array, "... E"]:
  """The probability that a token chooses each expert when that expert's noise is drawn again.

  P_e = Φ((clean_e − threshold_e) / σ_e), with the threshold that expert e has to pass:

  | estimator | threshold_e | P sums to |
  |---|---|---|
  | "shazeer" | the k-th largest noisy logit of the other experts | k, on average over the noise |
  | "v_moe" | the k-th largest noisy logit of all; in V-MoE σ = 1 / E | less than k, near it |

  With k = E every expert is chosen: "shazeer" gives 1, without gradient.

  Args:
    clean: logits x W.
    noisy: clean + σ · ε, by which experts are chosen.
    stddev: σ, above 0; an array or one number for all.
    k: experts a token visits, 1 … E.
    estimator: see above.

  Raises:
    ValueError: when k or σ is out of range, and for another estimator.

  Example:
    >>> clean, noisy = jnp.zeros((1, 3)), jnp.array([[0.5, 0.1, -0.2]])
    >>> [round(float(p), 3) for p in smooth_load(clean, noisy, 1.0, k=1)[0]]
    [0.46, 0.309, 0.309]
    >>> [round(float(p), 3) for p in smooth_load(clean, noisy, 1.0, k=1, estimator="v_moe")[0]]
    [0.309, 0.309, 0.309]
  """
  count = clean.shape[-1]
  k = number("k", k, of="load_loss", integer=True, least=1, most=count)
  stddev = number("stddev", stddev, of="load_loss", above=0, shape=tuple(clean.shape))
  if estimator not in ESTIMATORS:
    allowed = ", ".join(ESTIMATORS)
    raise ValueError(f"load_loss: estimator={estimator!r}; allowed: {allowed}")
  if noisy.shape != clean.shape:
    raise ValueError(f"load_loss: noisy {noisy.shape}; allowed: {clean.shape}, that of clean")
  clean, noisy = clean.astype(jnp.float32), noisy.astype(jnp.float32)
  if estimator == "shazeer" and k == count:
    return jnp.ones_like(clean)
  largest, order = jax.lax.top_k(noisy, min(k + 1, count))
  threshold = largest[..., k - 1 : k]
  if estimator == "shazeer":  # by places: a number computed twice may differ from itself
    chosen = jax.nn.one_hot(order[..., :k], count, dtype=bool).any(axis=-2)
    threshold = jnp.where(chosen, largest[..., k : k + 1], threshold)
  return ndtr((clean - threshold) / stddev)
