"""Folders of Hugging Face's peft open here, and folders of ours open there, with equal outputs."""

import copy
import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from chex import assert_trees_all_equal

from effjax import models, peft
from effjax.core import trees
from tests.models.conftest import WHY_TORCH, tiny
from tests.modules import apply

torch = pytest.importorskip("torch", reason=WHY_TORCH)
theirs = pytest.importorskip("peft", reason=WHY_TORCH)

TOKENS = np.random.default_rng(0).integers(0, 64, (2, 7))
TWO = {"num_hidden_layers": 2}
TIED = TWO | {"tie_word_embeddings": True}


def lora(*targets, **fields):
  targets = targets[0] if len(targets) == 1 and "all" in targets[0] else [*targets]
  return theirs.LoraConfig(target_modules=targets, **({"r": 4, "lora_alpha": 6} | fields))


def parameters(*targets, modules=(), **fields):
  return lora(*modules, target_parameters=[*targets], **fields)


def ia3(*targets, **fields):
  return theirs.IA3Config(target_modules=[*targets], **fields)


def prefix(task, **fields):
  return theirs.PrefixTuningConfig(task_type=task, num_virtual_tokens=3, **fields)


PATTERNS = {
  "rank_pattern": {"layers.1.self_attn.q_proj": 2, "down_proj": 3},
  "alpha_pattern": {"v_proj": 5, "^model.layers.0.mlp.up_proj": 9},
}
# By what is shown: the model, the configuration, and what shall be in our folder's.
CASES = {
  "rank and alpha patterns, rslora, exclusions": (
    ("llama", TWO),
    lora("all-linear", use_rslora=True, exclude_modules=["gate_proj"], **PATTERNS),
    {"rank_pattern": {"mlp.down_proj": 3, "model.layers.1.self_attn.q_proj": 2}},
  ),
  "a tied table": (
    ("llama", TIED),
    lora("embed_tokens", "q_proj", ensure_weight_tying=True),
    {"target_modules": ["embed_tokens", "self_attn.q_proj", "lm_head"]},
  ),
  "one end of a tied model": (
    ("llama", TIED),
    lora("embed_tokens", "q_proj", modules_to_save=["norm"], layers_to_transform=0),
    {"modules_to_save": ["input_layernorm", "post_attention_layernorm", "norm"]},
  ),
  "dora": (
    ("llama", TWO),
    lora("q_proj", "down_proj", "embed_tokens", use_dora=True, layers_to_transform=[1]),
    {"use_dora": True},
  ),
  "three parameters in one matrix that lies the other way": (
    ("gpt2", {}),
    lora("c_attn", "c_proj", task_type="CAUSAL_LM", lora_dropout=0.1),
    {"r": 4, "fan_in_fan_out": True, "lora_dropout": 0.1},
  ),
  "pissa": (("gpt2", {}), lora("c_attn", init_lora_weights="pissa"), {"r": 8, "lora_alpha": 12}),
  "an encoder with its biases": (
    ("bert", {}),
    lora("query", "dense", "word_embeddings", bias="all"),
    {"bias": "all"},
  ),
  "norms whose scale is stored less 1": (
    ("gemma3_text", TWO),
    lora("q_proj", "up_proj", modules_to_save=["input_layernorm", "k_norm"]),
    {"modules_to_save": ["input_layernorm", "self_attn.k_norm"]},
  ),
  "dora on columns side by side": (
    ("phi3", TWO),
    lora("qkv_proj", "gate_up_proj", use_dora=True),
    {"target_modules": ["self_attn.qkv_proj", "mlp.gate_up_proj"]},
  ),
  "experts, and a router": (
    ("mixtral", {}),
    parameters("experts.gate_up_proj", "down_proj", "gate.weight", modules=["q_proj"]),
    {
      "target_modules": ["self_attn.q_proj"],
      "target_parameters": ["mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
  ),
  "some of the experts' matrices, beside shared experts": (
    ("qwen2_moe", {"decoder_sparse_step": 2}),
    parameters("experts.down_proj", modules=["down_proj"], rank_pattern={"experts.down_proj": 2}),
    {"rank_pattern": {"mlp.experts.down_proj": 2}},
  ),
  "ia3 of inputs that two maps share": (
    ("phi3", TWO),
    ia3("qkv_proj", "gate_up_proj", "down_proj", feedforward_modules=["gate_up_proj"]),
    {"feedforward_modules": ["mlp.gate_up_proj"]},
  ),
  "ia3 by names of which one ends another": (
    ("bert", {}),
    ia3("key", "value", "output.dense", feedforward_modules=["output.dense"]),
    {"feedforward_modules": ["attention.output.dense", "output.dense"]},
  ),
  "a projected prefix": (
    ("llama", TWO),
    prefix("CAUSAL_LM", prefix_projection=True, encoder_hidden_size=8),
    {"token_dim": 16, "num_attention_heads": 2},
  ),
  "the prefix of an encoder, whose positions move": (
    ("bert", {}),
    prefix("FEATURE_EXTRACTION"),
    {"task_type": "FEATURE_EXTRACTION"},
  ),
}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
  """A function: a random model of transformers, a copy of its own, and ours."""
  made = {}

  def get(kind, **fields):
    key = (kind, *fields.items())
    if key not in made:
      folder = tmp_path_factory.mktemp(kind)
      made[key] = tiny(kind, folder, **fields), models.load(folder)
    model, ours = made[key]
    return copy.deepcopy(model), ours

  return get


def output(model):
  with torch.no_grad():
    found = model(input_ids=torch.from_numpy(TOKENS))
  return (found.logits if hasattr(found, "logits") else found.last_hidden_state).numpy()


def trained(model, config):
  """A model of theirs with adapters that have been moved from their start."""
  wrapped = theirs.get_peft_model(model, config).eval()
  torch.manual_seed(1)
  with torch.no_grad():
    for parameter in wrapped.parameters():
      if parameter.requires_grad:
        parameter.add_(0.2 * torch.randn(parameter.shape))
  return wrapped


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_folders_open_on_both_sides(published, tmp_path, case):
  (kind, fields), config, said = CASES[case]
  model, base = published(kind, **fields)
  plain = output(model)
  wrapped = trained(model, copy.deepcopy(config))
  wrapped.save_pretrained(tmp_path / "theirs")
  expected = output(wrapped)
  assert np.abs(expected - plain).max() > 0.3

  adapted = peft.load(base, tmp_path / "theirs")
  np.testing.assert_allclose(adapted(TOKENS), expected, rtol=1e-4, atol=2e-5)
  paths = trees.trained(adapted.params)
  assert paths.isdisjoint(trees.trained(base.params))

  peft.save(adapted, tmp_path / "ours")
  written = json.loads((tmp_path / "ours/adapter_config.json").read_text())
  assert {name: written.get(name) for name in said} == said
  opened = theirs.PeftModel.from_pretrained(published(kind, **fields)[0], tmp_path / "ours").eval()
  np.testing.assert_allclose(output(opened), expected, rtol=1e-4, atol=2e-5)
  again = peft.load(base, tmp_path / "ours")
  assert again.config == adapted.config
  assert_trees_all_equal(again.params, adapted.params)


@pytest.mark.filterwarnings("ignore")
def test_experts_one_by_one_as_older_folders_have_them(published, tmp_path):
  model, base = published("mixtral")
  shapes = {"w1": (48, 32), "w2": (32, 48), "w3": (48, 32), "gate": (4, 32)}
  rng, tensors = np.random.default_rng(0), {}
  for layer, (name, (outputs, inputs)) in itertools.product(range(2), shapes.items()):
    for e in range(4) if name != "gate" else (None,):
      start = f"base_model.model.model.layers.{layer}.block_sparse_moe."
      start += name if e is None else f"experts.{e}.{name}"
      for end, shape in {"A": (2, inputs), "B": (outputs, 2)}.items():
        tensors[f"{start}.lora_{end}.weight"] = rng.normal(0, 0.3, shape).astype(np.float32)
  safetensors.numpy.save_file(tensors, tmp_path / "adapter_model.safetensors")
  lora(*shapes, r=2, task_type="CAUSAL_LM").save_pretrained(tmp_path)
  adapted = peft.load(base, tmp_path)
  opened = theirs.PeftModel.from_pretrained(model, tmp_path).eval()
  np.testing.assert_allclose(adapted(TOKENS), output(opened), rtol=1e-4, atol=2e-5)
  peft.save(adapted, tmp_path / "ours")
  assert_trees_all_equal(peft.load(base, tmp_path / "ours").params, adapted.params)
  opened = theirs.PeftModel.from_pretrained(published("mixtral")[0], tmp_path / "ours").eval()
  np.testing.assert_allclose(adapted(TOKENS), output(opened), rtol=1e-4, atol=2e-5)


def moved(params):
  """Adapters that are no longer at their start."""
  paths, rng = trees.trained(params), np.random.default_rng(2)
  chosen, rest = trees.partition(params, lambda path, _: path in paths)
  more = lambda x: x + rng.normal(0, 0.2, x.shape).astype(np.float32)
  return trees.merge(jax.tree.map(more, chosen), rest)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_some_of_the_parameters_in_a_matrix(published, tmp_path, method):
  model, base = published("gpt2")
  if method == "ia3":
    params = peft.ia3.add(base.params)
  else:
    ranks = {"query": 4, "value": 2}
    params = peft.lora.add(base.params, jax.random.key(0), rank=ranks, dora=method == "dora")
  adapted = dataclasses.replace(base, params=moved(params))
  peft.save(adapted, tmp_path)
  opened = theirs.PeftModel.from_pretrained(model, tmp_path).eval()
  np.testing.assert_allclose(adapted(TOKENS), output(opened), rtol=1e-4, atol=2e-5)
  assert_trees_all_equal(peft.load(base, tmp_path).params, adapted.params)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["gpt2", "gemma3_text"])
def test_a_soft_prompt(published, tmp_path, kind):
  fields = {} if kind == "gpt2" else TWO
  model, base = published(kind, **fields)
  config = theirs.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
  wrapped = trained(model, config)
  wrapped.save_pretrained(tmp_path / "theirs")
  adapted = peft.load(base, tmp_path / "theirs")
  tokens = peft.soft_prompt.prepend(adapted.params, TOKENS)
  np.testing.assert_allclose(
    apply(adapted.module, adapted.params, tokens), output(wrapped), rtol=1e-4, atol=2e-5
  )
  peft.save(adapted, tmp_path / "ours")
  opened = theirs.PeftModel.from_pretrained(published(kind, **fields)[0], tmp_path / "ours").eval()
  np.testing.assert_array_equal(output(opened), output(wrapped))
  assert_trees_all_equal(peft.load(base, tmp_path / "ours").params, adapted.params)
