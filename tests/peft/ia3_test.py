"""IA³ against numpy and, on the weights of a tiny model, against Hugging Face's peft."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from chex import assert_trees_all_equal

from effjax import peft
from effjax.core import linear, trees
from effjax.kernels.grouped_matmul import grouped_linear
from effjax.models import load
from effjax.peft import IA3, LoRA, ia3
from effjax.quant import Int8, quantize
from effjax.train import init_state, make_train_step, next_token
from tests.modules import apply, normal

W, X, BIAS = normal(6, 4), normal(3, 6, seed=1), normal(4, seed=2)
OUT, IN = 1 + normal(1, 4, seed=3) / 4, 1 + normal(6, 1, seed=4) / 4


@pytest.mark.parametrize("scale", [OUT, IN], ids=["outputs", "inputs"])
@pytest.mark.parametrize("base", ["array", "int8", "lora"])
def test_it_multiplies_outputs_whole_or_inputs(scale, base):
  w = W if base == "array" else Int8.quantize(W)
  if base == "lora":
    w = LoRA(W, normal(6, 2), normal(2, 4), jnp.ones((1, 1)))
  x, matrix, vector, bias = (np.asarray(v, np.float64) for v in (X, w, scale, BIAS))
  expected = (x @ matrix + bias) * vector if scale is OUT else (x * vector[:, 0]) @ matrix + bias
  np.testing.assert_allclose(linear(X, IA3(w, scale), BIAS), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["tiles", "ragged", "reference"])
def test_experts_scale_their_biases_too(implementation):
  w, sizes, bias = normal(2, 6, 4), jnp.array([1, 2]), normal(2, 4, seed=2)
  adapted = IA3(w, 1 + normal(2, 1, 4, seed=3) / 4)
  y = grouped_linear(X, adapted, sizes, bias, implementation=implementation)
  group = np.array([0, 1, 1])
  expected = np.einsum("md,mdf->mf", X, w[group]) + bias[group]
  expected = expected * adapted.scale[group, 0]
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_a_square_matrix_and_vectors_of_one_entry():
  x = jnp.array([[2.0]])
  assert linear(x, IA3(jnp.ones((1, 1)), jnp.full((1, 1), 3.0)), jnp.ones(1)).item() == 9
  column = linear(X, IA3(normal(6, 1), jnp.full((1, 1), 3.0)), jnp.ones(1))
  np.testing.assert_allclose(column, 3 * (X @ normal(6, 1) + 1), rtol=1e-5)
  row = linear(x, IA3(normal(1, 4), jnp.full((1, 1), 3.0)), BIAS)[0]
  np.testing.assert_allclose(row, 6 * normal(1, 4)[0] + BIAS, rtol=1e-5)


torch = pytest.importorskip("torch", reason="torch and peft are installed with Python 3.11")
hf_peft = pytest.importorskip("peft", reason="torch and peft are installed with Python 3.11")
transformers = pytest.importorskip("transformers", reason="as above")
TOKENS = np.arange(24).reshape(2, 12) % 50
NAMES = {
  "mixer/key/kernel": "self_attn.k_proj",
  "mixer/value/kernel": "self_attn.v_proj",
  "ffn/down/kernel": "mlp.down_proj",
}


@pytest.fixture
def peers(tmp_path):
  """A Qwen 2, whose keys and values have biases, as ours and with peft's vectors."""
  torch.manual_seed(0)
  peer = transformers.Qwen2ForCausalLM(
    transformers.Qwen2Config(
      vocab_size=50,
      hidden_size=16,
      intermediate_size=24,
      num_hidden_layers=2,
      num_attention_heads=2,
      num_key_value_heads=1,
      max_position_embeddings=16,
      initializer_range=0.3,
    )
  )
  for name, tensor in peer.named_parameters():
    if name.endswith("bias"):
      torch.nn.init.normal_(tensor, std=0.3)
  peer.save_pretrained(tmp_path)
  targets = [name.split(".")[1] for name in NAMES.values()]
  settings = hf_peft.IA3Config(target_modules=targets, feedforward_modules=["down_proj"])
  return load(tmp_path), hf_peft.get_peft_model(peer, settings)


