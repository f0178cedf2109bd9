import dataclasses
import math

import chex
import gguf
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import NamedSharding, PartitionSpec

from effjax import models
from effjax.core import trees
from effjax.layers import Rope, stack
from effjax.layers.rope_scaling import Yarn
from effjax.models.families import gguf_names
from effjax.models.safetensors_files import SINGLE
from effjax.parallel import make_mesh
from effjax.quant import GGUF, dequantize

TOKENS = np.random.default_rng(0).integers(3, 64, (2, 13)).astype(np.int32)
GGUF_FIELDS = {
  "context_length": 64,
  "embedding_length": 32,
  "feed_forward_length": 48,
  "attention.head_count": 4,
}


def write_gguf(path, architecture, tensors, fields, rename):
  """A GGUF file as llama.cpp's converter lays it out, from the tensors of a folder."""
  writer = gguf.GGUFWriter(path, architecture)
  adders = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
  for name, value in fields.items():
    getattr(writer, f"add_{adders[type(value)]}")(f"{architecture}.{name}", value)
  for name, value in tensors.items():
    writer.add_tensor(*rename(name, value))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def gguf_name(model_type, name):
  name = name.removeprefix("model.")
  top = {hf: ours for ours, hf in gguf_names.TOP_NAMES.items()}
  if name in top:
    return top[name]
  _, i, rest = name.split(".", 2)
  layer = {hf: ours for ours, hf in gguf_names.LAYER_NAMES[model_type].items()}
  stem, kind = rest.rsplit(".", 1)
  return f"blk.{i}.{layer[stem]}.{kind}"


def interleaved(x, heads):
  """Rows (i, i + H/2) of each head next to each other, as llama.cpp wants rotary pairs."""
  split = x.reshape(heads, 2, -1, x.shape[-1])
  return np.ascontiguousarray(split.transpose(0, 2, 1, 3)).reshape(x.shape)


def test_llama_gguf_computes_as_the_folder_it_came_from(folder, tmp_path):
  def rename(name, value):
    heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
    return gguf_name("llama", name), interleaved(value, heads) if heads else value

  fields = {
    "block_count": 3,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 10_000.0,
  }
  tensors = safetensors.numpy.load_file(folder / SINGLE)
  write_gguf(tmp_path / "x.gguf", "llama", tensors, GGUF_FIELDS | fields, rename)
  model = models.load(tmp_path / "x.gguf")
  assert model.tokenizer is None
  chex.assert_trees_all_equal(model.params, models.load(folder).params)
  np.testing.assert_allclose(model(TOKENS), models.load(folder)(TOKENS), atol=1e-5)


