"""Contenders against attention written out, exponents of known laws, and a small run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.attention import attend
from experiments.attention import attention_scaling as scaling

TINY = scaling.Config(
  lengths="64,128", timed=64, heads=1, width=8, window=16, block=16, rank=16, rounds=1,
  global_tokens=2, random_blocks=1, names="dense,linformer",
)  # fmt: skip
MASKED = ("dense", "flash", "window", "dilated", "longformer", "bigbird")


@pytest.fixture
def arrays():
  drawn = np.random.default_rng(0).normal(size=(4, 1, 96, 1, 8))
  return [jax.device_put(x.astype(jnp.float32)) for x in drawn]


@pytest.mark.parametrize("name", MASKED)
def test_contenders_attend_through_their_masks(name, arrays):
  function = scaling.KINDS[name].make(TINY, 96)
  mask = function.keywords["mask"]
  reference = functools.partial(attend, mask=mask, implementation="reference")
  got, expected = (jax.jit(f)(*arrays[:3]) for f in (function, reference))
  np.testing.assert_allclose(got, expected, atol=2e-6)
  seen = float(mask.mean_keys(96))
  assert seen == 96 if name in ("dense", "flash") else seen < 96


@pytest.mark.parametrize("name", ["linformer", "linear"])
def test_the_others_see_everything_too(name, arrays):
  function = scaling.KINDS[name].make(TINY, 96)
  q, k, v, _ = arrays
  touched = jax.jit(jax.grad(lambda k: function(q, k, v)[0, 0].sum()))(k)
  assert (np.abs(touched).sum(-1) > 0).all()


def test_both_ways_gives_the_gradients(arrays):
  function = scaling.KINDS["dense"].make(TINY, 96)
  value, gradients = scaling.both_ways(function)(*arrays)
  *inputs, c = arrays

  @jax.jit
  def written_out(*x):
    out, backward = jax.vjp(function, *x)
    return (out * c).sum(), backward(c)

  want, wanted = written_out(*inputs)
  np.testing.assert_allclose(value, want, rtol=1e-4)
  for ours, theirs in zip(gradients, wanted, strict=True):
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
  assert jnp.isfinite(value)


def test_exponents_are_of_the_three_greatest_lengths():
  assert scaling.exponent({1: 100.0, 2: 1.0, 4: 8.0, 8: 64.0}) == pytest.approx(3)
  assert scaling.exponent({2: 1.0}) is None
  assert scaling.exponent({}) is None


def test_claims_are_of_what_was_found():
  rows = [
    {"name": "dense", "time ^": None, "memory ^": 1.9},
    {"name": "linear", "time ^": 1.3, "memory ^": 1.2},
  ]
  assert scaling.claims(rows) == {
    "dense: memory grows as N^2": True,
    "linear: time grows as N^1": False,
    "linear: memory grows as N^1": True,
  }


@pytest.mark.parametrize("text", ["", "64,x", "0"])
def test_wrong_lengths_are_named(text, tmp_path):
  with pytest.raises(ValueError, match=r"lengths=.*; allowed: integers from 1"):
    scaling.run(scaling.Config(lengths=text), str(tmp_path))


@pytest.mark.usefixtures("optimized")
def test_a_run_measures_and_resumes(tmp_path):
  rows = scaling.run(TINY, str(tmp_path))
  assert [row["name"] for row in rows] == ["dense", "linformer"]
  assert rows[0]["memory ^"] > 1.5
  assert all(row["ms 64"] > 0 and "ms 128" not in row and row["MiB 128"] > 0 for row in rows)
  for name in ("config.json", "metrics.jsonl", "result.csv", "plot.png"):
    assert (tmp_path / name).stat().st_size > 0
  assert scaling.run(TINY, str(tmp_path)) == rows


@pytest.mark.usefixtures("optimized")
def test_what_would_hold_too_much_is_not_run(tmp_path):
  config = scaling.Config(**{**vars(TINY), "memory": 1000, "names": "dense", "lengths": "64"})
  (row,) = scaling.run(config, str(tmp_path))
  assert row["MiB 64"] * 2**20 > 1000
  assert "ms 64" not in row and row["time ^"] is None
