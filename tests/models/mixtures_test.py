"""Mixtures of experts as others publish them: layouts, fields, damage and what can be saved."""

import dataclasses
import json

import chex
import jax
import numpy as np
import pytest
import safetensors.numpy

from effjax import cost, models, moe
from effjax.layers import MLP
from effjax.models import families, presets
from effjax.models.safetensors_files import SINGLE
from effjax.moe import Gated
from tests.models.conftest import TINY
from tests.modules import random_params

TOKENS = np.random.default_rng(0).integers(3, 64, (2, 13)).astype(np.int32)
DEEPSEEK = {
  "model_type": "deepseek",
  "vocab_size": 64,
  "hidden_size": 32,
  "intermediate_size": 48,
  "moe_intermediate_size": 16,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "n_routed_experts": 4,
  "n_shared_experts": 2,
  "num_experts_per_tok": 2,
  "norm_topk_prob": False,
  "first_k_dense_replace": 1,
  "moe_layer_freq": 1,
  "scoring_func": "softmax",
  "aux_loss_alpha": 0.001,
  "seq_aux": True,
}


@pytest.fixture
def deepseek():
  """A random DeepSeekMoE of transformers and its head, float32.

  Its code was published beside the checkpoint; the text model of DeepSeek-OCR 2 is the same layers.
  """
  torch = pytest.importorskip("torch")
  from transformers.models.deepseek_ocr2 import modeling_deepseek_ocr2 as published

  names = {field for field in DEEPSEEK if field.endswith(("size", "layers", "heads", "experts"))}
  fields = {name: DEEPSEEK[name] for name in names | {"num_experts_per_tok"}}
  kinds = ["dense", "sparse", "sparse"]
  config = published.DeepseekOcr2TextConfig(mlp_layer_types=kinds, pad_token_id=0, **fields)
  torch.manual_seed(0)
  model = published.DeepseekOcr2TextModel(config).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.1 * torch.randn(parameter.shape))
  return model, torch.randn(64, 32) / 6


def one_by_one(tensors, width):
  """Stacked tensors of experts as a tensor for each."""
  found = {}
  for name, value in tensors.items():
    start, _, kind = name.rpartition(".")
    halves = {"gate_up_proj": {"gate_proj": slice(width), "up_proj": slice(width, None)}}
    parts = halves.get(kind, {"down_proj": slice(None)} if kind == "down_proj" else None)
    if parts is None or not start.endswith("experts"):
      found[name] = value
      continue
    for e in range(len(value)):
      of = {part: np.ascontiguousarray(value[e, rows]) for part, rows in parts.items()}
      found |= {f"{start}.{e}.{part}.weight": x for part, x in of.items()}
  return found


def test_deepseek_computes_as_the_published_layers_and_back(deepseek, reference, tmp_path):
  theirs, head = deepseek
  expected = reference(theirs, TOKENS) @ head.numpy().T
  tensors = {name: x.numpy() for name, x in theirs.state_dict().items()}
  tensors = {f"model.{name}": x for name, x in one_by_one(tensors, 16).items()}
  tensors["lm_head.weight"] = head.numpy()
  safetensors.numpy.save_file(tensors, tmp_path / SINGLE)
  (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK))
  model = models.load(tmp_path)
  np.testing.assert_allclose(model(TOKENS), expected, atol=2e-5, rtol=1e-5)
  saved = models.save(model, tmp_path / "saved")
  again = safetensors.numpy.load_file(saved / SINGLE)
  chex.assert_trees_all_equal(again, tensors)
  described = json.loads((saved / "config.json").read_text())
  assert described | DEEPSEEK == described | {"seq_aux": True}


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe"])
def test_experts_stacked_in_files_are_those_one_by_one(model_type, tiny_folder, tmp_path):
  folder, theirs = tiny_folder(model_type)
  theirs.save_pretrained(tmp_path / "stacked", save_original_format=False)
  names = safetensors.numpy.load_file(tmp_path / "stacked" / SINGLE)
  assert "model.layers.1.mlp.experts.gate_up_proj" in names
  ours, stacked = (models.load(path).params for path in (folder, tmp_path / "stacked"))
  chex.assert_trees_all_equal(ours, stacked)


