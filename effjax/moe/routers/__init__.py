"""Routers: functions from logits to a decision, and a module for each, a value for `MoE.router`.

One paper a file, the function first. What their modules share is `Scored`: the product in float32,
the losses, and what they sow of their health.
"""

from effjax.moe.routers.batch_priority import BatchPriority, batch_priority_routing
from effjax.moe.routers.capacity import Capacity, drop_overflow
from effjax.moe.routers.expert_choice import ExpertChoice, expert_choice_routing
from effjax.moe.routers.groups import GroupLimit
from effjax.moe.routers.gshard import GShard, gshard_routing
from effjax.moe.routers.hash import Hash, hash_routing
from effjax.moe.routers.noisy import NoisyTopK, noisy_top_k_routing
from effjax.moe.routers.sigmoid import SigmoidTopK, move_bias, sigmoid_routing
from effjax.moe.routers.switch import Switch, switch_routing
from effjax.moe.routers.top_k import TopK, top_k_routing

__all__ = [
  "BatchPriority",
  "Capacity",
  "ExpertChoice",
  "GShard",
  "GroupLimit",
  "Hash",
  "NoisyTopK",
  "SigmoidTopK",
  "Switch",
  "TopK",
  "batch_priority_routing",
  "drop_overflow",
  "expert_choice_routing",
  "gshard_routing",
  "hash_routing",
  "move_bias",
  "noisy_top_k_routing",
  "sigmoid_routing",
  "switch_routing",
  "top_k_routing",
]
