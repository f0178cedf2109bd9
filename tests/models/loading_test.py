import json
import shutil
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from effjax import models
from effjax.core import trees
from effjax.models import packages
from effjax.models.safetensors_files import INDEX, SINGLE

TOKENS = np.random.default_rng(0).integers(3, 64, (2, 13)).astype(np.int32)


@pytest.fixture
def copy(folder, tmp_path):
  """A function: a copy of the folder whose tensors `change` has edited in place."""

  def make(change):
    shutil.copytree(folder, tmp_path / "copy")
    tensors = safetensors.numpy.load_file(folder / SINGLE)
    change(tensors)
    safetensors.numpy.save_file(tensors, tmp_path / "copy" / SINGLE)
    return tmp_path / "copy"

  return make


UP = "model.layers.1.mlp.up_proj.weight"


def test_a_missing_tensor_is_named(copy):
  with pytest.raises(ValueError, match=r"missing tensors: layers\.1\.mlp\.up_proj\.weight"):
    models.load(copy(lambda tensors: tensors.pop(UP)))


def test_an_unexpected_tensor_is_named(copy):
  change = lambda tensors: tensors.update({"model.layers.9.strange": np.zeros(2, np.float32)})
  with pytest.raises(ValueError, match=r"unexpected tensors: model\.layers\.9\.strange"):
    models.load(copy(change))


def test_a_wrong_shape_says_what_came_and_what_is_wanted(copy):
  change = lambda tensors: tensors.update({UP: np.zeros((47, 32), np.float32)})
  message = r"up_proj.weight' has shape \(47, 32\); the configuration wants \(48, 32\) .*ffn/up"
  with pytest.raises(ValueError, match=message):
    models.load(copy(change))


def test_values_that_are_not_finite_are_refused(copy):
  with pytest.raises(ValueError, match=f"'{UP}' holds values that are not finite"):
    models.load(copy(lambda tensors: tensors[UP].fill(np.nan)))


def test_a_truncated_file_is_refused(folder, copy):
  damaged = copy(lambda tensors: None)
  (damaged / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:-100])
  with pytest.raises(ValueError, match="truncated: tensor"):
    models.load(damaged)


def test_folders_without_or_with_damaged_config(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"no config\.json"):
    models.load(tmp_path)
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(ValueError, match=r"config\.json: damaged"):
    models.load(tmp_path)
  (tmp_path / "config.json").write_text('{"model_type": "t5"}')
  with pytest.raises(ValueError, match=r"config\.json: model_type 't5'; allowed"):
    models.load(tmp_path)


def test_shards_load_as_one_file_does(folder, copy):
  whole = models.load(folder)
  sharded = copy(lambda tensors: None)
  tensors = safetensors.numpy.load_file(sharded / SINGLE)
  (sharded / SINGLE).unlink()
  home = {}
  for i in range(3):
    part = dict(list(tensors.items())[i::3])
    safetensors.numpy.save_file(part, sharded / f"model-{i}.safetensors")
    home |= dict.fromkeys(part, f"model-{i}.safetensors")
  (sharded / INDEX).write_text(json.dumps({"weight_map": home}))
  chex.assert_trees_all_equal(models.load(sharded).params, whole.params)
  (sharded / "model-1.safetensors").unlink()
  with pytest.raises(FileNotFoundError, match=r"shards that are missing: \['model-1"):
    models.load(sharded)


def test_dtype_is_that_of_parameters_and_activations(folder):
  half, full = models.load(folder, dtype=jnp.bfloat16), models.load(folder)
  assert {x.dtype for x in jax.tree.leaves(half.params)} == {jnp.dtype(jnp.bfloat16)}
  expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16), full.params)
  chex.assert_trees_all_equal(half.params, expected)
  assert half(TOKENS).dtype == jnp.bfloat16


