"""Attention: what patterns save, move, reach and cost."""
