"""Distillation: a student learns from a teacher's outputs."""

from effjax.distill.kd import divergence, kd_loss, kd_objective

__all__ = ["divergence", "kd_loss", "kd_objective"]
