"""Parameter-efficient fine-tuning: small trained additions to a frozen model."""

from effjax.peft import lora, prefix, ranking, retrieval
from effjax.peft.compose import compose
from effjax.peft.files import attach, detach, load, save
from effjax.peft.lora import LoRA
from effjax.peft.trainable import trainable

__all__ = [
  "LoRA",
  "attach",
  "compose",
  "detach",
  "load",
  "lora",
  "prefix",
  "ranking",
  "retrieval",
  "save",
  "trainable",
]
