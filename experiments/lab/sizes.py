"""The ladder of small models: from 0.1 to 2.7 million parameters besides the token table."""

import dataclasses

import jax

from effjax import cost
from effjax.models import Transformer, TransformerConfig, presets
from experiments.lab.subject import init


@dataclasses.dataclass(frozen=True)
class Rung:
  """A size of model and how it trains, whatever the technique.

  Attributes:
    name: its parameters besides the token table.
    width, layers, heads: of the dense model, a Llama.
    batch: rows of a step.
    learning_rate: the peak, the best of `results/learning_rates`; the two upper rungs, which are
      not in it, have that of the largest one that is.
    vocab: ids of the vocabulary, trained on the text.
    length: tokens of a row.
  """

  name: str
  width: int
  layers: int
  heads: int
  batch: int
  learning_rate: float
  vocab: int = 1024
  length: int = 128

  def config(self, layers: int | None = None) -> TransformerConfig:
    """The dense model, or one of another number of layers."""
    layers = self.layers if layers is None else layers
    return presets.llama(
      self.vocab, self.width, layers, self.heads, self.heads, context=self.length
    )


LADDER = (
  Rung("0.1M", 48, 4, 3, batch=8, learning_rate=8e-3),
  Rung("0.2M", 64, 4, 4, batch=8, learning_rate=8e-3),
  Rung("0.4M", 96, 4, 4, batch=16, learning_rate=8e-3),
  Rung("0.8M", 128, 4, 4, batch=16, learning_rate=4e-3),
  Rung("1.6M", 160, 5, 5, batch=32, learning_rate=4e-3),
  Rung("2.7M", 192, 6, 6, batch=32, learning_rate=4e-3),
)


def parameters(config: TransformerConfig) -> int:
  """All parameters of a model, the token table's included."""
  return cost.parameters(jax.eval_shape(init, Transformer(config), jax.random.key(0)))
