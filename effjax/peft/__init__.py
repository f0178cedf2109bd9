"""Parameter-efficient fine-tuning: small trained additions to a frozen model."""

from effjax.peft import lora
from effjax.peft.detached import attach, detach
from effjax.peft.files import load, save
from effjax.peft.lora import LoRA
from effjax.peft.trainable import trainable

__all__ = ["LoRA", "attach", "detach", "load", "lora", "save", "trainable"]
