"""What cuDNN is not asked for, and what becomes of its answers. What it gives, a GPU shows.

Attention in plain XLA, which multiplies what is hidden by zero as cuDNN does, stands in for it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging

from effjax.attention.masks import Causal, Full, PerHead, SlidingWindow, longformer
from effjax.attention.scores import ALiBi
from effjax.kernels.flash_attention import cases
from effjax.kernels.flash_attention.fused import cudnn, gpu
from effjax.kernels.flash_attention.fused.sizes import Size, Sizes

CAUSAL = {"mask": Causal(), "bias": None, "logit_softcap": None, "segment_ids": None}
CAUSAL |= {"query_positions": None, "scale": 0.4}
REFUSED = {
  "type float32": {"dtype": jnp.float32},
  "the log-sum-exp": {"return_lse": True},
  "mask And": {"mask": longformer(4, (0,), causal=True)},
  "mask SlidingWindow": {"mask": SlidingWindow(4, 1)},
  "mask PerHead": {"mask": PerHead((Causal(), Full()), (0, 1))},
  "fewer queries than keys": {"T": 8},
  "more queries than keys": {"T": 18},
  "a soft cap": {"logit_softcap": 30.0},
  "scores": {"scores": ALiBi.standard(2)},
  "segment ids": {"segment_ids": (jnp.zeros((1, 16)),) * 2},
  "query positions": {"query_positions": jnp.zeros((1, 16))},
  "head widths 160 and 160": {"H": 160},
  "head widths 20 and 20": {"H": 20},
  "scale 0": {"scale": 0.0},
  "a bias shared along queries or keys": {"bias": jnp.zeros((1, 2, 1, 16))},
  "a bias of float32": {"bias": jnp.zeros((1, 2, 16, 16))},
  "a bias of an odd length": {"bias": jnp.zeros((1, 2, 17, 16), jnp.bfloat16), "T": 17},
  "8 queries and 16 keys": {"mask": Full(), "T": 8},
}


@pytest.fixture(autouse=True)
def ampere(monkeypatch):
  monkeypatch.setattr(cudnn, "_widest", lambda: 128)


def refusal(T=16, H=64, dtype=jnp.bfloat16, return_lse=False, **options):
  q, k = (jnp.zeros((1, length, 2, H), dtype) for length in (T, 16))
  return cudnn.refusal(q, k, k, return_lse=return_lse, **(CAUSAL | options))


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals_name_the_reason(reason):
  options = REFUSED[reason]
  if reason == "a bias of an odd length":
    options = options | {"mask": Full()}
  assert refusal(**options).startswith(reason)


@pytest.mark.parametrize(
  "mask", [Full(), Causal(), SlidingWindow(5, 0), Causal() & SlidingWindow(5, 3)]
)
def test_bands_are_not_refused(mask):
  assert refusal(mask=mask) is None
  if mask.band[0] is None:
    assert refusal(mask=mask, bias=jnp.zeros((1, 2, 16, 16), jnp.bfloat16)) is None


def test_a_window_that_holds_all_is_none():
  assert refusal(mask=SlidingWindow(15, 99), T=16) is None
  assert cudnn._band(SlidingWindow(15, 0), 16, 16) == (None, 0)
  assert cudnn._band(SlidingWindow(14, 0), 16, 16) == (14, 0)
  assert cudnn._band(SlidingWindow(99, 30), 31, 16) == (None, None)


@pytest.mark.parametrize(
  ("device", "widest"), [("9.0", 256), ("12.0", 256), ("8.6", 128), ("7.5", 0), ("gfx942", 0)]
)
def test_the_device_says_how_wide_heads_may_be(monkeypatch, device, widest):
  monkeypatch.undo()
  monkeypatch.setattr(jax, "devices", lambda: [type("", (), {"compute_capability": device})])
  assert cudnn._widest() == widest
  assert (refusal(H=256) is None) == (widest == 256)


def test_each_reason_is_logged_once(monkeypatch):
  said = []
  monkeypatch.setattr(logging, "warning", lambda text, *arguments: said.append(text % arguments))
  cudnn._tell.cache_clear()
  monkeypatch.setattr(gpu, "attention", lambda q, *_, **__: (q, None))
  q = jnp.zeros((1, 16, 2, 8), jnp.bfloat16)
  for options in ({"logit_softcap": 2.0}, {"scale": 0.0}, {"logit_softcap": 2.0}):
    cudnn.attention(q, q, q, **(CAUSAL | options))
  assert said == [f"attention: not by cuDNN: {why}" for why in ("a soft cap", "scale 0.0")]


B, T, N, K, H, BAD = 2, 32, 4, 2, 8, 20
SMALL = {"sizes": Sizes(*[Size(16, 16)] * 3), "interpret": True}


@pytest.fixture
def stand_in(monkeypatch):
  """XLA's attention where cuDNN's is asked for, and the kernel interpreted."""
  plain = jax.nn.dot_product_attention

  def attention(*arrays, implementation, **options):
    assert implementation == "cudnn"
    return plain(*arrays, implementation="xla", **options)

  monkeypatch.setattr(jax.nn, "dot_product_attention", attention)
  monkeypatch.setattr(gpu, "attention", functools.partial(gpu.attention, **SMALL))


def run(mask, query, key, value, bias=None):
  out, _ = cudnn.attention(query, key, value, **(CAUSAL | {"mask": mask, "bias": bias}))
  return out, jnp.zeros(out.shape[:3], jnp.float32)


def check(mask, arrays, clean=None, rows=np.s_[:], keys=np.s_[:]):
  """Values and gradients against float64 of `clean`, at these rows and keys."""
  found = jax.jit(lambda arrays: cases.evaluate(functools.partial(run, mask), arrays, {}))(arrays)
  want = cases.exact(scale=0.4, logit_softcap=None)(clean or arrays, {"mask": mask})
  places = {"out": rows, "d_query": rows, "d_key": keys, "d_value": keys, "d_bias": np.s_[:]}
  for (name, at), x, y in zip(
    places.items(), found[:1] + found[2:], want[:1] + want[2:], strict=False
  ):
    x, y = (np.asarray(z, np.float64)[:, at] for z in (x, y))
    np.testing.assert_allclose(x, y, atol=0.02 * np.abs(y).max(initial=0), rtol=0.02, err_msg=name)


def problem(bias=None):
  arrays = cases.operands(B, T, T, N, K, H, H, bias, "bfloat16")
  arrays[-1] = jnp.zeros_like(arrays[-1], jnp.float32)
  return arrays


@pytest.mark.parametrize("mask", [Full(), Causal(), SlidingWindow(5, 0)])
def test_values_and_gradients(stand_in, mask):
  check(mask, problem())


@pytest.mark.parametrize("mask", [Causal(), SlidingWindow(5, 0)])
def test_what_is_hidden_may_be_anything(stand_in, mask):
  """Rows that see no bad key, and keys that are seen by none but these."""
  seen = np.asarray(mask.dense(T, T))
  touched = seen[:, BAD] | (np.arange(T) == BAD)
  clean = [None if x is None else np.array(x) for x in problem()]
  clean[4][:, touched] = 0
  arrays = [None if x is None else x.copy() for x in clean]
  arrays[0][:, BAD] = arrays[1][:, BAD, :, 3] = arrays[2][:, BAD] = np.nan
  check(mask, arrays, clean, rows=~touched, keys=~seen[touched].any(0))


def test_a_bias_that_hides_all_keys_of_a_query(stand_in):
  arrays = problem((1, N, T, T))
  arrays[3] = arrays[3].at[:, 1, 7].set(-jnp.inf).at[:, :, 3, :2].set(-jnp.inf)
  check(Causal(), arrays)
  out, _ = run(Causal(), *arrays[:4])
  assert not np.asarray(out[:, 7, 1]).any()


def test_maps_over_any_axes(stand_in):
  query, key, value, _, d_out, _ = problem()
  keys = jnp.stack([key, 2 * key], axis=2)

  def both(query, key, value):
    out, pull = jax.vjp(lambda *x: run(Causal(), *x)[0], query, key, value)
    return out, pull(d_out)

  found = jax.jit(jax.vmap(both, (None, 2, None)))(query, keys, value)
  for i in range(2):
    want = jax.jit(both)(query, keys[:, :, i], value)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
      np.testing.assert_allclose(np.float32(x[i]), np.float32(y), atol=0.02, rtol=0.02)


def test_a_second_derivative_is_refused_by_name(stand_in):
  query, key, value, *_ = problem()
  first = jax.grad(lambda q: run(Causal(), q, key, value)[0].astype(jnp.float32).sum())
  with pytest.raises(NotImplementedError, match="implementation='xla'"):
    jax.grad(lambda q: first(q).astype(jnp.float32).sum())(query)
