"""Parameter-efficient fine-tuning: small trained additions to a frozen model."""

from effjax.peft import bottleneck, experts, ia3, lora, named
from effjax.peft.adapter import Tuned
from effjax.peft.combine import combine
from effjax.peft.detached import attach, detach
from effjax.peft.dora import DoRA
from effjax.peft.files import load, save
from effjax.peft.ia3 import IA3
from effjax.peft.lora import merge, unmerge
from effjax.peft.low_rank import LoRA
from effjax.peft.mixture import Named
from effjax.peft.trainable import trainable
from effjax.peft.tuning import bitfit, tune

__all__ = [
  "IA3",
  "DoRA",
  "LoRA",
  "Named",
  "Tuned",
  "attach",
  "bitfit",
  "bottleneck",
  "combine",
  "detach",
  "experts",
  "ia3",
  "load",
  "lora",
  "merge",
  "named",
  "save",
  "trainable",
  "tune",
  "unmerge",
]
