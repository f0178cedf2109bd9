"""What comes back of adapters in folders, and what is refused; no other library is needed."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chex import assert_trees_all_equal
from safetensors.numpy import load_file, save_file

from effjax import models, peft
from effjax.core import trees
from effjax.models import presets
from effjax.quant import quantize
from tests.modules import random_params

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
QUERY = "base_model.model.model.layers.1.self_attn.q_proj."
SHAPE = presets.llama(64, 32, 3, 4, 2, 48, context=64)


def plain(config, seed=0):
  module = models.Transformer(config)
  return models.Model(config, module, random_params(module, np.zeros((1, 1), np.int32), seed=seed))


@pytest.fixture(scope="module")
def model():
  return plain(SHAPE)


def adapted(model, **options):
  params = peft.lora.add(model.params, jax.random.key(0), rank=4, **options)
  return dataclasses.replace(model, params=params)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
  return peft.save(adapted(model), tmp_path_factory.mktemp("lora")).parent


@pytest.fixture
def edited(folder, tmp_path):
  """A function: a copy of the folder with other fields, and tensors changed by a function."""

  def make(fields=None, change=None):
    copy = shutil.copytree(folder, tmp_path / "edited")
    if fields:
      values = json.loads((copy / CONFIG).read_text())
      (copy / CONFIG).write_text(json.dumps(values | fields))
    if change:
      tensors = load_file(copy / TENSORS)
      change(tensors)
      save_file(tensors, copy / TENSORS)
    return copy

  return make


def test_a_folder_opens_over_any_form_of_its_base(model, folder):
  again = peft.load(model, folder)
  assert_trees_all_equal(again.params, adapted(model).params)
  assert trees.trained(again.params) == trees.trained(adapted(model).params)
  half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), model.params)
  for base in (quantize(model.params), half):
    over = peft.load(dataclasses.replace(model, params=base), folder).params
    assert_trees_all_equal(peft.detach(over)[1], peft.detach(again.params)[1])
    assert_trees_all_equal(peft.detach(over)[0], base)


def test_layers_come_apart_where_their_adapters_are_unlike(model, edited):
  def drop(tensors):
    for name in [name for name in tensors if "layers.1." in name]:
      del tensors[name]

  found = peft.load(model, edited({"layers_to_transform": [0, 2]}, drop))
  assert [spec.tag for spec in found.config.layers] == ["adapters 0", None, "adapters 0"]
  assert len(trees.trained(found.params)) == 2 * 2 * 2


def test_what_peft_lacks_goes_to_a_file_of_our_own(model, tmp_path):
  scaled = dataclasses.replace(model, params=peft.ia3.add(model.params))
  both = adapted(scaled, targets="mixer/out/kernel")
  path = peft.save(both, tmp_path / "both")
  assert path.name == "adapters.safetensors"
  assert_trees_all_equal(peft.load(model, tmp_path / "both").params, both.params)
  other = plain(SHAPE, seed=1)
  with pytest.raises(ValueError, match=r"'embed/embedding' has other values"):
    peft.load(other, tmp_path / "both")


SAID = [
  ({"peft_type": "VERA"}, r"peft_type='VERA'; allowed: 'LORA', 'IA3', 'PREFIX_TUNING', 'PROMPT"),
  ({"use_qalora": True}, "use_qalora=True; allowed: False"),
  ({"lora_bias": True}, "lora_bias=True"),
  ({"target_parameters": ["mlp.experts"]}, "target_parameters"),
  ({"init_lora_weights": "olora"}, "init_lora_weights='olora'; allowed: True, False"),
  ({"new_way": 3}, r"field 'new_way'=3 is not known, and might change"),
  ({"r": 8}, r"lora_A.weight' has shape \(4, 32\); allowed for this model: \(8, 32\)"),
  ({"r": "4"}, "r='4'; allowed: integers"),
  ({"lora_dropout": 1.5}, r"lora_dropout=1.5; allowed: from 0, below 1"),
  ({"rank_pattern": {"q_proj": 0}}, "rank_pattern=.*; allowed: an object of positive numbers"),
  ({"rank_pattern": {"(": 4}}, r"rank_pattern: '\(' is no pattern"),
  ({"target_modules": ["q_proj"]}, "tensors for model.layers.0.self_attn.v_proj, .* not adapted"),
  ({"target_modules": "all-linear"}, "no tensors for model.layers.0.mlp.down_proj"),
  ({"target_modules": ["c_attn"]}, r"\('c_attn',\) matches nothing in this model; allowed: model"),
  ({"target_modules": 3}, "target_modules=3; allowed: a pattern, a list of names"),
  ({"layers_to_transform": [0]}, "tensors for model.layers.1.self_attn.q_proj"),
  ({"modules_to_save": ["norm"]}, "no weight of 'model.norm'"),
  ({"bias": "some"}, "bias='some'; allowed: 'none', 'all', 'lora_only'"),
  ({"use_dora": True}, "lora_magnitude_vector' is missing"),
]


@pytest.mark.parametrize(("fields", "message"), SAID, ids=[str(fields) for fields, _ in SAID])
def test_configurations_of_something_else_are_refused(model, edited, fields, message):
  with pytest.raises(ValueError, match=message):
    peft.load(model, edited(fields))


def rename(old, new):
  def change(tensors):
    for name in [name for name in tensors if old in name]:
      tensors[name.replace(old, new)] = tensors.pop(name)

  return change


def put(name, value):
  return lambda tensors: tensors.update({name: value})


CHANGES = [
  (lambda tensors: tensors.pop(f"{QUERY}lora_B.weight"), r"q_proj.lora_B.weight' is missing"),
  (
    rename("layers.2", "layers.7"),
    r"adapts module 'model.layers.7.self_attn.q_proj', which .* not",
  ),
  (rename("base_model.model.", ""), "allowed: base_model.model.….lora_A.weight"),
  (put(f"{QUERY}lora_E", np.ones(1, np.float32)), r"tensor '.*lora_E'; allowed: base_model"),
  (put(f"{QUERY}lora_B.weight", np.ones((33, 4), np.float32)), r"\(33, 4\); allowed .* \(32, 4\)"),
  (put(f"{QUERY}lora_B.weight", np.full((32, 4), np.nan, np.float32)), "not finite"),
  (put(f"{QUERY}weight", np.ones((32, 32), np.float32)), "says nothing of: .*q_proj.weight"),
  (
    put("base_model.model.model.embed_tokens.weight", np.ones((64, 32), np.float32)),
    "is not what this model has there",
  ),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_tensors_of_another_model_are_refused(model, edited, change, message):
  with pytest.raises(ValueError, match=message):
    peft.load(model, edited(change=change))


def test_other_models_are_refused_by_name(model, folder, edited):
  with pytest.raises(ValueError, match=r"adapts a model whose 'embed/embedding' has other values"):
    peft.load(plain(SHAPE, seed=1), folder)
  with pytest.raises(ValueError, match=r"'model.layers.2.self_attn.q_proj', which .* not"):
    peft.load(plain(presets.llama(64, 32, 2, 4, 2, 48, context=64)), folder)
  with pytest.raises(ValueError, match=r"has shape \(4, 32\); allowed for this model: \(4, 16\)"):
    peft.load(plain(presets.llama(64, 16, 3, 4, 2, 48, context=64)), folder)
  with pytest.raises(ValueError, match="model has adapters; allowed: one without"):
    peft.load(adapted(model), folder)
  copy = edited()
  (copy / "effjax.json").write_text('{"base": {}, "parts": {"x": [["query", 1, "s"]]}}')
  with pytest.raises(ValueError, match=r"effjax.json: damaged: .*; allowed: what peft.save wrote"):
    peft.load(model, copy)


def test_damaged_and_absent_files_are_refused(model, folder, edited):
  with pytest.raises(FileExistsError, match=r"adapter_config.json: is there already"):
    peft.save(adapted(model), folder)
  with pytest.raises(FileNotFoundError, match=r"allowed: a folder that peft\.save wrote"):
    peft.load(model, folder / "nowhere")
  copy = edited()
  whole = (copy / TENSORS).read_bytes()
  (copy / TENSORS).write_bytes(whole[:-7])
  with pytest.raises(ValueError, match="truncated"):
    peft.load(model, copy)
  (copy / TENSORS).rename(copy / "adapter_model.bin")
  with pytest.raises(
    FileNotFoundError, match=r"adapter_model.bin is a pickle; allowed: safetensors"
  ):
    peft.load(model, copy)
  (copy / CONFIG).write_text("{")
  with pytest.raises(ValueError, match=r"adapter_config.json: damaged"):
    peft.load(model, copy)
  with pytest.raises(ValueError, match="no adapter"):
    peft.save(model, copy)
