"""Ternary matrices: the dictionary by a queue, codes by a search for the longest, and back."""

import heapq
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import trees
from effjax.quant import Ternary, quantize
from effjax.quant.dictionary import PAIRS, SIZE, ZERO, _at_once, _one_by_one, dictionary, encode

SURPRISE = (-math.log(ZERO), *[-math.log((1 - ZERO) / 2)] * 2)  # of 0, − and +


def codewords():
  """The symbols of each, read from the words."""
  found = []
  for low, high in dictionary().words.tolist():
    bits = low | (high & 0xFFFFFF) << 32
    found.append(tuple(bits >> 2 * i & 3 for i in range(2 * (high >> 24))))
  return found


def test_the_dictionary_has_the_most_probable_sequences():
  found = codewords()
  assert len(set(found)) == SIZE and max(map(len, found)) == 2 * PAIRS
  surprises = np.array([sum(SURPRISE[symbol] for symbol in word) for word in found])
  assert (np.diff(surprises) > -1e-9).all()
  rounded = [(round(s, 9), word) for s, word in zip(surprises, found, strict=True)]
  assert sorted(rounded) == rounded
  queue, expected = [(0.0, ())], []
  while len(expected) < SIZE:
    surprise, word = heapq.heappop(queue)
    expected += [(surprise, word)] if word else []
    if len(word) < 2 * PAIRS:
      for pair in np.ndindex(3, 3):
        own = SURPRISE[pair[0]] + SURPRISE[pair[1]]
        heapq.heappush(queue, (surprise + own, (*word, *pair)))
  np.testing.assert_allclose(surprises, [surprise for surprise, _ in expected], rtol=1e-9)
  least = expected[-1][0] - 1e-9  # of those that are as probable as the last, some were chosen
  assert set(found) >= {word for surprise, word in expected if surprise < least}


def test_what_a_codeword_begins_with_is_one_and_all_pairs_are():
  found = codewords()
  code = {word: i for i, word in enumerate(found)}
  child = dictionary().child
  for word, i in code.items():
    parent = code[word[:-2]] if len(word) > 2 else SIZE
    assert child[parent, 3 * word[-2] + word[-1]] == i
  assert (child >= 0).sum() == SIZE and (child[SIZE] >= 0).all()


def longest(row, words):
  """Codes of a row, each of the longest codeword that fits."""
  row, codes = [*row, *[0] * (len(row) % 2)], []
  while row:
    fits = (tuple(row[:n]) for n in range(min(len(row), 2 * PAIRS), 0, -2))
    word = next(word for word in fits if word in words)
    codes.append(words[word])
    row = row[len(word) :]
  return codes


def rows(inputs, seed=0):
  """Symbols from none but zeros to no zero at all."""
  rng = np.random.default_rng(seed)
  p = [0, 0.01, 0.05, 0.1, 0.3, 0.7, 1]
  return np.where(
    rng.random((7, inputs)) < np.array(p)[:, None], rng.integers(1, 3, (7, inputs)), 0
  )


@pytest.mark.parametrize("inputs", [1, 28, 151])
def test_codes_are_of_the_longest_codewords_and_come_back(inputs):
  symbols = rows(inputs, seed=inputs)
  words = {word: i for i, word in enumerate(codewords())}
  expected = [longest(row.tolist(), words) for row in symbols]
  codes, counts = encode(symbols)
  assert counts.tolist() == [len(row) for row in expected]
  assert codes.tolist() == [code for row in expected for code in row]
  made = Ternary.of(symbols, jnp.tile(jnp.array([-2.0, 3.0]), (7, 1)), dtype=jnp.float32)
  assert made.most == counts.max() and made.codes.shape == (counts.sum(),)
  want = np.array([0, -2, 3], np.float32)[symbols]
  np.testing.assert_array_equal(made.materialize(), want.T)
  np.testing.assert_array_equal(made.T.take(jnp.array([[6, 0], [3, 3]])), want[[[6, 0], [3, 3]]])


def test_rows_are_written_the_same_one_by_one_and_at_once():
  codes = np.random.default_rng(0).integers(0, SIZE, (5, 20))
  words = dictionary().words[codes]
  length = (words[..., 1] >> 24).astype(np.int32)
  first = np.cumsum(length, -1) - length
  pairs = int(length.sum(-1).min())
  given = jnp.asarray(words), jnp.asarray(first)
  one, other = (np.asarray(write(*given, pairs=pairs)) for write in (_one_by_one, _at_once))
  np.testing.assert_array_equal(one, other)
  found = codewords()
  for row, held in zip(codes, one, strict=True):
    symbols = np.concatenate([found[code] for code in row])[: 2 * pairs]
    np.testing.assert_array_equal(np.stack([held & 3, held >> 2], 1).ravel(), symbols)


