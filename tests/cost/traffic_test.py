import math

import pytest

from effjax.cost import flash_traffic, score_bytes, standard_traffic


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


@pytest.mark.parametrize("shape", [(1024, 64, 50_000), (1000, 64, 9_000), (128, 32, 32)])
def test_formula_is_algorithm_1_counted(shape):
  assert flash_traffic(*shape) == simulated(*shape)


def test_order_of_growth():
  length, width, memory = 1 << 17, 64, 1 << 15
  theta = length**2 * width**2 / memory
  assert flash_traffic(length, width, memory) / theta == pytest.approx(12, rel=0.05)
  assert standard_traffic(length, width) / length**2 == pytest.approx(4, rel=0.01)


def test_one_pass_over_the_lectures_scores():
  assert score_bytes(1024, 1024) == 2_147_483_648


def test_bad_memory():
  with pytest.raises(ValueError, match="memory 10"):
    flash_traffic(10, 64, 10)
