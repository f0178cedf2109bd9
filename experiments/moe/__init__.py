"""Mixtures of experts: what they are made of, and what they learn."""
