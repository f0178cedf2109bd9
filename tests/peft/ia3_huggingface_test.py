"""IA³ on a tiny Qwen 2, against Hugging Face's peft on the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from chex import assert_trees_all_equal

from effjax import peft
from effjax.core import trees
from effjax.models import load
from effjax.peft import IA3, ia3
from effjax.train import init_state, make_train_step, next_token
from tests.modules import apply

torch = pytest.importorskip("torch", reason="torch and peft are installed with Python 3.11")
hf_peft = pytest.importorskip("peft", reason="torch and peft are installed with Python 3.11")
transformers = pytest.importorskip("transformers", reason="as torch")
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
  assert_trees_all_equal(peft.unmerge(merged, params), params)
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
