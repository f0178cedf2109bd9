"""Balance losses: the share of tokens that an expert gets, times the probability it is given."""

import jax
import jax.numpy as jnp

from effjax.core.known import number
from effjax.core.typing import Array, Bool, Float, Int, Size
from effjax.moe.losses.tokens import token_mean

NORMALIZATIONS = ("deepseek", "switch", "gshard")


def expert_shares(
  experts: Int[Array, "... k"], count: int, *, mask: Bool[Array, "..."] | None = None
) -> Float[Array, "E"]:
  """f_e: of all choices that tokens made, the share that fell on each expert; sums to one.

  Choices of none, which are none of 0 … E − 1, count among all.

  Example:
    >>> expert_shares(jnp.array([[0, 1], [0, 2]]), 4).tolist()
    [0.5, 0.25, 0.25, 0.0]
  """
  chosen = jax.nn.one_hot(experts, count, dtype=jnp.float32).mean(axis=-2)
  return token_mean(chosen, mask)


def load_balance_loss(
  probs: Float[Array, "... E"],
  experts: Int[Array, "... k"],
  *,
  mask: Bool[Array, "..."] | None = None,
  normalization: str = "deepseek",
  devices: Size | None = None,
) -> Float[Array, ""]:
  """E · Σ_e f_e P_e, with f the share of tokens routed to e and P the mean probability of e.

  Gradient flows through P alone. What f counts, before any capacity, is the normalisation:

  | normalization | f_e | f sums to | uniform routing |
  |---|---|---|---|
  | "deepseek" | choices of e / (k · tokens) | 1 | 1 |
  | "switch" | choices of e / tokens | k | k |
  | "gshard" | first choices of e / tokens | 1 | 1 |

  With k = 1 all three are the loss of Switch Transformers (arXiv 2101.03961, equations 4 to 6).
  For larger k, "switch" is what its successors, Flaxformer and transformers' Mixtral compute;
  "deepseek" is DeepSeekMoE (arXiv 2401.06066, equations 12 to 14) and Megatron; "gshard" counts
  first choices only (arXiv 2006.16668, algorithm 1, here times E² so that it does not shrink with
  E; so does Mesh TensorFlow).

  With `devices` it is Σ_d f′_d P′_d over D groups of E / D neighbours, where f′ is the mean of
  E · f in the group and P′ the sum of P (DeepSeekMoE, equations 15 to 17); D = E is the above.

  Args:
    probs: router probabilities.
    experts: chosen experts, best first.
    mask: False where a token is padding and must not count.
    normalization: see above.
    devices: number of groups D, a divisor of E; None is E.

  Raises:
    ValueError: for another normalisation, and for devices that do not divide the experts.

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
  count = probs.shape[-1]
  groups = (
    count
    if devices is None
    else number("devices", devices, of="load_balance_loss", integer=True, least=1)
  )
  if count % groups:
    raise ValueError(f"load_balance_loss: devices={groups}; allowed: divisors of {count} experts")
  counted = experts[..., :1] if normalization == "gshard" else experts
  factor = experts.shape[-1] if normalization == "switch" else 1
  shares = expert_shares(counted, count, mask=mask).reshape(groups, -1).sum(axis=1)
  mean_probs = token_mean(probs, mask).reshape(groups, -1).sum(axis=1)
  return factor * groups * jnp.sum(shares * mean_probs)