GEMMA_FIELDS = {
  "attention.head_count_kv": 1,
  "attention.key_length": 16,
  "attention.sliding_window": 4,
  "attention.layer_norm_rms_epsilon": 1e-6,
}
QWEN_FIELDS = {
  "block_count": 3,
  "attention.head_count_kv": 2,
  "attention.layer_norm_rms_epsilon": 1e-6,
  "rope.freq_base": 10_000.0,
}
LOCAL, GLOBAL = "sliding_attention", "full_attention"
# model_type, fields of transformers' configuration, metadata.
PEERS = {
  "gemma3": ("gemma3_text", {}, {"block_count": 7, "rope.freq_base": 1e6}),
  "gemma3-local-base-and-period": (
    "gemma3_text",
    {
      "num_hidden_layers": 3,
      "rope_local_base_freq": 500.0,
      "sliding_window_pattern": 3,
      "final_logit_softcapping": 3.0,
    },
    {
      "block_count": 3,
      "rope.freq_base_swa": 500.0,
      "attention.sliding_window_pattern": 3,
      "final_logit_softcapping": 3.0,
    },
  ),
  "gemma3-every-layer": (
    "gemma3_text",
    {"num_hidden_layers": 3, "layer_types": [GLOBAL, LOCAL, LOCAL]},
    {"block_count": 3, "attention.sliding_window_pattern": [False, True, True]},
  ),
  "gemma2": (
    "gemma2",
    {},
    {"block_count": 4, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
  ),
  "qwen2": ("qwen2", {}, QWEN_FIELDS),
  "qwen3": ("qwen3", {"head_dim": 12}, QWEN_FIELDS | {"attention.key_length": 12}),
}


@pytest.mark.parametrize("case", PEERS)
def test_gguf_computes_as_transformers(case, tiny_folder, reference, tmp_path):
  model_type, changes, metadata = PEERS[case]
  architecture = model_type.removesuffix("_text")
  gemma = architecture.startswith("gemma")
  changes = changes | ({"query_pre_attn_scalar": 16} if gemma else {})
  folder, theirs = tiny_folder(model_type, **changes)
  shift = lambda name, x: x + 1 if gemma and name.endswith("norm.weight") else x
  rename = lambda name, value: (gguf_name(architecture, name), shift(name, value))
  tensors = safetensors.numpy.load_file(folder / SINGLE)
  fields = GGUF_FIELDS | (GEMMA_FIELDS if gemma else {}) | metadata
  write_gguf(tmp_path / "x.gguf", architecture, tensors, fields, rename)
  got = models.load(tmp_path / "x.gguf")(TOKENS)
  np.testing.assert_allclose(got, reference(theirs, TOKENS), atol=2e-5)


def write_llama(path, folder, more=(), stored=lambda *tensor: tensor, **fields):
  """The saved Llama as a GGUF file, with other metadata and more tensors, as `stored` has them."""

  def rename(name, value):
    heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
    if name.startswith("model.") or name in gguf_names.TOP_NAMES.values():
      name = gguf_name("llama", name)
    return stored(name, interleaved(value, heads) if heads else value)

  described = {"block_count": 3, "attention.head_count_kv": 2, "rope.freq_base": 10_000.0}
  described["attention.layer_norm_rms_epsilon"] = 1e-5
  tensors = safetensors.numpy.load_file(folder / SINGLE) | dict(more)
  write_gguf(path, "llama", tensors, GGUF_FIELDS | described | fields, rename)
  return path


def mixed_blocks(name, value):
  """A matrix in blocks, where they fit; those of the first layer's values are of another type."""
  if value.ndim < 2 or value.shape[-1] % 32:
    return name, value
  kind = gguf.GGMLQuantizationType["Q8_0" if name == "blk.0.attn_v.weight" else "Q4_1"]
  return name, gguf.quants.quantize(value, kind), None, kind


def test_blocks_of_a_gguf_file_stay_as_they_are(folder, tmp_path):
  path = tmp_path / "x.gguf"
  write_llama(path, folder, stored=mixed_blocks)
  plain, packed = models.load(path), models.load(path, packed=True)
  kept = [p for p, x in trees.items(packed.params).items() if isinstance(x, GGUF)]
  assert len(kept) == 2 + 2 * 6 and not any("down" in path for path in kept)
  assert len(packed.params) == len(plain.params) + 1  # the first layer is on its own
  full = dequantize(packed.params)
  as_plain = stack.join(plain.config, *stack.split(packed.config, full))
  chex.assert_trees_all_equal(as_plain, plain.params)
  np.testing.assert_allclose(packed(TOKENS), plain(TOKENS), atol=1e-5)
  models.save(dataclasses.replace(packed, params=full), tmp_path / "saved")
  np.testing.assert_allclose(models.load(tmp_path / "saved")(TOKENS), plain(TOKENS), atol=1e-5)
  with pytest.raises(ValueError, match=r"packed: .* has no blocks; allowed: GGUF files"):
    models.load(folder, packed=True)


def test_blocks_go_straight_into_their_sharding(folder, tmp_path):
  path, mesh = tmp_path / "x.gguf", make_mesh(data=2)
  write_llama(path, folder, stored=mixed_blocks)
  columns = lambda path, shape: NamedSharding(
    mesh, PartitionSpec(*[None] * (len(shape) - 1), *["data"] * (len(shape) > 1))
  )
  found = models.load(path, sharding=columns, packed=True)
  w = trees.select(found.params, "ffn/up/kernel").popitem()[1]
  assert w.codes.sharding.spec[-2:] == ("data", None)


def test_divisors_of_rotary_frequencies_in_a_tensor(folder, tmp_path):
  divisors = np.array([1.0, 1.5, 4.0, 8.0], np.float32)
  path = write_llama(tmp_path / "x.gguf", folder, [("rope_freqs.weight", divisors)])
  plain = models.load(write_llama(tmp_path / "y.gguf", folder))
  model = models.load(path)
  chex.assert_trees_all_equal(model.params, plain.params)
  rope = model.config.layers[0].mixer.rope
  frequencies, _ = rope._frequencies(8, jnp.arange(13)[None])
  np.testing.assert_allclose(frequencies[0], 1e4 ** (-np.arange(4) / 4) / divisors, rtol=1e-6)
  assert np.abs(model(TOKENS) - plain(TOKENS)).max() > 1e-3
  saved = models.load(models.save(model, tmp_path / "saved"))
  np.testing.assert_allclose(saved(TOKENS), model(TOKENS), atol=1e-5)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"expert_count": 4}, "llama.expert_count=4; allowed"),
    ({"logit_scale": 0.5}, "metadata 'llama.logit_scale'=0.5 is not known"),
    ({"rope.scaling.attn_factor": 2.0}, "llama.rope.scaling.attn_factor=2.0; allowed"),
    ({"rope.dimension_count": 4, "attention.key_length": 8}, "rope.dimension_count=4; allowed"),
    ({"attention.value_length": 4}, "attention.value_length=4; allowed"),
    ({"vocab_size": 63}, "llama.vocab_size=63; allowed"),
    ({"block_count": 10_000_000}, "llama.block_count=10000000; allowed: up to"),
    ({"attention.head_count": 0}, "llama.attention.head_count=0; allowed: from 1"),
    ({"embedding_length": 3.5}, "llama.embedding_length=3.5; allowed: integers"),
  ],
)
def test_gguf_metadata_are_honoured_or_refused_by_name(fields, message, folder, tmp_path):
  with pytest.raises(ValueError, match=rf"x\.gguf: .*{message}"):
    models.load(write_llama(tmp_path / "x.gguf", folder, **fields))


