"""Small models with a mixture of experts for every MLP, as the lab's studies compare them."""

import dataclasses
import math

from effjax.layers import Router
from effjax.models import TransformerConfig
from effjax.moe import MoE, TopK
from experiments.lab import budget
from experiments.lab.sizes import LADDER, Rung

SLOWER = 2.0  # than what `budget.SPEED` says, a mixture trains on two cores, at these sizes
# Below the ladder, for studies of many rows; its rate is that of the three rungs above, not swept.
SMALLEST = Rung("0.05M", 32, 4, 2, batch=8, learning_rate=LADDER[0].learning_rate)


def largest(mixtures: int, *, tokens_per_parameter: float, minutes: float) -> Rung:
  """The largest size of which `mixtures` runs end in time on two cores, see `budget.largest`.

  Example:
    >>> largest(3, tokens_per_parameter=20.0, minutes=2.0).name
    '0.05M'
  """
  dense, ladder = math.ceil(SLOWER * mixtures), (SMALLEST, *LADDER)
  given = {"tokens_per_parameter": tokens_per_parameter, "minutes": minutes}
  return budget.largest(dense, ladder=ladder, **given)


@dataclasses.dataclass(frozen=True)
class Design:
  """A mixture by its numbers.

  Attributes:
    experts: that the router chooses from, E.
    top_k: experts a token visits, k.
    parts: an expert has the MLP's width over this.
    shared: experts that every token visits besides.
  """

  experts: int
  top_k: int
  parts: int
  shared: int = 0

  def of(self, dense: TransformerConfig) -> TransformerConfig:
    """`dense` with this in every layer.

    A single choice is weighted by its probability, as in Switch Transformers, so that the router
    learns from it; several by the softmax over them, as in Mixtral.
    """
    router = TopK(self.experts, self.top_k, renormalize=self.top_k > 1)
    return sparse(dense, router, self.parts, self.shared)


def sparse(
  dense: TransformerConfig, router: Router, parts: int, shared: int = 0
) -> TransformerConfig:
  """`dense` with a mixture for every MLP, its experts 1 / `parts` as wide, `shared` of them always.

  Example:
    >>> from effjax.models import presets
    >>> ffn = sparse(presets.llama(64, 48, 2, 3), TopK(8, 2), 2).layers[0].ffn
    >>> ffn.router.experts, ffn.expert.width
    (8, 64)
  """

  def change(spec):
    mlp, width = spec.ffn, spec.ffn.width // parts
    always = mlp.clone(width=shared * width) if shared else None
    return dataclasses.replace(spec, ffn=MoE(router, mlp.clone(width=width), always))

  return dataclasses.replace(dense, layers=tuple(map(change, dense.layers)), family=None)
