"""Losses that keep experts in use, as functions of the tokens of one layer.

A model averages them over its layers. They are never computed on layers laid end to end, as some
libraries do: there one layer's surplus would cancel another's shortage. Where a paper adds them
over layers, its coefficient is that many times larger here.
"""

from effjax.moe.losses.balance import expert_shares, load_balance_loss
from effjax.moe.losses.entropy import mutual_information_loss, z_loss
from effjax.moe.losses.variation import (
  chosen_gates,
  importance_loss,
  load_loss,
  smooth_load,
  variation,
)

__all__ = [
  "chosen_gates",
  "expert_shares",
  "importance_loss",
  "load_balance_loss",
  "load_loss",
  "mutual_information_loss",
  "smooth_load",
  "variation",
  "z_loss",
]