@pytest.mark.parametrize(
  ("fields", "want"),
  [
    ({"rope.scale_linear": 4.0}, Rope(1e4, 4.0)),
    ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, Rope(1e4, 4.0)),
    ({"rope.scaling.type": "none", "rope.scaling.factor": 1.0}, Rope(1e4)),
    (
      {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 2.0,
        "rope.scaling.original_context_length": 32,
        "rope.scaling.yarn_beta_fast": 16.0,
      },
      Rope(1e4, scaling=Yarn(2.0, 32, 1 + 0.1 * math.log(2), 16.0)),
    ),
  ],
)
def test_rotary_scaling_of_gguf_files(fields, want, folder, tmp_path):
  path = write_llama(tmp_path / "x.gguf", folder, **fields)
  assert models.load(path).config.layers[0].mixer.rope == want


@pytest.mark.parametrize(
  ("architecture", "fields", "message"),
  [
    ("mamba", {}, "architecture 'mamba'; allowed: llama, gemma3"),
    ("llama", {}, "metadata 'llama.attention.head_count' is missing"),
  ],
)
def test_unsupported_gguf_files(architecture, fields, message, tmp_path):
  tensors = {"embed_tokens.weight": np.zeros((4, 32), np.float32)}
  rename = lambda name, value: (gguf_name("llama", name), value)
  write_gguf(tmp_path / "x.gguf", architecture, tensors, fields, rename)
  with pytest.raises(ValueError, match=message):
    models.load(tmp_path / "x.gguf")
