"""Mixture of experts: routers, balance losses, dropless dispatch, the layer, and upcycling."""

from effjax.layers import Router, Routing
from effjax.moe import hash_tables
from effjax.moe.attention_experts import MoA
from effjax.moe.dispatch import mix_experts
from effjax.moe.gated import Gated, ResidualMoE
from effjax.moe.layer import MoE
from effjax.moe.losses import expert_shares, load_balance_loss, z_loss
from effjax.moe.multi_hash import MultiHash
from effjax.moe.routers.hash import Hash, hash_routing
from effjax.moe.routing import TopK, top_k_routing
from effjax.moe.upcycle import upcycle, upcycle_ffn

__all__ = [
  "Gated",
  "Hash",
  "MoA",
  "MoE",
  "MultiHash",
  "ResidualMoE",
  "Router",
  "Routing",
  "TopK",
  "expert_shares",
  "hash_routing",
  "hash_tables",
  "load_balance_loss",
  "mix_experts",
  "top_k_routing",
  "upcycle",
  "upcycle_ffn",
  "z_loss",
]
