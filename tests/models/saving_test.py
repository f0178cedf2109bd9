import dataclasses
import errno
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax import models
from effjax.models import presets, safetensors_files
from effjax.models.safetensors_files import SafetensorsFolder
from effjax.peft import lora
from tests.modules import random_params


@pytest.fixture(scope="module")
def model():
  module = models.Transformer(presets.TINY)
  params = random_params(module, np.zeros((1, 1), np.int32))
  return models.Model(presets.TINY, module, params)


def test_what_is_saved_loads_the_same(model, tmp_path):
  folder = models.save(model, tmp_path / "deep" / "saved")
  again = models.load(folder)
  chex.assert_trees_all_equal(again.params, model.params)
  assert again.config == model.config
  assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
  assert [p.name for p in folder.parent.iterdir()] == ["saved"]


def test_types_are_kept(model, tmp_path):
  half = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.bfloat16), model.params)
  folder = models.save(dataclasses.replace(model, params=half), tmp_path / "half")
  assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"
  source = SafetensorsFolder(folder)
  assert {source.read(name).dtype for name in source.names()} == {np.dtype(jnp.bfloat16)}
  chex.assert_trees_all_equal(models.load(folder, dtype=jnp.bfloat16).params, half)


def test_weight_representations_are_refused(model, tmp_path):
  params = lora.add(model.params, jax.random.key(0), rank=2, targets="query/kernel")
  with pytest.raises(ValueError, match=r"query/kernel' is a LoRA; allowed: arrays: merge"):
    models.save(dataclasses.replace(model, params=params), tmp_path / "x")
  assert not list(tmp_path.iterdir())


def test_what_the_layout_lacks_is_refused(model, tmp_path):
  params = {**model.params, "extra": {"kernel": jnp.ones((2, 2))}}
  with pytest.raises(ValueError, match="parameter 'extra/kernel' has no place in the layout"):
    models.save(dataclasses.replace(model, params=params), tmp_path / "x")
  config = dataclasses.replace(model.config, logit_softcap=5.0)
  with pytest.raises(ValueError, match=r"logit_softcap=5\.0"):
    models.save(dataclasses.replace(model, config=config), tmp_path / "x")
  assert not list(tmp_path.iterdir())


def test_a_folder_with_something_in_it_is_left_alone(model, tmp_path):
  (tmp_path / "mine").write_text("precious")
  with pytest.raises(FileExistsError, match="not empty"):
    models.save(model, tmp_path)
  assert (tmp_path / "mine").read_text() == "precious"
  (tmp_path / "empty").mkdir()
  assert (models.save(model, tmp_path / "empty") / "model.safetensors").is_file()


def test_a_full_disk_leaves_nothing_behind(model, tmp_path, monkeypatch):
  def full(descriptor):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(safetensors_files.os, "fsync", full)
  with pytest.raises(OSError, match="No space left"):
    models.save(model, tmp_path / "x")
  assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written(model, tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(OSError, match="file"):
    models.save(model, tmp_path / "file" / "below")
