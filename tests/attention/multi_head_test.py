"""The attention module against torch, and its variants against one another."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.attention import Attention, masks
from effjax.layers import Context, Rope


@pytest.fixture
def x():
  return jax.random.normal(jax.random.key(2), (2, 7, 16))


def test_equals_torch_multi_head_attention(x, key):
  torch = pytest.importorskip("torch", reason="torch is installed with Python 3.11 only")
  module = Attention(4, mask=masks.Full(), use_bias=True, out_bias=True)
  shapes = jax.eval_shape(module.init, key, x)["params"]
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda p: jax.device_put((rng.normal(size=p.shape) / 4).astype(p.dtype)), shapes
  )
  peer = torch.nn.MultiheadAttention(16, 4, batch_first=True)
  tensor = lambda a: torch.tensor(np.array(a))
  names = ("query", "key", "value")
  with torch.no_grad():
    peer.in_proj_weight[:] = torch.cat([tensor(params[n]["kernel"].T) for n in names])
    peer.in_proj_bias[:] = torch.cat([tensor(params[n]["bias"]) for n in names])
    peer.out_proj.weight[:] = tensor(params["out"]["kernel"].T)
    peer.out_proj.bias[:] = tensor(params["out"]["bias"])
    wanted, _ = peer(*[tensor(x)] * 3, need_weights=False)
  ours, _ = jax.jit(module.apply)({"params": params}, x)
  np.testing.assert_allclose(ours, wanted.numpy(), atol=1e-5)


def test_repeated_key_value_heads_equal_multi_head(x, key):
  grouped = Attention(4, 2, head_width=4)
  params = jax.jit(grouped.init)(key, x)["params"]
  repeat = lambda w: jnp.repeat(w.reshape(16, 2, 4), 2, axis=1).reshape(16, 16)
  full = dict(params)
  for name in ("key", "value"):
    full[name] = {"kernel": repeat(params[name]["kernel"])}
  value = lambda module, params: jax.jit(module.apply)({"params": params}, x)[0]
  np.testing.assert_allclose(
    value(grouped, params), value(Attention(4, head_width=4), full), atol=1e-6
  )


def test_cross_attention_reads_unpadded_memory_only(x, key):
  module = Attention(4, cross=True)
  memory = jax.random.normal(key, (2, 5, 16))
  ids = jnp.array([[0, 0, 0, -1, -1]] * 2)
  params = jax.jit(module.init)(key, x, Context(memory=memory))
  apply = jax.jit(module.apply)
  padded, _ = apply(params, x, Context(memory=memory, memory_segment_ids=ids))
  short, _ = apply(params, x, Context(memory=memory[:, :3]))
  np.testing.assert_allclose(padded, short, atol=1e-6)

  run = jax.jit(lambda params, x, memory: _cross_vjp(module, params, x, memory, ids))
  clean = run(params, x, memory)
  spoilt = run(params, x, memory.at[:, 3].set(jnp.nan).at[:, 4].set(-jnp.inf))
  chex.assert_trees_all_equal(spoilt, clean)
  assert not clean[-1][:, 3:].any()


def _cross_vjp(module, params, x, memory, ids):
  """y, and the gradients of parameters, x and memory."""
  context = lambda memory: Context(memory=memory, memory_segment_ids=ids)
  y, pull = jax.vjp(
    lambda params, x, memory: module.apply(params, x, context(memory))[0], params, x, memory
  )
  return y, *pull(y)


def test_flops_count_projections_and_visible_keys():
  causal = Attention(4, 2, head_width=8)
  projections = 2 * 16 * 8 * (4 + 2 + 2 + 4)
  assert causal.flops(16, 9) == projections + 2 * 2 * 4 * 8 * (9 + 1) / 2
  assert causal.flops(16, 9, 1) == projections + 2 * 2 * 4 * 8 * 9
  assert causal.flops(16, 9, 3) == projections + 2 * 2 * 4 * 8 * (7 + 8 + 9) / 3
  assert Attention(4, 2, head_width=8, cross=True).flops(16, 9, 1) == causal.flops(16, 9, 1)


@pytest.mark.parametrize("length", [3, 6, 50])
def test_decoding_through_a_window_pays_for_its_keys(length):
  window = Attention(4, mask=masks.Causal() & masks.SlidingWindow(5, 0))
  assert window.flops(16, length, 1) == 2 * 4 * 16**2 + 4 * 16 * min(5 + 1, length)


@pytest.mark.parametrize(
  ("module", "message"),
  [
    (Attention(3), "heads=3 does not divide width 16"),
    (Attention(4, 3), "kv_heads=3; allowed: divisors of heads=4"),
    (Attention(4, cross=True), "cross=True needs context.memory"),
  ],
)
def test_impossible_modules_are_refused(module, message, x, key):
  with pytest.raises(ValueError, match=message):
    module.init(key, x)


def test_a_cache_holds_no_token_that_is_not_there(x, key):
  module = Attention(4)
  params = jax.jit(module.init)(key, x)
  apply = jax.jit(module.apply)
  ids = jnp.array([[5, 5, 2, -1, -1, -1, -1], [-1, -1, 0, 0, 0, 0, 0]])
  positions = jnp.array([[0, 1, 2, 0, 0, 0, 0], [0, 0, 0, 1, 2, 3, 4]])
  spoilt = jnp.where((ids < 0)[..., None], jnp.nan, x)
  context = Context(segment_ids=ids, positions=positions)
  y, cache = apply(params, spoilt, context, module.init_cache(16, 2, 8))
  assert not cache.key[0, 3:].any()
  assert not cache.value[1, 5:].any()
  for row, there in ((0, slice(3)), (1, slice(2, 7))):
    alone, _ = apply(params, x[row : row + 1, there])
    np.testing.assert_allclose(y[row, there], alone[0], atol=1e-6)


def test_memory_has_no_positions_to_rotate_by():
  x = jnp.ones((1, 3, 8))
  module = Attention(2, cross=True, rope=Rope())
  with pytest.raises(ValueError, match="cross=True with rope"):
    module.init(jax.random.key(0), x, Context(memory=x))
