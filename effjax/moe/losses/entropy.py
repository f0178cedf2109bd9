"""Losses on what a router says of each token: how large its logits are, how sure it is."""

import jax
import jax.numpy as jnp

from effjax.core.numerics import weighted_mean, zero_unless
from effjax.core.typing import Array, Bool, Float
from effjax.moe.losses.tokens import check_mask, token_mean


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
  check_mask(mask, logits)
  squares = jax.nn.logsumexp(zero_unless(mask, logits.astype(jnp.float32)), axis=-1) ** 2
  return weighted_mean(squares, mask)


def mutual_information_loss(
  probs: Float[Array, "... E"], *, mask: Bool[Array, "..."] | None = None
) -> Float[Array, ""]:
  """−(H(e) − H(e|x)) in nats: experts are used evenly, and each token is sure of its own.

  H(e) is the entropy of the tokens' mean probabilities, H(e|x) the tokens' mean entropy
  (Mod-Squad, arXiv 2212.08066, section 3.2; ModuleFormer, arXiv 2306.04640, section 3). It lies
  between −log E and 0.

  Args:
    probs: the softmax over all experts.
    mask: False where a token is padding and must not count.

  Example:
    >>> sure, unsure = jnp.eye(2), jnp.full((2, 2), 0.5)
    >>> round(float(mutual_information_loss(sure)), 4), float(mutual_information_loss(unsure))
    (-0.6931, 0.0)
  """
  check_mask(mask, probs)
  probs = zero_unless(mask, probs.astype(jnp.float32))
  return weighted_mean(entropy(probs), mask) - entropy(token_mean(probs, mask))


def entropy(probs: Float[Array, "... E"]) -> Float[Array, "..."]:
  """−Σ_e p_e log p_e in nats; what is 0 adds nothing, to its gradient neither.

  Example:
    >>> [round(float(h), 4) for h in entropy(jnp.array([[0.5, 0.5], [1.0, 0.0]]))]
    [0.6931, 0.0]
  """
  some = probs > 0
  return jnp.where(some, -probs * jnp.log(jnp.where(some, probs, 1)), 0).sum(axis=-1)
