"""BigBird: transformers' block-sparse attention with the same random blocks, and its randomness."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.attention import Attention, attend, masks
from effjax.attention.big_bird import BigBird
from effjax.layers import Context

D, BLOCK, BLOCKS = 16, 4, 16
T = BLOCK * BLOCKS


def test_the_mask_equals_transformers_block_sparse_attention():
  torch = pytest.importorskip("torch", reason="torch is installed with Python 3.11 only")
  from transformers import BigBirdConfig, BigBirdModel
  from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention

  sizes = {"hidden_size": D, "num_attention_heads": 2, "block_size": BLOCK, "num_random_blocks": 2}
  sizes["attention_probs_dropout_prob"] = 0.0
  module = BigBirdBlockSparseAttention(BigBirdConfig(max_position_embeddings=256, **sizes), seed=3)
  drawn = []
  plain = module._bigbird_block_rand_mask_with_head
  record = lambda *args, **kwargs: drawn.append(plain(*args, **kwargs)) or drawn[-1]
  module._bigbird_block_rand_mask_with_head = record
  x = np.random.default_rng(0).normal(size=(2, T, D)).astype(np.float32)
  padding = np.arange(T)[None] >= np.array([[T], [T - 5]])
  seen = torch.tensor(1.0 - padding).float()
  blocked, band, rows, columns = BigBirdModel.create_masks_for_block_sparse_attn(seen, BLOCK)
  module.train()  # in evaluation its random blocks are all the first
  with torch.no_grad():
    want = module(torch.tensor(x), band, rows, columns, blocked, blocked)[0].numpy()
    q, k, v = (
      jnp.asarray(layer(torch.tensor(x)).numpy()).reshape(2, T, 2, D // 2)
      for layer in (module.query, module.key, module.value)
    )
  table = np.full((1, 2, BLOCKS, 2), -1)
  table[0, :, 1:-1] = np.stack(drawn[0])
  ends = masks.Global((*range(BLOCK), *range(T - BLOCK, T)))
  mask = masks.BlockWindow(1, 1, BLOCK) | ends | masks.RandomBlocks(jnp.asarray(table), BLOCK)
  ids = jnp.where(jnp.asarray(padding), -1, 0)
  for implementation in ("reference", "xla"):
    run = functools.partial(attend, mask=mask, implementation=implementation)
    y = jax.jit(run)(q, k, v, segment_ids=ids)
    got = np.asarray(y).reshape(2, T, D)
    np.testing.assert_allclose(got[~padding], want.reshape(2, T, D)[~padding], atol=2e-6)


def test_blocks_are_drawn_afresh_only_with_randomness(key):
  x = jax.random.normal(key, (1, T, D))
  module = BigBird(2, mask=masks.Full(), block=BLOCK, number=1)
  params = jax.jit(module.init)(key, x)
  run = jax.jit(lambda rngs: module.apply(params, x, rngs=rngs)[0])
  fixed, again = run({}), run({})
  one, two = (np.asarray(run({"mask": jax.random.key(i)})) for i in (1, 2))
  np.testing.assert_array_equal(fixed, again)
  assert np.abs(one - two).max() > 1e-3 and np.abs(one - fixed).max() > 1e-3


def test_few_blocks_are_full_attention(key):
  x = jax.random.normal(key, (2, 11, D))
  module = BigBird(2, block=BLOCK, number=0)
  params = jax.jit(module.init)(key, x)
  context = Context(segment_ids=jnp.zeros((2, 11), int).at[0, 9:].set(-1))
  got, want = (jax.jit(m.apply)(params, x, context)[0] for m in (module, Attention(2)))
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_causal_and_what_it_sees_on_average(key):
  x = jax.random.normal(key, (1, T, D))
  module = BigBird(2, block=BLOCK, number=2)
  params = jax.jit(module.init)(key, x)
  sums = lambda x: module.apply(params, x)[0].sum(-1)[0]
  reach = np.abs(jax.jit(jax.jacrev(sums))(x)[:, 0].sum(-1)) > 0
  assert not np.triu(reach, 1).any()
  mask = masks.bigbird(jax.random.key(0), T, block=BLOCK, number=2, causal=True)
  scores = module.flops(D, T) - 8.0 * D**2
  seen = np.asarray(mask.dense(T))
  assert scores == pytest.approx(4 * D * seen.mean() * T)
  last = module.flops(D, T, 1) - 8.0 * D**2
  assert last == pytest.approx(4 * D * seen[..., -1, :].sum())


def test_what_cannot_be_is_named(key):
  with pytest.raises(ValueError, match=r"SlidingWindow.*allowed: Causal"):
    BigBird(2, mask=masks.SlidingWindow(1, 1)).init(key, jnp.ones((1, 4, D)))
  with pytest.raises(ValueError, match="a cache with mask=Full"):
    BigBird(2, mask=masks.Full()).init_cache(D, 1, 8)
