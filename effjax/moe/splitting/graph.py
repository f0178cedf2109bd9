"""Experts of hidden units that are active together.

Zhang et al., MoEfication, arXiv 2110.01786, section 3.2: units are the nodes of a graph, and an
edge weighs what two do at once, summed over tokens. The graph is cut into parts of equal size so
that little weight is cut; there by METIS, here by `equal_clusters`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from effjax.core.typing import Int, Key, Size
from effjax.layers import reductions
from effjax.layers.reductions import Reduction
from effjax.moe.splitting.clusters import equal_clusters
from effjax.moe.splitting.ways import Parts, seed_of
from effjax.moe.units import Site

co_activation = Reduction(
  lambda x, mask: reductions.gram.measure(jnp.abs(x), mask), reductions.gram.combine
)
"""Σ |x|ᵀ |x|, [D, D]: for `layers.capture` of what goes into the "down" of an MLP."""


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
  """A way to split: hidden units that are active for the same tokens are in one expert.

  The parts have the most weight Σ affinity_ij within them that `equal_clusters` finds.

  Attributes:
    affinity: path of "down" → [F, F], with a leading axis in scanned segments, as
      `capture(…, reduce=co_activation, select="down")` gives it.

  Example:
    >>> import jax
    >>> from effjax.layers import MLP, LayerSpec, TransformerConfig
    >>> config = TransformerConfig(8, 2, (LayerSpec(None, MLP(4)),))
    >>> together = np.array([[1.0, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]])
    >>> way = Graph({"segments_0/layers_0/ffn/down": together})
    >>> site = Site.of(config, 0, config.layers[0], {"ffn": {}})
    >>> sorted(way(site, np.arange(4), 2, jax.random.key(0)).experts.tolist())
    [[0, 2], [1, 3]]
  """

  affinity: Mapping[str, Any]

  def __call__(self, site: Site, among: Int[np.ndarray, "F"], experts: Size, key: Key) -> Parts:
    affinity = site.statistic("Graph: affinity", self.affinity)
    if affinity.shape != (site.mlp.width, site.mlp.width):
      allowed = f"{(site.mlp.width, site.mlp.width)}, as capture gives it with co_activation"
      raise ValueError(
        f"Graph: affinity of shape {affinity.shape} at {site.path}; allowed: {allowed}"
      )
    chosen = affinity[np.ix_(among, among)]
    return Parts.of_labels(among, equal_clusters(chosen, experts, seed=seed_of(key)))
