"""Exact attention that never holds the T × S matrix of scores."""