def test_an_upcycled_llama_is_a_mixtral(folder, reference, tmp_path):
  transformers = pytest.importorskip("transformers")
  pytest.importorskip("torch")
  dense, kind = models.load(folder), transformers.AutoModelForCausalLM
  config, params = moe.upcycle(dense.config, dense.params, jax.random.key(0), experts=3)
  config = dataclasses.replace(config, family="mixtral")
  model = models.Model(config, models.Transformer(config), params)
  theirs = kind.from_pretrained(models.save(model, tmp_path / "mixtral"))
  assert type(theirs).__name__ == "MixtralForCausalLM"
  expected = reference(kind.from_pretrained(folder), TOKENS)
  np.testing.assert_allclose(reference(theirs, TOKENS), expected, atol=1e-5)


# All parameters and those of a token, counted by their authors, in billions: Mistral AI (2023),
# Qwen (2024), arXiv 2409.02060 (table 1), arXiv 2401.06066 (section 5).
PUBLISHED = {
  "mixtral-8x7b": (46.7, 12.9),
  "qwen1.5-moe-a2.7b": (14.3, 2.7),
  "olmoe-1b-7b": (6.92, 1.28),
  "deepseek-moe-16b": (16.4, 2.83),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
  config = presets.preset(name)
  init, tokens = models.Transformer(config).init, jax.ShapeDtypeStruct((1, 1), np.int32)
  shapes = jax.eval_shape(init, jax.random.key(0), tokens)["params"]
  counts = cost.parameters(shapes) / 1e9, cost.active_parameters(config, shapes) / 1e9
  np.testing.assert_allclose(counts, PUBLISHED[name], rtol=5e-3)
  assert families.family_of(config).to_config(families.hf_config(config)) == config


NAMES = ("mixtral-8x7b", "qwen1.5-moe-a2.7b", "olmoe-1b-7b", "deepseek-moe-16b")
MIXTRAL, QWEN, OLMOE, DEEP = (families.hf_config(presets.preset(name)) for name in NAMES)
SPARSE = {"decoder_sparse_step": 2, "mlp_only_layers": [3]}


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (MIXTRAL | {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1; allowed: 0.0"),
    (MIXTRAL | {"num_experts_per_tok": 9}, "num_experts_per_tok=9; allowed: up to num_local_exp"),
    (MIXTRAL | {"num_experts": 4}, "num_experts=4; allowed: what num_local_experts=8 says"),
    (MIXTRAL | {"num_local_experts": 0}, "num_local_experts=0; allowed: from 1"),
    (MIXTRAL | {"norm_topk_prob": False}, "'norm_topk_prob'=False is not known"),
    (QWEN | {"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size=0; allowed"),
    (QWEN | {"mlp_only_layers": 3}, "mlp_only_layers=3; allowed: a list of int"),
    (QWEN | {"decoder_sparse_step": 0}, "decoder_sparse_step=0; allowed: from 1"),
    (QWEN | {"layer_types": ["sliding_attention"] * 24}, "use_sliding_window=False; allowed: true"),
    (OLMOE | {"clip_qkv": 8.0}, "clip_qkv=8.0; allowed: None"),
    (
      OLMOE | {"head_dim": 64},
      "head_dim=64; allowed: null, hidden_size=2048 / num_attention_heads",
    ),
    (DEEP | {"scoring_func": "sigmoid"}, "scoring_func='sigmoid'; allowed: 'softmax'"),
    (DEEP | {"n_group": 2}, "'n_group'=2 is not known"),
    (DEEP | {"topk_group": 1}, "'topk_group'=1 is not known"),
    (DEEP | {"routed_scaling_factor": 2.0}, "'routed_scaling_factor'=2.0 is not known"),
    (DEEP | {"moe_layer_freq": 0}, "moe_layer_freq=0; allowed: from 1"),
    (DEEP | {"n_routed_experts": None}, "'n_routed_experts' is missing"),
    (DEEP | {"aux_loss_alpha": "x"}, "aux_loss_alpha='x'; allowed: numbers"),
  ],
)
def test_fields_that_change_what_is_computed_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    families.of_model_type(fields["model_type"]).to_config(fields)


@pytest.mark.parametrize(
  ("fields", "sparse"),
  [
    (QWEN | SPARSE, {i for i in range(24) if i % 2 == 1} - {3}),
    (QWEN | {"model_type": "qwen3_moe"}, set(range(24))),
    (DEEP | {"first_k_dense_replace": 2, "moe_layer_freq": 3}, set(range(3, 28, 3))),
    (DEEP | {"first_k_dense_replace": 27}, {27}),
  ],
)
def test_which_layers_are_mixtures(fields, sparse):
  others = ("layer_types", "qkv_bias", "shared_expert_intermediate_size")
  if fields["model_type"] == "qwen3_moe":
    fields = {name: value for name, value in fields.items() if name not in others}
  config = families.of_model_type(fields["model_type"]).to_config(fields)
  found = {i for i, spec in enumerate(config.layers) if isinstance(spec.ffn, moe.MoE)}
  assert found == sparse
  assert families.family_of(config).to_config(families.hf_config(config)) == config


def changed(name, layers=..., **fields):
  """A preset whose mixtures have other fields, in some of the layers."""
  config = presets.preset(name)
  specs = list(config.layers)
  for i in range(len(specs))[layers if layers is not ... else slice(None)]:
    specs[i] = dataclasses.replace(specs[i], ffn=specs[i].ffn.copy(**fields))
  return dataclasses.replace(config, layers=tuple(specs))


@pytest.mark.parametrize(
  ("config", "message"),
  [
    (changed("mixtral-8x7b", shared=MLP(8)), r"ffn.shared is MLP; .* holds NoneType there"),
    (changed("mixtral-8x7b", expert=Gated(MLP(8))), r"ffn.expert is Gated; .* holds MLP there"),
    (
      changed("mixtral-8x7b", router=moe.TopK(8, 2, False)),
      r"layers\[0\].ffn.router.renormalize=False is not something",
    ),
    (
      changed("olmoe-1b-7b", slice(3, 4), router=moe.TopK(32, 8, False)),
      r"layers\[3\].ffn.router.experts=32 is not something",
    ),
    (
      changed("deepseek-moe-16b", slice(1, None), shared=MLP(1400, "silu", True)),
      "ffn.shared.width=1400; the layout of family 'deepseek' holds multiples of 1408",
    ),
    (
      changed("qwen1.5-moe-a2.7b", shared=Gated(MLP(8))),
      r"ffn.shared.inner.activation=gelu is not",
    ),
    (changed("qwen1.5-moe-a2.7b", shared=None), "ffn.shared is NoneType; .* holds Gated there"),
  ],
)
def test_what_a_layout_of_mixtures_cannot_express_is_named(config, message):
  with pytest.raises(ValueError, match=message):
    families.hf_config(config)


def test_how_a_router_trains_does_not_hinder_saving():
  config = changed("olmoe-1b-7b", router=moe.TopK(64, 8, False, load_balance=0.5, z=0.1))
  assert families.hf_config(config)["router_aux_loss_coef"] == 0.5


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
  """The folder of a random Mixtral."""
  fields = {"vocab_size": 64, "max_position_embeddings": 64, **TINY["mixtral"]}
  config = families.of_model_type("mixtral").to_config(fields)
  module = models.Transformer(config)
  params = random_params(module, np.zeros((1, 1), np.int32))
  return models.save(models.Model(config, module, params), tmp_path_factory.mktemp("m") / "moe")


W1 = "model.layers.1.block_sparse_moe.experts.3.w1.weight"


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda tensors: tensors.pop(W1), r"missing tensors: layers\.1\..*experts\.3\.w1\.weight"),
    (
      lambda tensors: tensors.update({W1: np.zeros((47, 32), np.float32)}),
      r"w1.weight' has shape \(47, 32\); the configuration wants \(48, 32\) .*ffn/experts/gate",
    ),
    (
      lambda tensors: tensors.update({W1.replace(".3.", ".4."): tensors[W1]}),
      r"unexpected tensors: .*experts\.4\.w1\.weight",
    ),
    (lambda tensors: tensors[W1].fill(np.nan), f"'{W1}' holds values that are not finite"),
    (
      lambda tensors: tensors.update(
        {"model.layers.1.mlp.experts.down_proj": np.zeros((4, 32, 47), np.float32)}
      ),
      r"experts\.down_proj' and .*experts\.0\.w2\.weight' are one; allowed: either",
    ),
  ],
)
def test_damaged_experts_are_named(change, message, mixtral, tmp_path):
  (tmp_path / "config.json").write_text((mixtral / "config.json").read_text())
  tensors = safetensors.numpy.load_file(mixtral / SINGLE)
  change(tensors)
  safetensors.numpy.save_file(tensors, tmp_path / SINGLE)
  with pytest.raises(ValueError, match=message):
    models.load(tmp_path)
