"""Optimisers by configuration, over optax."""

import dataclasses

import jax
import optax

from effjax.core import trees
from effjax.core.typing import PyTree
from effjax.train.adafactor import scale_by_adafactor
from effjax.train.masters import master_copies


@dataclasses.dataclass
class OptimizerConfig:
  """An optimiser and its schedule.

  Attributes:
    name: "adamw" (arXiv 1711.05101) or "adafactor" (arXiv 1804.04235).
    learning_rate: the peak.
    warmup: steps of linear rise.
    steps: steps until the end of the cosine.
    final: the learning rate at the end, as a part of the peak.
    b1, b2, eps: moments of AdamW.
    weight_decay: decoupled decay of matrices; norms and biases have none.
    decay: pattern of the parameters that count as matrices, on their last two axes; others count
      as vectors, on the last.
    clip: largest global norm of the gradients; 0 for no clipping.
  """

  name: str = "adamw"
  learning_rate: float = 1e-3
  warmup: int = 100
  steps: int = 1000
  final: float = 0.1
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1
  decay: str = "kernel|embedding"
  clip: float = 1.0


def schedule(config: OptimizerConfig) -> optax.Schedule:
  """Linear warm-up, then half a cosine (Loshchilov & Hutter, arXiv 1608.03983).

  With peak η, W warm-up steps, S steps and final part φ, step t = 0 … S − 1 takes
  η · (t + 1)/W for t < W, then η · (φ + (1 − φ)(1 + cos π u)/2), u = (t − W)/(S − W).

  Example:
    >>> rate = schedule(OptimizerConfig(learning_rate=1.0, warmup=2, steps=4, final=0.0))
    >>> [round(float(rate(t)), 2) for t in range(5)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
  """
  _check(config)
  peak, warmup = config.learning_rate, config.warmup
  rise = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
  fall = optax.cosine_decay_schedule(peak, max(config.steps - warmup, 1), config.final)
  return optax.join_schedules([rise, fall], [warmup])


def matrices(params: PyTree, pattern: str = OptimizerConfig.decay) -> PyTree:
  """True at the parameters that decay: those of a matching path, whatever their stacked axes.

  Example:
    >>> matrices({"norm": {"scale": 1.0}, "up": {"kernel": 2.0, "bias": 3.0}})
    {'norm': {'scale': False}, 'up': {'bias': False, 'kernel': True}}
  """
  visit = lambda path, leaf: trees.chooses(pattern, trees.path_string(path), leaf)
  return jax.tree_util.tree_map_with_path(visit, params)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
  """Clipping, then the optimiser of `config` on its schedule, all in float32 (`master_copies`).

  Norms, moments and updates are in float32 where parameters and gradients have 16 bits.

  Raises:
    ValueError: for an unknown name, or a number out of range.

  Example:
    >>> import jax.numpy as jnp
    >>> optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1, warmup=0, clip=0.0))
    >>> state = optimizer.init({"kernel": jnp.ones((2, 2))})
  """
  rate = schedule(config)
  decay = lambda params: matrices(params, config.decay)
  if config.name == "adamw":
    moments = {"b1": config.b1, "b2": config.b2, "eps": config.eps}
    rule = optax.adamw(rate, **moments, weight_decay=config.weight_decay, mask=decay)
  else:
    decayed = optax.add_decayed_weights(config.weight_decay, mask=decay)
    rule = optax.chain(scale_by_adafactor(decay), decayed, optax.scale_by_learning_rate(rate))
  clipped = optax.chain(optax.clip_by_global_norm(config.clip), rule) if config.clip else rule
  return master_copies(clipped)


def _check(config: OptimizerConfig) -> None:
  if config.name not in ("adamw", "adafactor"):
    raise ValueError(f"optimizer: name={config.name!r}; allowed: 'adamw', 'adafactor'")
  bounds = {"learning_rate": 0.0, "warmup": 0, "steps": 1, "final": 0.0, "weight_decay": 0.0}
  for name, least in {**bounds, "clip": 0.0}.items():
    if not getattr(config, name) >= least:
      raise ValueError(f"optimizer: {name}={getattr(config, name)}; allowed: from {least}")
