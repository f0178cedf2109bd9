"""Hash layers: each token to the experts of its table, whole and token by token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effjax import cost, decode
from effjax.attention import Attention
from effjax.core import trees
from effjax.layers import MLP, Context, LayerSpec, TransformerConfig
from effjax.models import Transformer
from effjax.moe import Hash, MoE, MultiHash, hash_routing, hash_tables
from effjax.train import init_state, make_train_step, next_token
from tests.modules import apply, normal, random_params

V, D, E = 19, 8, 4
BYS = {"token": V, "previous": V, "bigram": 101, "position": 7, "predicted": V, "next": V}
RNG = np.random.default_rng(0)
TOKENS = jnp.asarray(RNG.integers(0, V, (3, 10)), jnp.int32)
IDS = jnp.array([[0] * 10, [0] * 6 + [3] * 4, [-1, -1] + [1] * 8])


def ids_by_hand(by, entries):
  """What each token is looked up by, a token at a time."""
  found = np.zeros(TOKENS.shape, int)
  for row, column in np.ndindex(*TOKENS.shape):
    same = lambda other, r=row, c=column: 0 <= other < 10 and IDS[r, other] == IDS[r, c] >= 0
    before = TOKENS[row, column - 1] if same(column - 1) else -1
    after = TOKENS[row, column + 1] if same(column + 1) else -1
    pair = np.array([[TOKENS[row, column]]]), np.array([[before]])
    found[row, column] = {
      "token": TOKENS[row, column],
      "previous": before,
      "next": after,
      "position": column % entries,
      "predicted": (3 * TOKENS[row, column] + 1) % V,
      "bigram": hash_tables.bigram_ids(*map(jnp.asarray, pair), entries=entries).item(),
    }[by]
  return found


@pytest.mark.parametrize("by", BYS)
def test_a_router_reads_its_table(by):
  router = Hash(E, BYS[by], by=by, hashes=2)
  table = RNG.integers(0, E, (BYS[by], 2))
  context = Context(TOKENS, segment_ids=IDS, predicted=(3 * TOKENS + 1) % V)
  mask = IDS.reshape(-1) >= 0
  routing = router.apply(
    {"params": {"table": jnp.asarray(table)}}, jnp.zeros((30, D)), context, mask
  )
  wanted = table[ids_by_hand(by, BYS[by])].reshape(30, 2)  # −1 is the last entry in numpy too
  np.testing.assert_array_equal(np.asarray(routing.experts)[mask], wanted[mask])
  assert (routing.gates == 1).all() and routing.probs is None
  assert router.peeks == (by == "next") and router.used == 2


def test_the_load_of_a_table_is_sown_without_padding():
  table, mask = jnp.array([[0, 1], [2, 2], [0, 3]]), jnp.array([True, True, True, False])
  _, sown = Hash(5, 3, hashes=2).apply(
    {"params": {"table": table}},
    jnp.zeros((4, D)),
    Context(jnp.array([[0, 1, 1, 2]])),
    mask,
    mutable=["metrics", "statistics"],
  )
  wanted = hash_tables.statistics(table, [1.0, 2.0, 0.0], experts=5)
  np.testing.assert_allclose(sown["statistics"]["load"][0], wanted.load, rtol=1e-6)
  found = {name: float(value[0]) for name, value in sown["metrics"].items()}
  assert found.pop("load_entropy") == pytest.approx(wanted.entropy)
  assert found == {
    "max_load": pytest.approx(wanted.max_load),
    "dead_experts": 2,
    "dropped_share": 0,
  }


def test_tables_are_drawn_and_differ_between_scanned_layers():
  config = TransformerConfig(V, D, (LayerSpec(None, MoE(Hash(E, V), MLP(4))),) * 3)
  shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), TOKENS)["params"]
  (path,) = trees.select(shapes, "table$")
  params = jax.jit(Transformer(config).init)(jax.random.key(0), TOKENS)["params"]
  tables = np.asarray(trees.items(params)[path])
  assert tables.shape == (3, V, 1) and tables.dtype == np.int32
  assert tables.min() == 0 and tables.max() == E - 1 and (tables[0] != tables[1]).any()
  without = trees.partition(params, "table$")[1]
  assert cost.parameters(params) == cost.parameters(without) and path not in trees.trained(params)
  assert cost.active_parameters(config, params) == cost.parameters(without) - 3 * 3 * 2 * D * 4


def hashed(by, count=1, **options):
  layer = LayerSpec(Attention(2), MoE(Hash(E, BYS[by], by=by), MLP(6, "relu")))
  multi = LayerSpec(None, MultiHash(Hash(3, BYS[by], by=by, hashes=2), 6))
  return TransformerConfig(V, D, (layer, multi) * count, context=16, **options)


def params_of(config, seed=0):
  """Random parameters, and tables of random experts."""
  params = random_params(Transformer(config), TOKENS, seed=seed)
  rng = np.random.default_rng(seed)
  draw = lambda spec: rng.integers(
    0, spec.ffn.router.experts, (spec.ffn.router.entries, spec.ffn.router.hashes)
  )
  return hash_tables.put(config, params, list(map(draw, config.layers)))


def test_a_mixture_of_hashes_is_the_expert_of_each_token():
  config = hashed("token")
  params = params_of(config)["segments_0"]["layers_0"]["ffn"]
  x, context = normal(3, 10, D), Context(TOKENS, segment_ids=IDS)
  y = np.asarray(apply(config.layers[0].ffn, params, x, context))
  up, down = (np.asarray(params["experts"][name]["kernel"]) for name in ("up", "down"))
  expert = np.asarray(params["router"]["table"])[TOKENS, 0]
  hidden = np.maximum(np.einsum("btd,btdf->btf", x, up[expert]), 0)
  wanted = np.einsum("btf,btfd->btd", hidden, down[expert]) * (IDS >= 0)[..., None]
  np.testing.assert_allclose(y, wanted, atol=2e-5)


def test_multi_hash_concatenates_segments():
  module, x, context = MultiHash(Hash(3, V, hashes=2), 6), normal(3, 10, D), Context(TOKENS)
  params = random_params(module, x, context)
  table = params["router"]["table"] = np.random.default_rng(1).integers(0, 3, (V, 2))
  y = np.asarray(apply(module, params, x, context))
  up, down = (np.asarray(params[name]["kernel"]) for name in ("up", "down"))
  assert up.shape == (6, D, 3) and down.shape == (6, 6, D // 2)
  for row, column in [(0, 0), (1, 4), (2, 9)]:
    first, second = table[TOKENS[row, column]] + np.array([0, 3])
    token = np.asarray(x[row, column])
    v = np.maximum(np.concatenate([token @ up[first], token @ up[second]]), 0)
    wanted = np.concatenate([v @ down[first], v @ down[second]])
    np.testing.assert_allclose(y[row, column], wanted, atol=2e-5)
  mixture = MoE(Hash(3, V), MLP(6, "relu"))
  params = random_params(mixture, x, context)
  one = params["experts"] | {"router": params["router"]}
  same = apply(MultiHash(Hash(3, V), 6), one, x, context)
  np.testing.assert_allclose(apply(mixture, params, x, context), same, atol=2e-5)


@pytest.mark.parametrize("by", ["previous", "bigram", "position"])
def test_decoding_is_the_whole_forward(by):
  config = hashed(by)
  module, params = Transformer(config), params_of(hashed(by))
  prompts = [[3, 1, 4, 1, 5], [9], [2, 6]]
  out = decode.generate(module, params, prompts, max_new_tokens=5).tokens.tolist()
  texts = [prompt + new for prompt, new in zip(prompts, out, strict=True)]
  rows = np.zeros((3, 10), np.int32)
  for row, text in zip(rows, texts, strict=True):
    row[: len(text)] = text
  best = np.asarray(apply(module, params, rows)).argmax(-1)
  for row, prompt in enumerate(prompts):
    assert best[row, len(prompt) - 1 : len(texts[row]) - 1].tolist() == out[row]


def test_steps_with_a_cache_want_the_previous_token():
  config = hashed("bigram")
  module, params = Transformer(config), params_of(config)
  with pytest.raises(ValueError, match="previous=None with a cache; allowed: the id before each"):
    module.apply({"params": params}, TOKENS, cache=module.init_cache(3, 16))


def test_what_needs_the_future_is_refused_in_generation():
  generate = functools.partial(decode.generate, prompts=[[1, 2]], max_new_tokens=2)
  oracle, predicted = hashed("next"), hashed("predicted")
  with pytest.raises(ValueError, match="layer 0: ffn has Hash, which looks at later tokens"):
    generate(Transformer(oracle), params_of(oracle))
  with pytest.raises(ValueError, match="Hash: predicted=None"):
    generate(Transformer(predicted), params_of(predicted))


def test_predictions_are_a_fact_of_the_batch():
  config = hashed("predicted")
  module, params = Transformer(config), params_of(config)
  base = TransformerConfig(V, D, (), norm=config.norm)
  base_params = random_params(Transformer(base), TOKENS, seed=1)
  batch = {"tokens": TOKENS, "segment_ids": IDS, "targets": jnp.roll(TOKENS, -1, 1)}
  ids = hash_tables.predicted_ids(Transformer(base), base_params, batch)
  logits = np.asarray(apply(Transformer(base), base_params, TOKENS))
  np.testing.assert_array_equal(ids, np.where(IDS >= 0, logits.argmax(-1), -1))
  loss, _ = jax.jit(next_token(module))(params, batch | {"predicted": ids}, None)
  assert np.isfinite(loss)


def test_training_moves_everything_but_tables():
  config = hashed("token", 2)
  params = params_of(config)
  batch = {"tokens": TOKENS, "segment_ids": IDS, "targets": jnp.roll(TOKENS, -1, 1)}
  before = jax.tree.map(np.array, params)
  step = make_train_step(next_token(Transformer(config)), optax.adam(0.1))
  state, metrics = step(init_state(params, optax.adam(0.1)), batch, jax.random.key(0))
  assert metrics["finite"]
  moved = trees.items(jax.tree.map(lambda a, b: bool((a != b).any()), before, state.params))
  assert {path for path, change in moved.items() if not change} == set(
    trees.select(before, "table$")
  )


def test_tables_of_other_tokens_are_refused():
  with pytest.raises(ValueError, match="layer 1: ffn has Hash for 20 tokens; allowed: 19, the mod"):
    TransformerConfig(19, D, (LayerSpec(None, MLP(4)), LayerSpec(None, MoE(Hash(E, 20), MLP(4)))))
  TransformerConfig(19, D, (LayerSpec(None, MoE(Hash(E, 20, by="bigram"), MLP(4))),))
  params = params_of(hashed("token"))
  params["segments_0"]["layers_0"]["ffn"]["router"]["table"] = jnp.zeros((V + 1, 1), int)
  with pytest.raises(ValueError, match=r"router/table' has shape \(20, 1\); allowed: \(19, 1\)"):
    Transformer(hashed("token")).apply({"params": params}, TOKENS)


def test_ids_and_experts_out_of_range():
  table = np.array([0, 3, 1])
  for ids, options in (
    (np.array([0, 3]), {}),
    (np.array([-2]), {}),
    (np.array([0]), {"experts": 3}),
  ):
    with pytest.raises(ValueError, match=r"allowed: 0 to 2"):
      hash_routing(ids, table, **options)
    routing = jax.jit(functools.partial(hash_routing, **options))(ids, table)
    wrong = np.isnan(routing.gates)[:, 0]
    assert wrong[-1] == (not options) and (np.asarray(routing.experts) >= 0).all()
  routing = jax.jit(functools.partial(hash_routing, experts=3))(np.array([0, 1, -1]), table)
  assert np.isnan(routing.gates)[:, 0].tolist() == [False, True, False]
  assert routing.experts[:, 0].tolist() == [0, 0, 1]
  with pytest.raises(ValueError, match=r"table \(3, 1, 1\); allowed: \[V\] or \[V, N\]"):
    hash_routing(table, np.zeros((3, 1, 1), int))


@pytest.mark.parametrize(
  ("module", "message"),
  [
    (Hash(E, V, by="word"), "Hash: by='word'; allowed: token, previous, bigram, position"),
    (Hash(0, V), "Hash: experts=0; allowed: from 1, an integer"),
    (Hash(E, V, hashes=0), "Hash: hashes=0"),
    (MultiHash(Hash(E, V, hashes=3), 9), "MultiHash: x: width 8; allowed: multiples of 3"),
    (MultiHash(Hash(E, V, hashes=2), 9), "MultiHash: width 9; allowed: multiples of 2"),
  ],
)
def test_what_is_wrong_is_named(module, message):
  x = jnp.zeros((3, 10, D)) if isinstance(module, MultiHash) else jnp.zeros((30, D))
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(module.init, jax.random.key(0), x, Context(TOKENS))
