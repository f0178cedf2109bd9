"""Adapters of pretrained models in the folders of Hugging Face's peft, both ways."""

from effjax.models.exchange.transfer import load, save

__all__ = ["load", "save"]
