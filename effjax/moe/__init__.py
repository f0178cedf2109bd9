"""Mixture of experts: routers, balance losses, dispatch, the layer, upcycling and splitting."""

from effjax.layers import ExpertRouting, Router, Routing
from effjax.moe import hash_tables, splitting
from effjax.moe.attention_experts import MoA
from effjax.moe.dispatch import mix, mix_experts, mix_rows
from effjax.moe.gated import Gated, ResidualMoE
from effjax.moe.layer import MoE
from effjax.moe.losses import (
  chosen_gates,
  expert_shares,
  importance_loss,
  load_balance_loss,
  load_loss,
  mutual_information_loss,
  smooth_load,
  z_loss,
)
from effjax.moe.merging import merge_experts
from effjax.moe.multi_hash import MultiHash
from effjax.moe.plots import plot_load
from effjax.moe.routers import (
  BatchPriority,
  Capacity,
  ExpertChoice,
  GroupLimit,
  GShard,
  Hash,
  NoisyTopK,
  SigmoidTopK,
  Switch,
  TopK,
  batch_priority_routing,
  drop_overflow,
  expert_choice_routing,
  gshard_routing,
  hash_routing,
  move_bias,
  noisy_top_k_routing,
  sigmoid_routing,
  switch_routing,
  top_k_routing,
)
from effjax.moe.splitting import split_ffn
from effjax.moe.upcycle import upcycle, upcycle_ffn

__all__ = [
  "BatchPriority",
  "Capacity",
  "ExpertChoice",
  "ExpertRouting",
  "GShard",
  "Gated",
  "GroupLimit",
  "Hash",
  "MoA",
  "MoE",
  "MultiHash",
  "NoisyTopK",
  "ResidualMoE",
  "Router",
  "Routing",
  "SigmoidTopK",
  "Switch",
  "TopK",
  "batch_priority_routing",
  "chosen_gates",
  "drop_overflow",
  "expert_choice_routing",
  "expert_shares",
  "gshard_routing",
  "hash_routing",
  "hash_tables",
  "importance_loss",
  "load_balance_loss",
  "load_loss",
  "merge_experts",
  "mix",
  "mix_experts",
  "mix_rows",
  "move_bias",
  "mutual_information_loss",
  "noisy_top_k_routing",
  "plot_load",
  "sigmoid_routing",
  "smooth_load",
  "split_ffn",
  "splitting",
  "switch_routing",
  "top_k_routing",
  "upcycle",
  "upcycle_ffn",
  "z_loss",
]
