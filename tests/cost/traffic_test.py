import math

import pytest

from effjax.cost import (
  flash_backward_traffic,
  flash_traffic,
  score_bytes,
  standard_backward_traffic,
  standard_traffic,
)


def simulated(length, width, memory):
  """Elements moved by Algorithm 1, counted block by block."""
  keys = math.ceil(memory / (4 * width))
  rows = min(keys, width)
  moved = 0
  for j in range(0, length, keys):
    moved += 2 * min(keys, length - j) * width
    for i in range(0, length, rows):
      block = min(rows, length - i)
      moved += block * width  # Q
      moved += 2 * block * width  # O, read and written
      moved += 4 * block  # l and m, read and written
  return moved


def simulated_backward(length, width, memory):
  """Elements moved by Algorithm 4, counted block by block."""
  keys = math.ceil(memory / (4 * width))
  rows = min(keys, width)
  moved = 0
  for j in range(0, length, keys):
    moved += 4 * min(keys, length - j) * width  # K, V, and dK, dV at the end
    for i in range(0, length, rows):
      block = min(rows, length - i)
      moved += 4 * block * width  # Q, O, dO, dQ
      moved += 2 * block  # l and m
      moved += block * width  # dQ
  return moved


@pytest.mark.parametrize("shape", [(1024, 64, 50_000), (1000, 64, 9_000), (128, 32, 32)])
def test_formula_is_algorithm_1_counted(shape):
  assert flash_traffic(*shape) == simulated(*shape)
  assert flash_backward_traffic(*shape) == simulated_backward(*shape)


def test_the_steps_of_algorithm_3():
  n, d = 48, 8
  tall, square = n * d, n * n
  steps = [
    square + tall + tall,  # P, dO → dV
    tall + tall + square,  # dO, V → dP
    square + square + square,  # P, dP → dS
    square + tall + tall,  # dS, K → dQ
    square + tall + tall,  # dS, Q → dK
  ]
  assert standard_backward_traffic(n, d) == sum(steps)


def test_order_of_growth():
  length, width, memory = 1 << 17, 64, 1 << 15
  theta = length**2 * width**2 / memory
  assert flash_traffic(length, width, memory) / theta == pytest.approx(12, rel=0.05)
  assert standard_traffic(length, width) / length**2 == pytest.approx(4, rel=0.01)


def test_one_pass_over_the_lectures_scores():
  assert score_bytes(1024, 1024) == 2_147_483_648


@pytest.mark.parametrize("traffic", [flash_traffic, flash_backward_traffic])
def test_bad_memory(traffic):
  with pytest.raises(ValueError, match="memory 10"):
    traffic(10, 64, 10)
