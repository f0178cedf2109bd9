"""Parameter-efficient fine-tuning: small trained additions to a frozen model."""

from effjax.peft import adapters, experts, ia3, lora, named, prefix, ranking, retrieval, soft_prompt
from effjax.peft.beside import Tuned
from effjax.peft.combine import combine
from effjax.peft.compose import compose
from effjax.peft.detached import attach, detach
from effjax.peft.dora import DoRA
from effjax.peft.files import load, save
from effjax.peft.ia3 import IA3
from effjax.peft.low_rank import LoRA
from effjax.peft.merging import merge, unmerge
from effjax.peft.mixture import Named
from effjax.peft.trainable import trainable
from effjax.peft.tuning import bitfit, tune

__all__ = [
  "IA3",
  "DoRA",
  "LoRA",
  "Named",
  "Tuned",
  "adapters",
  "attach",
  "bitfit",
  "combine",
  "compose",
  "detach",
  "experts",
  "ia3",
  "load",
  "lora",
  "merge",
  "named",
  "prefix",
  "ranking",
  "retrieval",
  "save",
  "soft_prompt",
  "trainable",
  "tune",
  "unmerge",
]
