"""Blocks of GGUF files beside the gguf package."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.kernels.quantized_matmul.gguf_blocks import SIZES
from effjax.quant import GGUF
from effjax.quant.gguf_blocks import MADE


def blocks(kind, rows=6, n=2):
  """Random bytes [rows, n blocks] whose float16 constants are small numbers."""
  random = np.random.default_rng(len(kind))
  raw = random.integers(0, 256, (rows, n, SIZES[kind][1])).astype(np.uint8)
  constants = random.normal(size=(rows, n, 2)).astype(np.float16).view(np.uint8)
  if kind == "Q6_K":
    raw[..., -2:] = constants[..., :2]
  else:
    count = 4 if kind.endswith(("_1", "_K")) else 2
    raw[..., :count] = constants[..., :count]
  return raw.reshape(rows, -1)


@pytest.mark.parametrize("kind", SIZES)
def test_numbers_are_those_of_the_gguf_package_to_the_bit(kind):
  raw, of = blocks(kind), gguf.GGMLQuantizationType[kind]
  assert gguf.GGML_QUANT_SIZES[of] == SIZES[kind]
  expected = gguf.quants.dequantize(raw, of)
  w = GGUF(jnp.asarray(raw), type=kind)
  assert w.shape == expected.T.shape
  np.testing.assert_array_equal(jax.jit(lambda w: w.materialize())(w), expected.T)
  table = GGUF(jnp.asarray(raw), type=kind, table=True)
  np.testing.assert_array_equal(table.take(jnp.array([5, 0])), expected[[5, 0]])


@pytest.mark.parametrize("kind", MADE)
def test_what_is_made_is_what_the_gguf_package_makes(kind):
  w = np.random.default_rng(0).normal(size=(96, 10)).astype(np.float32)
  w[:32, 3] = 0
  expected = gguf.quants.quantize(np.ascontiguousarray(w.T), gguf.GGMLQuantizationType[kind])
  np.testing.assert_array_equal(GGUF.quantize(w, type=kind).codes, expected)


@pytest.mark.parametrize(
  ("w", "kind", "message"),
  [
    (jnp.ones((64, 4)), "Q4_K", "type 'Q4_K'; allowed: Q8_0, Q4_0"),
    (jnp.ones((48, 4)), "Q8_0", "block 32 does not divide the 48 inputs"),
    (jnp.full((32, 4), 1e30), "Q8_0", "no scale in float16"),
    (jnp.full((32, 4), jnp.nan), "Q4_1", "w has NaN"),
  ],
)
def test_bad_arguments_are_named(w, kind, message):
  with pytest.raises(ValueError, match=message):
    GGUF.quantize(w, type=kind)


def test_a_type_or_bytes_that_are_none_are_named():
  with pytest.raises(ValueError, match="GGUF: type 'Q3_K'; allowed: Q8_0"):
    GGUF(jnp.ones((4, 34), jnp.uint8), type="Q3_K")
  with pytest.raises(ValueError, match=r"GGUF: codes are uint8\[4, 33\]; allowed: .* 34 bytes"):
    GGUF(jnp.ones((4, 33), jnp.uint8))
