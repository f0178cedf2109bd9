"""Algorithm 1 against attention written out, and what it moves against the closed formulas."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effjax import cost
from effjax.kernels.flash_attention import algorithm1

SIZES = [(64, 8, 256), (61, 8, 250), (40, 16, 16), (30, 4, 10_000), (1, 1, 1)]


def head(length, width, seed=0, scale=1.0):
  """Query, key and value of one head."""
  return scale * np.random.default_rng(seed).normal(size=(3, length, width))


def written_out(query, key, value):
  """Attention and its log-sum-exp in extended precision."""
  query, key, value = (x.astype(np.longdouble) for x in (query, key, value))
  weights = np.exp(query @ key.T / np.sqrt(np.longdouble(query.shape[1])))
  total = weights.sum(axis=1)
  return weights @ value / total[:, None], np.log(total)


@pytest.mark.parametrize("size", SIZES)
def test_algorithm_1_is_attention_and_moves_what_the_formula_says(size):
  length, width, memory = size
  x = head(length, width)
  result = algorithm1.flash_attention(*x, memory=memory)
  out, lse = written_out(*x)
  np.testing.assert_allclose(result.out, out, rtol=1e-12, atol=1e-14)
  np.testing.assert_allclose(result.lse, lse, rtol=1e-12, atol=1e-14)
  assert result.counts.moved == cost.flash_traffic(*size)
  assert result.counts.held <= algorithm1.room(width, memory)


@settings(max_examples=30)
@given(st.integers(1, 70), st.integers(1, 20), st.integers(0, 600), st.integers(0, 9))
def test_any_sizes(length, width, more, seed):
  x = head(length, width, seed)
  result = algorithm1.flash_attention(*x, memory=width + more)
  np.testing.assert_allclose(result.out, written_out(*x)[0], rtol=1e-11, atol=1e-13)
  assert result.counts.moved == cost.flash_traffic(length, width, width + more)


def test_blocks_that_divide_fill_the_room_and_are_counted():
  length, width, memory = 64, 8, 256  # 8 keys and 8 queries a block
  counts = algorithm1.flash_attention(*head(length, width), memory=memory).counts
  assert algorithm1.block_sizes(width, memory) == (8, 8)
  assert counts.held == algorithm1.room(width, memory)
  assert counts.transfers == 8 * (2 + 8 * 7)  # K, V; then Q, O, l, m and O, l, m back
  assert counts.stored == 8 * length * (width + 2)


@pytest.mark.parametrize(("memory", "fits"), [(8 * 64**2 + 16 * 64 + 2048, True), (9_000, False)])
def test_whether_it_fits_into_the_memory_it_was_given(memory, fits):
  assert (algorithm1.room(64, memory) <= memory) == fits


def test_large_scores_do_not_overflow():
  x = head(32, 4, scale=60.0)
  result = algorithm1.flash_attention(*x, memory=64)
  assert np.isfinite(result.out).all()
  assert result.lse.max() > math.log(np.finfo(float).max)


@pytest.mark.parametrize("rows", [1, 16, 25, 100])
def test_algorithm_0_is_attention_and_moves_what_the_formula_says(rows):
  x = head(50, 8)
  result = algorithm1.standard_attention(*x, rows=rows)
  out, lse = written_out(*x)
  np.testing.assert_allclose(result.out, out, rtol=1e-12, atol=1e-14)
  np.testing.assert_allclose(result.lse, lse, rtol=1e-12)
  assert result.counts.moved == cost.standard_traffic(50, 8)
  assert result.counts.stored == 50 * 8 + 2 * 50**2


def test_fast_memory_refuses_more_than_it_has_and_keeps_what_is_in_slow_memory():
  memory = algorithm1.Memory(6, X=np.zeros((4, 2)))
  memory.load(slice(0, 3), "X")
  memory["X"] += 1
  assert memory.slow["X"].sum() == 0
  with pytest.raises(MemoryError, match="6 elements: 7 with Y"):
    memory["Y"] = np.zeros(1)
  memory.free("X", "Y")
  memory["Y"] = np.zeros(6)


def test_wrong_arguments_are_named():
  x = head(8, 4)
  with pytest.raises(ValueError, match="memory=3; allowed: from the head width 4"):
    algorithm1.flash_attention(*x, memory=3)
  with pytest.raises(ValueError, match="rows=0"):
    algorithm1.standard_attention(*x, rows=0)
  with pytest.raises(ValueError, match=r"shapes .*\(7, 4\).*one \[N, d\]"):
    algorithm1.flash_attention(x[0], x[1][:7], x[2], memory=64)
