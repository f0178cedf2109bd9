"""Parameter-efficient fine-tuning: small trained additions to a frozen model."""

from effjax.peft import ia3, lora, prefix, soft_prompt
from effjax.peft.adapter import Tuned
from effjax.peft.compose import compose
from effjax.peft.detached import attach, detach
from effjax.peft.dora import DoRA
from effjax.peft.files import load, save
from effjax.peft.ia3 import IA3
from effjax.peft.low_rank import LoRA
from effjax.peft.merging import merge
from effjax.peft.trainable import trainable
from effjax.peft.tuning import bitfit, tune

__all__ = [
  "IA3",
  "DoRA",
  "LoRA",
  "Tuned",
  "attach",
  "bitfit",
  "compose",
  "detach",
  "ia3",
  "load",
  "lora",
  "merge",
  "prefix",
  "save",
  "soft_prompt",
  "trainable",
  "tune",
]