def test_parameters_go_straight_into_their_sharding(folder):
  mesh = Mesh(np.array(jax.devices()), ("data",))

  def last_axis(path, shape):
    fits = shape[-1] % len(jax.devices()) == 0
    axes = [None] * (len(shape) - 1) + ["data" if fits else None]
    return NamedSharding(mesh, PartitionSpec(*axes))

  plain, sharded = models.load(folder), models.load(folder, sharding=last_axis)
  chex.assert_trees_all_equal(sharded.params, plain.params)
  for path, leaf in trees.items(sharded.params).items():
    assert leaf.sharding == last_axis(path, leaf.shape), path
  up = trees.select(sharded.params, "up/kernel").popitem()[1]
  assert up.addressable_shards[0].data.shape == (3, 32, 48 // 8)
  tree = jax.tree.map(lambda x: NamedSharding(mesh, PartitionSpec()), plain.params)
  replicated = models.load(folder, sharding=tree)
  assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(replicated.params))
  with pytest.raises(ValueError, match="sharding: a tree unlike the parameters"):
    models.load(folder, sharding={"embed": tree["embed"]})


def bf16(folder, path):
  """The folder with its tensors in bfloat16."""
  shutil.copytree(folder, path)
  tensors = safetensors.numpy.load_file(folder / SINGLE)
  halved = {name: value.astype(jnp.bfloat16) for name, value in tensors.items()}
  safetensors.numpy.save_file(halved, path / SINGLE)
  return halved


@pytest.mark.parametrize("model_type", ["gemma3_text", "gemma2"])
def test_norms_stored_less_one_come_back_from_bfloat16(model_type, tiny_folder, tmp_path):
  stored = bf16(tiny_folder(model_type)[0], tmp_path / "half")
  model = models.load(tmp_path / "half", dtype=jnp.bfloat16)
  kinds = {path: leaf.dtype for path, leaf in trees.items(model.params).items()}
  norms = [path for path in kinds if "norm" in path]
  assert {kinds.pop(path) for path in norms} == {jnp.dtype(jnp.float32)}
  assert set(kinds.values()) == {jnp.dtype(jnp.bfloat16)}
  saved = safetensors.numpy.load_file(models.save(model, tmp_path / "saved") / SINGLE)
  for name, value in stored.items():
    np.testing.assert_array_equal(saved[name].astype(jnp.bfloat16), value, name)
  again = models.load(tmp_path / "saved", dtype=jnp.bfloat16)
  chex.assert_trees_all_equal(again.params, model.params)
  assert model(TOKENS).dtype == jnp.bfloat16


def test_ids_that_end_a_text_are_read_and_written(folder, copy, tmp_path):
  path = copy(lambda tensors: None)
  config = json.loads((path / "config.json").read_text())
  (path / "config.json").write_text(
    json.dumps(config | {"eos_token_id": [5, 6], "pad_token_id": 0})
  )
  (path / "generation_config.json").unlink()
  model = models.load(path)
  assert (model.ids.eos, model.ids.pad, model.ids.bos) == ((5, 6), 0, None)
  (path / "generation_config.json").write_text('{"eos_token_id": [6, 7, 8], "bos_token_id": 1}')
  model = models.load(path)
  assert (model.ids.eos, model.ids.pad, model.ids.bos) == ((6, 7, 8), 0, 1)
  saved = models.save(model, tmp_path / "saved")
  assert models.load(saved).ids == model.ids
  for name in ("config.json", "generation_config.json"):
    found = json.loads((saved / name).read_text())
    assert (found["eos_token_id"], found["bos_token_id"]) == ([6, 7, 8], 1)
  (path / "generation_config.json").write_text('{"eos_token_id": "x"}')
  with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id='x'; allowed"):
    models.load(path)


MEMORY = """
import re, sys, jax, jax.numpy as jnp
from effjax import models
from effjax.core import trees
jnp.ones(3).block_until_ready()
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
before = peak()
model = models.load(sys.argv[1])
print((peak() - before) / trees.nbytes(model.params))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2-135m", "minilm"])
def test_peak_memory_stays_under_1_3_models(name):
  try:
    packages.locate(name)
  except ModuleNotFoundError as error:
    pytest.skip(str(error))
  command = [sys.executable, "-c", MEMORY, name]
  run = lambda: subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
  # What is freed late on a busy machine only adds to what loading needs.
  peaks = []
  while len(peaks) < 3 and (not peaks or min(peaks) >= 1.3):
    peaks.append(float(run().stdout))
  assert 0.9 < min(peaks) < 1.3, peaks
