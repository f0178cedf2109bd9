"""How evenly a router loads its experts, as every router sows it."""

import flax.linen as nn
import jax.numpy as jnp

from effjax.core.typing import Array, Float, Scalar
from effjax.moe.losses.entropy import entropy


def sow_health(router: nn.Module, load: Float[Array, "E"], dropped: Scalar = 0.0) -> None:
  """Sows what became of the choices of one call.

  | collection | name | |
  |---|---|---|
  | "metrics" | "max_load" | the busiest expert's choices over the mean expert's, 1 … E / k |
  | "metrics" | "load_entropy" | −Σ f log f of the shares f of all choices, in nats, up to log E |
  | "metrics" | "dead_experts" | how many no token chose |
  | "metrics" | "dropped_share" | the share of choices that found their expert full |
  | "statistics" | "load" | the shares f of all choices, before any capacity, [E] |

  Args:
    router: in whose call this is.
    load: the shares f.
    dropped: the share that was dropped.
  """
  router.sow("statistics", "load", load)
  router.sow("metrics", "max_load", load.shape[0] * load.max())
  router.sow("metrics", "load_entropy", entropy(load))
  router.sow("metrics", "dead_experts", (load == 0).sum().astype(jnp.float32))
  router.sow("metrics", "dropped_share", jnp.asarray(dropped, jnp.float32))
