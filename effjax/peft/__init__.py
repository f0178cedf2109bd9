"""Parameter-efficient fine-tuning: small trained additions to a frozen model."""

from effjax.peft import lora
from effjax.peft.detached import attach, detach
from effjax.peft.dora import DoRA
from effjax.peft.files import load, save
from effjax.peft.low_rank import LoRA
from effjax.peft.trainable import trainable

__all__ = ["DoRA", "LoRA", "attach", "detach", "load", "lora", "save", "trainable"]
