"""Mixture of experts: routers, balance losses, dispatch, the layer, upcycling and splitting."""

from effjax.layers import Router, Routing
from effjax.moe import splitting
from effjax.moe.dispatch import mix_experts
from effjax.moe.layer import MoE
from effjax.moe.losses import expert_shares, load_balance_loss, z_loss
from effjax.moe.merging import merge_experts
from effjax.moe.routing import TopK, top_k_routing
from effjax.moe.splitting import split_ffn
from effjax.moe.upcycle import upcycle, upcycle_ffn

__all__ = [
  "MoE",
  "Router",
  "Routing",
  "TopK",
  "expert_shares",
  "load_balance_loss",
  "merge_experts",
  "mix_experts",
  "split_ffn",
  "splitting",
  "top_k_routing",
  "upcycle",
  "upcycle_ffn",
  "z_loss",
]