def test_numbers_are_the_nearest_of_three():
  w = np.random.default_rng(1).normal(size=(2, 3, 50, 9)).astype(np.float32)
  w[0, 0, :, 0], w[1, 1, :, 1], w[0, 1, :, 2] = 0, np.abs(w[1, 1, :, 1]), 7
  values = np.stack([np.minimum(w.min(-2), 0), np.zeros((2, 3, 9)), np.maximum(w.max(-2), 0)], -1)
  nearest = np.abs(w[..., None] - values[..., None, :, :]).argmin(-1)
  want = np.take_along_axis(values[..., None, :, :], nearest[..., None], -1)[..., 0]
  made = Ternary.quantize(w)
  np.testing.assert_allclose(made.materialize(), want, rtol=1e-6)
  turned = Ternary.quantize(np.swapaxes(w, -1, -2), table=True)
  np.testing.assert_array_equal(turned.materialize(), np.swapaxes(made.materialize(), -1, -2))
  half = Ternary.quantize(w, scale_dtype=jnp.bfloat16)
  np.testing.assert_allclose(half.materialize(), want, rtol=2**-8)
  exactly = Ternary.quantize(np.array([[4.0, -4.0], [2.0, -2.0]], np.float32))
  np.testing.assert_array_equal(exactly.materialize(), [[4, -4], [0, 0]])


def test_products_and_gradients_of_many_tiles():
  w = np.random.default_rng(2).normal(size=(20, 300)).astype(np.float32)
  made, x = Ternary.quantize(w), np.ones((3, 20), np.float32)
  x[:, 5:] = -2
  dense = np.asarray(made)
  run = jax.jit(lambda w, x: (w.matmul(x), w.T.matmul(w.matmul(x)), jax.grad(
    lambda x: jnp.square(w.matmul(x)).sum())(x)))  # fmt: skip
  y, back, grad = run(made, x)
  np.testing.assert_allclose(y, x @ dense, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(back, x @ dense @ dense.T, rtol=1e-4, atol=1e-2)
  np.testing.assert_allclose(grad, 2 * x @ dense @ dense.T, rtol=1e-4, atol=1e-2)


def test_a_normal_matrix_takes_less_than_a_bit_a_weight():
  w = np.random.default_rng(3).normal(size=(1024, 256)).astype(np.float32)
  made = Ternary.quantize(w, scale_dtype=jnp.bfloat16)
  bits = 8 * trees.nbytes(made) / w.size
  zeros = float((np.asarray(made) == 0).mean())
  entropy = -zeros * math.log2(zeros) - (1 - zeros) * math.log2((1 - zeros) / 2)
  assert zeros > 0.85 and entropy < bits < 1 and bits == 16 * made.codes.size / w.size + 64 / 1024


@pytest.mark.usefixtures("optimized")
def test_a_product_expands_some_rows_at_a_time():
  w = Ternary.quantize(np.random.default_rng(4).normal(size=(64, 8192)).astype(np.float32))
  x = jnp.ones((1, 64))
  for run in (lambda w, x: w.matmul(x), jax.grad(lambda w, x: w.matmul(x).sum(), argnums=1)):
    held = jax.jit(run).lower(w, x).compile().memory_analysis().temp_size_in_bytes
    assert held < 4 * 64 * 8192 / 2


@pytest.mark.parametrize(
  ("w", "options", "message"),
  [
    (np.ones((4, 2), int), {}, "w is int64.*allowed: matrices"),
    (np.full((4, 2), np.nan, np.float32), {}, "w has NaN"),
    (np.full((4, 2), np.inf, np.float32), {}, "w has NaN, infinity"),
    (np.ones((4, 2), np.float32), {"scale_dtype": jnp.float16}, "scale_dtype float16; allowed"),
  ],
)
def test_bad_arguments_are_named(w, options, message):
  with pytest.raises(ValueError, match=message):
    Ternary.quantize(w, **options)


def test_what_is_traced_is_refused():
  with pytest.raises(ValueError, match=r"kernel: w is a traced float32\[4,2\]; allowed: known"):
    jax.jit(lambda w: quantize({"kernel": w}, "ternary"))(jnp.ones((4, 2)))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 2, 3)])
def test_matrices_of_nothing(shape):
  made = Ternary.quantize(np.ones(shape, np.float32))
  assert made.shape == shape and made.materialize().shape == shape
  if len(shape) == 2:
    np.testing.assert_array_equal(made.matmul(jnp.ones((2, shape[0]))), np.zeros((2, shape[1])))


def test_fields_that_do_not_fit_are_refused():
  made = Ternary.quantize(np.ones((4, 2), np.float32))
  fields = {"inputs": 4, "most": made.most}
  with pytest.raises(ValueError, match=r"values are float32\[3, 2\]; allowed: float32\[2, 2\]"):
    Ternary(made.codes, made.starts, jnp.ones((3, 2)), **fields)
  with pytest.raises(ValueError, match=r"codes are int32.*allowed: uint16"):
    Ternary(made.codes.astype(jnp.int32), made.starts, made.values, **fields)
