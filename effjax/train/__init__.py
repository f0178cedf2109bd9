"""Training: state, optimiser, objectives, the jitted step, checkpoints and the loop."""

from effjax.train.checkpoint import Checkpoints
from effjax.train.loop import LoopConfig, fit
from effjax.train.masters import master_copies
from effjax.train.objectives import next_token, per_token, perplexity, through
from effjax.train.optimizer import OptimizerConfig, make_optimizer
from effjax.train.state import TrainState, init_state
from effjax.train.step import make_train_step

__all__ = [
  "Checkpoints",
  "LoopConfig",
  "OptimizerConfig",
  "TrainState",
  "fit",
  "init_state",
  "make_optimizer",
  "make_train_step",
  "master_copies",
  "next_token",
  "per_token",
  "perplexity",
  "through",
]
