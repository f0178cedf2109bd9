"""Losses that keep experts evenly loaded and router logits small, as functions of one layer.

A model averages them over its layers. They are never computed on layers laid end to end, as some
libraries do: there one layer's surplus would cancel another's shortage.
"""

import jax
import jax.numpy as jnp

from effjax.core.numerics import weighted_mean, zero_unless
from effjax.core.typing import Array, Bool, Float, Int

NORMALIZATIONS = ("deepseek", "switch", "gshard")


def expert_shares(
  experts: Int[Array, "... k"], count: int, *, mask: Bool[Array, "..."] | None = None
) -> Float[Array, "E"]:
  """f_e: of all choices that tokens made, the share that fell on each expert; sums to one.

  Example:
    >>> expert_shares(jnp.array([[0, 1], [0, 2]]), 4).tolist()
    [0.5, 0.25, 0.25, 0.0]
  """
  chosen = jax.nn.one_hot(experts, count, dtype=jnp.float32).mean(axis=-2)
  return _token_mean(chosen, mask)


def load_balance_loss(
  probs: Float[Array, "... E"],
  experts: Int[Array, "... k"],
  *,
  mask: Bool[Array, "..."] | None = None,
  normalization: str = "deepseek",
) -> Float[Array, ""]:
  """E · Σ_e f_e P_e, with f the share of tokens routed to e and P the mean probability of e.

  Gradient flows through P alone. What f counts is the normalisation:

  | normalization | f_e | f sums to | uniform routing |
  |---|---|---|---|
  | "deepseek" | choices of e / (k · tokens) | 1 | 1 |
  | "switch" | choices of e / tokens | k | k |
  | "gshard" | first choices of e / tokens | 1 | 1 |

  With k = 1 all three are the loss of Switch Transformers (arXiv 2101.03961, equations 4 to 6).
  For larger k, "switch" is what its successors and transformers' Mixtral compute; "deepseek" is
  DeepSeekMoE (arXiv 2401.06066, equations 12 to 14); "gshard" counts first choices only (arXiv
  2006.16668, algorithm 1, here times E² so that it does not shrink with E).

  Args:
    probs: router probabilities.
    experts: chosen experts, best first.
    mask: False where a token is padding and must not count.
    normalization: see above.

  Raises:
    ValueError: for another normalisation.

  Example:
    >>> probs = jnp.full((4, 2), 0.5)
    >>> float(load_balance_loss(probs, jnp.array([[0], [1], [0], [1]])))
    1.0
    >>> float(load_balance_loss(probs, jnp.array([[0, 1]] * 4), normalization="switch"))
    2.0
  """
  if experts.shape[:-1] != probs.shape[:-1]:
    raise ValueError(
      f"load_balance_loss: experts {experts.shape}; allowed: choices of the tokens of probs "
      f"{probs.shape}"
    )
  if normalization not in NORMALIZATIONS:
    allowed = ", ".join(NORMALIZATIONS)
    raise ValueError(f"load_balance_loss: normalization={normalization!r}; allowed: {allowed}")
  counted = experts[..., :1] if normalization == "gshard" else experts
  shares = expert_shares(counted, probs.shape[-1], mask=mask)
  factor = experts.shape[-1] if normalization == "switch" else 1
  mean_probs = _token_mean(probs, mask)
  return factor * probs.shape[-1] * jnp.sum(shares * mean_probs)


def z_loss(
  logits: Float[Array, "... E"], *, mask: Bool[Array, "..."] | None = None
) -> Float[Array, ""]:
  """mean over tokens of (log Σ_e exp logit_e)², in float32 (ST-MoE, arXiv 2202.08906, equation 5).

  Args:
    logits: the router's output.
    mask: False where a token is padding and must not count.

  Example:
    >>> float(z_loss(jnp.array([[0.0, -jnp.inf], [1.0, -jnp.inf]])))
    0.5
  """
  _check_mask(mask, logits)
  squares = jax.nn.logsumexp(zero_unless(mask, logits.astype(jnp.float32)), axis=-1) ** 2
  return weighted_mean(squares, mask)


def _check_mask(mask: Array | None, values: Float[Array, "... E"]) -> None:
  if mask is not None and mask.shape != values.shape[:-1]:
    raise ValueError(f"mask: shape {mask.shape}; allowed: {values.shape[:-1]}, one of each token")


def _token_mean(values: Float[Array, "... E"], mask: Array | None) -> Float[Array, "E"]:
  _check_mask(mask, values)
  values = zero_unless(mask, values.astype(jnp.float32)).reshape(-1, values.shape[-1])
  tokens = values.shape[0] if mask is None else mask.sum(dtype=values.dtype)
  return values.sum(axis=0) / jnp.maximum(tokens, 1.0)
