import dataclasses
import errno
import os
import resource
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effjax.core import trees, weights
from effjax.parallel import make_mesh, place
from effjax.peft import lora
from effjax.quant import Int8
from effjax.train import Checkpoints, TrainState, init_state


@weights.register(static=("bits",))
class Quantized(weights.Weight):
  codes: object
  scale: object
  bits: int = 8

  shape = property(lambda self: self.codes.shape)
  dtype = property(lambda self: self.scale.dtype)

  def materialize(self):
    return self.codes * self.scale


def _state(seed=0):
  draw = np.random.default_rng(seed)
  random = lambda *shape: jnp.asarray(draw.normal(size=shape), jnp.float32)
  params = {
    "w": Quantized(jnp.asarray(draw.integers(-127, 127, (16, 8)), jnp.int8), random(1, 8)),
    "half": random(8, 8).astype(jnp.bfloat16),
    "nan": jnp.array([jnp.nan, -0.0, jnp.inf, 1e-42]),
    "plain": random(24, 8),
  }
  return init_state(params, optax.adamw(1e-3))


def _same_bits(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_round_trip_is_exact_to_the_bit(tmp_path):
  state = _state()
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(3, state, data={"row": 17, "name": "é"})
  with Checkpoints(tmp_path) as checkpoints:
    saved = checkpoints.restore(_state(1))
  _same_bits(saved.state, state)
  assert isinstance(saved.state, TrainState) and saved.state.params["w"].bits == 8
  assert (saved.step, saved.data) == (3, {"row": 17, "name": "é"})


def test_what_is_frozen_beside_adapters_is_named_and_not_written(tmp_path):
  base = {"kernel": jnp.arange(600_000.0).reshape(1000, 600), "bias": jnp.ones(600)}
  params = lora.add(base, jax.random.key(0), rank=2, targets="kernel")
  state = init_state(params, optax.adam(1e-3))
  digests = trees.digests({"params/kernel/base": base["kernel"], "params/bias": base["bias"]})
  changed = dataclasses.replace(state, params=params | {"bias": jnp.zeros(600)})
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, changed, base=digests)
    _same_bits(checkpoints.restore(state).state, changed)  # the bias was written: it is another
    checkpoints.save(2, state, base=digests)
    _same_bits(checkpoints.restore(changed, step=1).state, changed)
    size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert size < base["kernel"].nbytes / 4
    for step in (1, 2):
      other = dataclasses.replace(params["kernel"], base=base["kernel"] + 1)
      with pytest.raises(ValueError, match="another base: params/kernel/base is float32"):
        checkpoints.restore(
          dataclasses.replace(state, params=params | {"kernel": other}), step=step
        )
    with pytest.raises(ValueError, match="is without its base; allowed: a `like` with the arrays"):
      checkpoints.restore(jax.eval_shape(lambda: state))
    with pytest.raises(ValueError, match=r"kernel/base is float32 .* there and absent here"):
      checkpoints.restore(dataclasses.replace(state, params=base))


def test_only_the_newest_stay(tmp_path):
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    for step in (1, 5, 9):
      checkpoints.save(step, {"w": jnp.full(2, step)})
    assert checkpoints.steps() == [5, 9]
    assert checkpoints.restore({"w": jnp.zeros(2, int)}, step=5).state["w"].tolist() == [5, 5]


def test_restores_into_another_sharding(tmp_path):
  state = _state()
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, place(state, make_mesh(data=8), zero=3))
    whole = checkpoints.restore(state).state
    parts = checkpoints.restore(place(state, make_mesh(data=4), zero=3)).state
  _same_bits(whole, state)
  _same_bits(parts, state)
  assert parts.params["plain"].addressable_shards[0].data.shape == (6, 8)


def test_another_layout_is_refused_and_named(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, {"a": jnp.ones(3), "b": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"b is \(\(2,\), 'float32'\) in the checkpoint and None"):
      checkpoints.restore({"a": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"a is \(\(3,\).*and \(\(4,\)"):
      checkpoints.restore({"a": jnp.ones(4), "b": jnp.ones(2)})


def test_integers_with_scales_of_another_type_are_named_and_restored_as_they_are(tmp_path):
  old, new = (Int8.quantize(np.eye(4), scale_dtype=kind) for kind in (jnp.float16, jnp.float32))
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, {"w": old})
    message = (
      r"w/scale is .*'float16'\) in the checkpoint and .*'float32'\) here; allowed: a `like`"
    )
    with pytest.raises(ValueError, match=message):
      checkpoints.restore({"w": new})
    _same_bits(checkpoints.restore({"w": old}).state, {"w": old})


def test_a_missing_checkpoint_is_named(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
      checkpoints.restore({"a": jnp.ones(3)})
    checkpoints.save(1, {"a": jnp.ones(3)})
    with pytest.raises(FileNotFoundError, match=r"step 7.*steps: \[1\]"):
      checkpoints.restore({"a": jnp.ones(3)}, step=7)


def test_keep_is_checked(tmp_path):
  with pytest.raises(ValueError, match="keep=0"):
    Checkpoints(tmp_path, keep=0)


def test_nothing_is_pickled(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, _state(), data={"a": 1})
  for path in tmp_path.rglob("*"):
    assert path.suffix not in (".pkl", ".pickle")
    if path.is_file():
      assert not path.read_bytes().startswith(b"\x80")


def test_a_full_disk_is_named_and_leaves_the_last_good_checkpoint(tmp_path):
  """A limit on file size stands for the full disk: both make the write fail."""
  state = {"w": jnp.arange(200_000.0)}
  before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
      with pytest.raises(
        OSError, match=r"step 2 could not be written .*last good checkpoint: step 1"
      ):
        checkpoints.save(2, {"w": jax.random.normal(jax.random.key(0), (200_000,))})
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
      signal.signal(signal.SIGXFSZ, before)
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.steps() == [1]
    _same_bits(checkpoints.restore(state).state, state)


@pytest.mark.parametrize("reason", [errno.EROFS, errno.ENOSPC])
def test_a_directory_that_cannot_be_made_is_named(tmp_path, monkeypatch, reason):
  def refuse(*_, **__):
    raise OSError(reason, os.strerror(reason))

  monkeypatch.setattr("pathlib.Path.mkdir", refuse)
  with pytest.raises(OSError, match=f"{os.strerror(reason)}.*run"):
    Checkpoints(tmp_path / "run")
