"""Routing in loops over tokens and experts, in float64."""

import numpy as np


def softmax(logits):
  exp = np.exp(np.asarray(logits, np.float64) - np.max(logits, axis=-1, keepdims=True))
  return exp / exp.sum(axis=-1, keepdims=True)


def best(scores, k):
  """The k largest of each row, of equal ones the first."""
  return np.argsort(-np.asarray(scores), axis=-1, kind="stable")[:, :k]


def top_k(logits, k, renormalize):
  probs = softmax(logits)
  experts = best(logits, k)
  gates = np.take_along_axis(probs, experts, axis=-1)
  return experts, gates / gates.sum(axis=-1, keepdims=True) if renormalize else gates


def limited(experts, gates, capacity, count, mask=None, order=None):
  """The choices that find room: first ones of all rows, then second ones, rows in their order."""
  experts, gates = np.array(experts), np.array(gates)
  taken = np.zeros(count, int)
  for choice in range(experts.shape[1]):
    for row in range(len(experts)) if order is None else order:
      expert = experts[row, choice]
      there = (mask is None or mask[row]) and expert < count
      if there and taken[expert] < capacity:
        taken[expert] += 1
      else:
        experts[row, choice], gates[row, choice] = count, 0
  return experts, gates


def expert_choice(logits, capacity, mask=None):
  """Rows [E, C] and gates."""
  probs = softmax(logits)
  there = np.arange(len(probs)) if mask is None else np.flatnonzero(mask)
  rows = np.full((probs.shape[1], min(capacity, len(probs))), len(probs))
  gates = np.zeros(rows.shape)
  for expert in range(probs.shape[1]):
    chosen = sorted(there, key=lambda row: -probs[row, expert])[: rows.shape[1]]
    rows[expert, : len(chosen)], gates[expert, : len(chosen)] = chosen, probs[chosen, expert]
  return rows, gates
