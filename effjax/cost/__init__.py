"""What something takes: worked out from its description, and read off the compiled program."""

from effjax.cost.communication import zero_communication
from effjax.cost.compiled import Compiled, compiled
from effjax.cost.flops import flops, sequence_flops
from effjax.cost.memory import (
  Memory,
  cache_bytes,
  residual_bytes,
  transformer_activations,
  vram,
  zero_memory,
)
from effjax.cost.parameters import active_parameters, parameters, state_bytes, trainable
from effjax.cost.speculation import expected_tokens, operations, speedup
from effjax.cost.traffic import (
  flash_backward_traffic,
  flash_traffic,
  score_bytes,
  standard_backward_traffic,
  standard_traffic,
)

__all__ = [
  "Compiled",
  "Memory",
  "active_parameters",
  "cache_bytes",
  "compiled",
  "expected_tokens",
  "flash_backward_traffic",
  "flash_traffic",
  "flops",
  "operations",
  "parameters",
  "residual_bytes",
  "score_bytes",
  "sequence_flops",
  "speedup",
  "standard_backward_traffic",
  "standard_traffic",
  "state_bytes",
  "trainable",
  "transformer_activations",
  "vram",
  "zero_communication",
  "zero_memory",
]
