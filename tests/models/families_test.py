"""Tiny random models of every family: transformers → effjax → transformers, in float32."""

import dataclasses

import chex
import jax
import numpy as np
import pytest
import safetensors.numpy

from effjax import models
from effjax.attention.masks import Causal, SlidingWindow
from effjax.layers import MLP, LayerNorm
from effjax.models import families, presets
from effjax.models.families import Entry, reading
from effjax.models.safetensors_files import SINGLE

CASES = {
  "llama": ("llama", {}),
  "llama-tied-wide-heads": ("llama", {"tie_word_embeddings": True, "head_dim": 12}),
  "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
  "llama-linear-rope": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
  "gemma3": ("gemma3_text", {}),
  "gemma3-softcaps": (
    "gemma3_text",
    {
      "final_logit_softcapping": 3.0,
      "layer_types": ["full_attention", "sliding_attention"] * 2,
      "num_hidden_layers": 4,
      "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
  ),
  "gpt2": ("gpt2", {}),
  "gpt2-untied": ("gpt2", {"tie_word_embeddings": False, "n_inner": 40}),
  "opt": ("opt", {}),
  "opt-350m-like": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
  "opt-no-final-norm": ("opt", {"_remove_final_layer_norm": True, "enable_bias": False}),
  "bert": ("bert", {}),
  "roberta": ("roberta", {}),
  "distilbert": ("distilbert", {}),
  "mistral": ("mistral", {}),
  "mistral-no-window": ("mistral", {"sliding_window": None, "head_dim": 12}),
  "qwen2": ("qwen2", {}),
  "qwen2-windows": (
    "qwen2",
    {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
  ),
  "qwen3": ("qwen3", {"tie_word_embeddings": True}),
  "gemma2": ("gemma2", {}),
  "phi3": ("phi3", {"sliding_window": 4}),
  "phi3-longrope": (
    "phi3",
    {
      "original_max_position_embeddings": 8,
      "partial_rotary_factor": 0.5,
      "rope_scaling": {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.5],
        "long_factor": [2.0, 3.0],
      },
    },
  ),
  "smollm3": ("smollm3", {}),
  "smollm3-windows": (
    "smollm3",
    {"use_sliding_window": True, "sliding_window": 4, "attention_bias": True, "mlp_bias": True},
  ),
  "mixtral": ("mixtral", {"sliding_window": 4}),
  "qwen2_moe": (
    "qwen2_moe",
    {"mlp_only_layers": [1], "use_sliding_window": True, "sliding_window": 4},
  ),
  "qwen3_moe": ("qwen3_moe", {"norm_topk_prob": True, "tie_word_embeddings": True}),
  "olmoe": ("olmoe", {"attention_bias": True, "num_experts_per_tok": 3}),
}
TOKENS = np.random.default_rng(0).integers(3, 64, (2, 13)).astype(np.int32)


@pytest.mark.parametrize("case", CASES)
def test_computes_as_transformers_and_back(case, tiny_folder, reference, tmp_path):
  model_type, fields = CASES[case]
  folder, theirs = tiny_folder(model_type, **fields)
  model = models.load(folder)
  expected = reference(theirs, TOKENS)
  np.testing.assert_allclose(model(TOKENS), expected, atol=2e-5, rtol=1e-5)
  reopened = type(theirs).from_pretrained(models.save(model, tmp_path / "saved"))
  np.testing.assert_allclose(reference(reopened, TOKENS), expected, atol=2e-5, rtol=1e-5)
  chex.assert_trees_all_close(models.load(tmp_path / "saved").params, model.params, atol=2e-7)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt2", "opt", "bert"])
def test_scanned_and_flat_layers_load_the_same(model_type, tiny_folder):
  from effjax.layers.stack import unscan
  from effjax.models.loading import open_checkpoint, read_params

  checkpoint = open_checkpoint(tiny_folder(model_type)[0])
  flat = dataclasses.replace(checkpoint.config, scan=False)
  scanned = read_params(checkpoint, models.Transformer(checkpoint.config))
  chex.assert_trees_all_equal(
    read_params(checkpoint, models.Transformer(flat)), unscan(checkpoint.config, scanned)[1]
  )


def test_bare_models_without_prefix_load(tiny_folder, reference, tmp_path):
  _, theirs = tiny_folder("gpt2")
  theirs.transformer.save_pretrained(tmp_path / "bare")
  np.testing.assert_allclose(
    models.load(tmp_path / "bare")(TOKENS), reference(theirs, TOKENS), atol=2e-5
  )


def test_bert_with_a_head_loads_its_encoder(tiny_folder, reference, tmp_path):
  transformers = pytest.importorskip("transformers")
  _, encoder = tiny_folder("bert")
  masked = transformers.BertForMaskedLM(encoder.config)
  masked.bert.load_state_dict(encoder.state_dict(), strict=False)
  masked.save_pretrained(tmp_path / "masked")
  np.testing.assert_allclose(
    models.load(tmp_path / "masked")(TOKENS), reference(encoder, TOKENS), atol=2e-5
  )


@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert"])
def test_names_that_tensorflow_gave(model_type, tiny_folder):
  folder, _ = tiny_folder(model_type)
  expected = models.load(folder)
  tensors = safetensors.numpy.load_file(folder / SINGLE)
  older = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
  for new, old in older.items():
    names = [name for name in tensors if name.endswith(new)]
    assert names
    for name in names:
      tensors[name.removesuffix(new) + old] = tensors.pop(name)
  safetensors.numpy.save_file(tensors, folder / SINGLE)
  chex.assert_trees_all_equal(models.load(folder).params, expected.params)
  tensors["embeddings.LayerNorm.weight"] = tensors["embeddings.LayerNorm.gamma"]
  safetensors.numpy.save_file(tensors, folder / SINGLE)
  with pytest.raises(ValueError, match=r"embeddings\.LayerNorm\.(gamma|weight)' are one"):
    models.load(folder)


def test_a_table_that_only_the_head_holds(tiny_folder):
  folder, _ = tiny_folder("llama", tie_word_embeddings=True)
  expected = models.load(folder)
  tensors = safetensors.numpy.load_file(folder / SINGLE)
  tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
  safetensors.numpy.save_file(tensors, folder / SINGLE)
  chex.assert_trees_all_equal(models.load(folder).params, expected.params)


PUBLISHED = ["smollm2-135m", "gemma3-270m", "opt-125m", "opt-350m", "opt-66b", "minilm"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_survive_config_json(name):
  config = presets.preset(name)
  family = families.family_of(config)
  assert family.to_config(families.hf_config(config)) == config


def llama_changed(**changes):
  return dataclasses.replace(presets.TINY, **changes)


def layers_changed(**changes):
  first, second = presets.TINY.layers
  return llama_changed(layers=(first, dataclasses.replace(second, **changes)))


@pytest.mark.parametrize(
  ("config", "message"),
  [
    (llama_changed(norm=LayerNorm(1e-5)), "norm=LayerNorm"),
    (llama_changed(arrangement="post"), "arrangement=post"),
    (llama_changed(logit_softcap=2.0), "logit_softcap=2.0"),
    (layers_changed(ffn=MLP(8)), r"layers=LayerSpec.*, layers\[1\]\.ffn\.width=8 is"),
    (layers_changed(ffn=None), r"layers\[1\].ffn is NoneType; .* holds MLP there"),
    (
      layers_changed(mixer=presets.TINY.layers[0].mixer.copy(mask=SlidingWindow(3, 0))),
      r"layers=LayerSpec.*, layers\[1\]\.mixer\.mask=SlidingWindow",
    ),
    (layers_changed(mixer=presets.TINY.layers[0].mixer.copy(rope=None)), "layers=LayerSpec"),
    (llama_changed(family=None), "config.family=None; allowed: llama, gemma3"),
    (llama_changed(layers=()), "layers: none"),
  ],
)
def test_what_a_layout_cannot_express_is_named(config, message):
  with pytest.raises(ValueError, match=message):
    families.hf_config(config)


def test_execution_details_do_not_hinder_saving():
  mixer = presets.TINY.layers[0].mixer.copy(implementation="reference", scale=16**-0.5)
  config = llama_changed(
    layers=tuple(dataclasses.replace(spec, mixer=mixer) for spec in presets.TINY.layers),
    scan=False,
  )
  assert families.hf_config(config) == families.hf_config(presets.TINY)


LLAMA = families.hf_config(presets.TINY)
GPT2 = {"model_type": "gpt2", "vocab_size": 8, "n_embd": 4, "n_layer": 1, "n_head": 2}


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (LLAMA | {"rope_scaling": {"rope_type": "axial"}}, "rope_type='axial'; allowed: 'default'"),
    (LLAMA | {"hidden_act": "swish9"}, "hidden_act='swish9'; allowed: 'silu'"),
    (LLAMA | {"hidden_size": None}, "field 'hidden_size' is missing"),
    (GPT2 | {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
    ({"model_type": "mamba9"}, "model_type 'mamba9'; allowed: llama, gemma3, gpt2, opt, bert"),
  ],
)
def test_unsupported_configurations_are_named(fields, message):
  with pytest.raises(ValueError, match=message):
    families.of_model_type(fields["model_type"]).to_config(fields)


def test_gemma_windows_and_bases():
  local, whole = (presets.GEMMA3_270M.layers[i].mixer for i in (4, 5))
  assert (local.mask, local.rope.theta) == (SlidingWindow(511, 0), 1e4)
  assert (whole.mask, whole.rope.theta) == (Causal(), 1e6)


@pytest.mark.parametrize(
  "entry",
  [
    Entry("p", "t"),
    Entry("p", "t", transpose=True),
    Entry("p", "t", shift=1.0),
    Entry("p", "t", shift=1.0, transpose=True),
  ],
)
def test_entries_load_what_they_unload(entry):
  class Source:
    def __init__(self, value):
      self.value = value

    def read(self, name, out=None):
      if out is None:
        return self.value
      out[...] = self.value
      return out

  value = np.random.default_rng(0).integers(-9, 9, (3, 4)).astype(np.float32)
  tensor = entry.unload(value)
  assert tensor.shape == entry.tensor_shape(value.shape)
  out = np.zeros_like(value)
  entry.load(Source(tensor), "t", out)
  np.testing.assert_array_equal(out, value)


def test_activation_names_invert():
  for ours in ("silu", "relu", "gelu", "gelu_tanh"):
    assert reading.ACTIVATIONS[reading.activation_name(ours)] == ours
  with pytest.raises(ValueError, match="activation 'cube'; allowed"):
    reading.activation_name("cube")


def test_prefixes():
  gemma = families.FAMILIES["gemma3"]
  for prefix in gemma.prefixes:
    assert gemma.canonical(f"{prefix}layers.0.x") == "layers.0.x"
  assert gemma.canonical("lm_head.weight") == gemma.written("lm_head.weight") == "lm_head.weight"
  assert gemma.written("norm.weight") == "model.norm.weight"


def test_every_parameter_of_every_preset_has_a_place():
  from effjax.models.layout import plan_tensors

  tokens = jax.ShapeDtypeStruct((1, 1), np.int32)
  for name in ("smollm2-135m", "gemma3-270m", "opt-350m", "bert-base"):
    config = presets.preset(name)
    params = jax.eval_shape(models.Transformer(config).init, jax.random.key(0), tokens)["params"]
    family = families.family_of(config)
    plan = plan_tensors(family, config, params)
    for path, pieces in plan.items():
      assert len({piece.index for piece in pieces}) == len(pieces), path
