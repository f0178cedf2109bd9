import jax
import jax.numpy as jnp
import numpy as np
import optax

from effjax.attention.multi_head import Attention
from effjax.core import trees
from effjax.layers import MLP
from effjax.layers.spec import LayerSpec, TransformerConfig
from effjax.models.transformer import Transformer
from effjax.peft import LoRA, lora, trainable
from effjax.quant import quantize
from tests.modules import apply, random_params

TOKENS = np.random.default_rng(3).integers(0, 32, (4, 9)).astype(np.int32)


def test_only_arrays_of_adapters_are_chosen_even_among_namesakes():
  params = {"layer": {"kernel": jnp.ones((4, 4)), "a": jnp.ones((4, 4)), "b": jnp.ones(4)}}
  params = lora.add(params, jax.random.key(0), rank=1, targets="kernel")
  chosen, _ = trees.partition(params, trainable(params))
  assert jax.tree.structure(chosen).num_leaves == 2
  assert chosen["layer"]["a"] is None
  assert chosen["layer"]["kernel"].base is None


def test_a_nested_adapter_trains_too_unless_it_is_left_out():
  inner = lora.init(jnp.ones((4, 4)), jax.random.key(0), rank=1, scale=1.0)
  params = {"kernel": lora.init(inner, jax.random.key(1), rank=1, scale=1.0)}
  chosen, _ = trees.partition(params, trainable(params))
  names = [trees.path_string(path) for path, _ in jax.tree_util.tree_leaves_with_path(chosen)]
  assert sorted(names) == ["kernel/a", "kernel/b", "kernel/base/a", "kernel/base/b"]


def test_lora_over_int8_trains_its_factors_and_nothing_else():
  layer = LayerSpec(Attention(2), MLP(32, "relu"))
  module = Transformer(TransformerConfig(32, 16, (layer,) * 2, context=8), remat=True)
  params = quantize(random_params(module, TOKENS[:, :-1]))
  params = lora.add(params, jax.random.key(1), rank=4, targets="kernel|embedding")
  chosen, frozen = trees.partition(params, trainable(params))
  optimizer = optax.adam(0.03)

  def loss_of(chosen):
    logits = module.apply({"params": trees.merge(chosen, frozen)}, jnp.asarray(TOKENS[:, :-1]))
    targets = jnp.asarray(TOKENS[:, 1:])
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

  @jax.jit
  def step(chosen, state):
    loss, grads = jax.value_and_grad(loss_of)(chosen)
    updates, state = optimizer.update(grads, state, chosen)
    return optax.apply_updates(chosen, updates), state, loss

  state, losses, start = jax.jit(optimizer.init)(chosen), [], chosen
  assert trees.nbytes(state) == 2 * trees.nbytes(chosen) + 4
  for _ in range(30):
    chosen, state, loss = step(chosen, state)
    losses.append(float(loss))
  assert losses[-1] < 0.5 * losses[0]
  moved = jax.tree.map(lambda x, y: not np.array_equal(x, y), chosen, start)
  assert all(jax.tree.leaves(moved))

  adapted = trees.merge(chosen, frozen)
  merged = jax.jit(lora.merge)(adapted)
  assert not any(isinstance(leaf, LoRA) for leaf in trees.items(merged).values())
  logits = [apply(module, params, TOKENS[:, :-1]) for params in (merged, adapted)]
  np.testing.assert_allclose(*logits, rtol=1e-3, atol=1e-4)