def vectors(wrapped, path):
  """peft's vectors of both layers at a path of ours."""
  module = next(name for ours, name in NAMES.items() if path.endswith(ours))
  state = wrapped.state_dict()
  key = "base_model.model.model.layers.{}.{}.ia3_l.default"
  return np.stack([state[key.format(i, module)].numpy().T for i in range(2)])


def test_logits_one_step_and_merged_weights_equal_pefts(peers):
  model, wrapped = peers
  params = ia3.add(model.params)
  assert trees.count(params) - trees.count(model.params) == sum(
    p.numel() for p in wrapped.parameters() if p.requires_grad
  )
  for name, tensor in wrapped.named_parameters():
    if "ia3_l" in name:
      torch.nn.init.uniform_(tensor, 0.5, 1.5)
  take = lambda path, w: IA3(w.base, jnp.asarray(vectors(wrapped, path)))
  params = trees.update(params, lambda path, w: isinstance(w, IA3), take)
  tokens = torch.from_numpy(TOKENS)
  with torch.no_grad():
    expected = wrapped(tokens).logits.numpy()
  logits = apply(model.module, params, TOKENS)
  np.testing.assert_allclose(logits, expected, atol=1e-4)
  merged = peft.merge(params)
  np.testing.assert_allclose(apply(model.module, merged, TOKENS), expected, atol=1e-4)

  optimizer = optax.sgd(0.1)
  batch = {"tokens": TOKENS[:, :-1], "targets": TOKENS[:, 1:]}
  state = init_state(jax.tree.map(jnp.array, params), optimizer)
  state, _ = make_train_step(next_token(model.module), optimizer)(state, batch, jax.random.key(0))
  wrapped(tokens, labels=tokens).loss.backward()
  with torch.no_grad():
    for tensor in wrapped.parameters():
      if tensor.grad is not None:
        tensor -= 0.1 * tensor.grad
  found = {p: w for p, w in trees.items(state.params).items() if isinstance(w, IA3)}
  assert len(found) == 3
  for path, w in found.items():
    np.testing.assert_allclose(w.scale, vectors(wrapped, path), atol=1e-4)
    assert np.abs(np.asarray(w.scale) - trees.items(params)[path].scale).max() > 1e-3
  assert_trees_all_equal(peft.detach(state.params)[0], model.params)


def test_it_starts_as_the_base_and_comes_off_again(tmp_path):
  mixer = {"key": {"kernel": normal(2, 6, 4), "bias": normal(2, 4)}}
  base = quantize({"mixer": mixer, "ffn": {"experts": {"down": {"kernel": normal(2, 3, 6, 4)}}}})
  params = ia3.add(base)
  down = params["ffn"]["experts"]["down"]["kernel"]
  assert down.scale.shape == (2, 3, 6, 1) and down.parameters == 2 * 3 * 6 * 5
  first = jax.tree.map(lambda x: x[0], params["mixer"]["key"])
  plain = jax.tree.map(lambda x: x[0], base["mixer"]["key"])
  assert_trees_all_equal(
    linear(X, first["kernel"], first["bias"]), linear(X, plain["kernel"], plain["bias"])
  )
  peft.save(params, tmp_path)
  assert_trees_all_equal(peft.load(base, tmp_path), params)
  assert_trees_all_equal(peft.detach(params)[0], base)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"targets": "absent"}, "'absent' matches no parameter"),
    ({"feedforward": "bias"}, "selects no matrix"),
    ({"targets": None, "feedforward": None}, "targets=None and feedforward=None; allowed"),
    ({"targets": "kernel"}, "targets and feedforward both match ffn/down/kernel"),
  ],
)
def test_bad_arguments_are_named(arguments, message):
  params = {"ffn": {"down": {"kernel": W, "bias": BIAS}}, "mixer": {"key": {"kernel": W}}}
  with pytest.raises(ValueError, match=message):
    ia3.add(params, **arguments)
  with pytest.raises(ValueError, match="key/kernel has an IA3 already"):
    ia3.add(ia3.add(params), feedforward=None)
  with pytest.raises(ValueError, match=r"scale has shape \(4,\); allowed: \(1, 4\), \(6, 1\)"):
    IA3(W, BIAS)
