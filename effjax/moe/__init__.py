"""Mixture of experts: routers, balance losses, dropless dispatch, the layer, and upcycling."""

from effjax.layers import Router, Routing
from effjax.moe.attention_experts import MoA
from effjax.moe.dispatch import mix_experts
from effjax.moe.gated import Gated, ResidualMoE
from effjax.moe.layer import MoE
from effjax.moe.losses import expert_shares, load_balance_loss, z_loss
from effjax.moe.routing import TopK, top_k_routing
from effjax.moe.upcycle import upcycle, upcycle_ffn

__all__ = [
  "Gated",
  "MoA",
  "MoE",
  "ResidualMoE",
  "Router",
  "Routing",
  "TopK",
  "expert_shares",
  "load_balance_loss",
  "mix_experts",
  "top_k_routing",
  "upcycle",
  "upcycle_ffn",
  "z_loss",
]
