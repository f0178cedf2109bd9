"""Mixture of experts: routing, balance losses, dropless dispatch, the layer, and upcycling."""

from effjax.moe.dispatch import mix_experts
from effjax.moe.layer import MoE
from effjax.moe.losses import expert_shares, load_balance_loss, z_loss
from effjax.moe.routing import Routing, top_k_routing
from effjax.moe.upcycle import upcycle, upcycle_ffn

__all__ = [
  "MoE",
  "Routing",
  "expert_shares",
  "load_balance_loss",
  "mix_experts",
  "top_k_routing",
  "upcycle",
  "upcycle_ffn",
  "z_loss",
]
