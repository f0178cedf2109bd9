"""Named adapters: each use of one weight beside the same adapter alone, and beside peft."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effjax.attention import Attention
from effjax.core import linear, trees, weights
from effjax.decode import generate
from effjax.kernels.grouped_matmul import grouped_linear
from effjax.layers import MLP, LayerSpec, Rope, TransformerConfig
from effjax.models import Transformer
from effjax.parallel import Zero, make_mesh
from effjax.peft import LoRA, attach, detach, load, lora, named, save
from effjax.quant import Int8
from effjax.train import init_state, make_train_step, next_token
from tests.modules import apply, normal, random_params

LAYER = LayerSpec(Attention(4, kv_heads=2, rope=Rope(1e4)), MLP(24))
CONFIG = TransformerConfig(32, 16, (LAYER,) * 2, context=32)
MODULE = Transformer(CONFIG)
TOKENS = jnp.asarray(np.random.default_rng(2).integers(0, 32, (4, 6)), jnp.int32)
ROWS = ["fr", "de", None, "it"]
D, F = 8, 12


def moved(params, seed):
  """`params` with the factors of a trained adapter."""
  rng = np.random.default_rng(seed)
  draw = lambda path, x: jnp.asarray(rng.normal(size=x.shape) * 0.3, x.dtype)
  paths = trees.trained(params)
  change = lambda path, x: draw(path, x) if trees.path_string(path) in paths else x
  return jax.tree_util.tree_map_with_path(change, params)


@functools.cache
def base():
  return random_params(MODULE, TOKENS)


@functools.cache
def adapted():
  """Adapters of different ranks and scales over different matrices, one with lengths of its own."""
  add = lambda seed, **given: moved(lora.add(base(), jax.random.key(seed), **given), seed)
  return {
    "fr": add(1, rank=2, targets="mixer/query/kernel|embedding"),
    "de": add(2, rank=4, alpha=4, targets="mixer/query/kernel"),
    "it": add(3, rank=1, dora=True, targets="ffn/down/kernel"),
  }


@functools.cache
def together():
  return named.join(adapted())


@functools.cache
def alone():
  """Logits of each row by the model that has only its adapter."""
  return np.stack(
    [
      np.asarray(apply(MODULE, adapted().get(name, base()), TOKENS))[i]
      for i, name in enumerate(ROWS)
    ]
  )


def assert_close(got, expected, tolerance=1e-5):
  np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def test_an_adapter_for_each_row_is_what_each_computes_alone():
  found, none = (apply(MODULE, named.use(together(), w), TOKENS) for w in (ROWS, [None] * 4))
  assert_close(found, alone())
  assert np.ptp(alone(), axis=0).min() > 0
  chex.assert_trees_all_equal(none[2], found[2])
  assert_close(none, apply(MODULE, base(), TOKENS))


def test_they_generate_what_each_does_alone():
  run = lambda which: (
    generate(MODULE, named.use(together(), which), TOKENS[:, :4], max_new_tokens=5).tokens
  )
  found, by_name = run(ROWS), {name: run([name] * 4) for name in ROWS}
  for i, name in enumerate(ROWS):
    chex.assert_trees_all_equal(found[i], by_name[name][i])
  assert jax.tree.structure(named.use(together(), ROWS)) == jax.tree.structure(
    named.use(together(), ["it"] * 4)
  )


def test_one_choice_is_the_adapter_and_a_mixture_the_weighted_sum():
  take = lambda params: trees.items(params)["segments_0/layers_0/mixer/query/kernel"]
  wide = lambda w: np.asarray(w, np.float64)
  w0, fr, de = (wide(take(x)) for x in (base(), adapted()["fr"], adapted()["de"]))
  for which, expected in (
    ("fr", fr),
    (None, w0),
    ("it", w0),
    ({"fr": 0.7, "de": -0.4}, w0 + 0.7 * (fr - w0) - 0.4 * (de - w0)),
    (jnp.array([2.0, 1.0, 0.0]), w0 + 2 * (de - w0) + (fr - w0)),
  ):
    w = take(named.use(together(), which))
    np.testing.assert_allclose(w, expected, atol=1e-5)
    one, x = jax.tree.map(lambda x: x[1], w), normal(3, 2, 16)
    np.testing.assert_allclose(linear(x, one), wide(x) @ expected[1], atol=1e-4)
  mixture = named.use(together(), {"fr": 0.7, "it": -0.4})
  merged, back = jax.jit(lambda p: (lora.merge(p), lora.unmerge(lora.merge(p), p)))(mixture)
  chex.assert_trees_all_close(back, mixture, atol=1e-6)
  assert not any(isinstance(leaf, weights.Weight) for leaf in trees.items(merged).values())


def test_rows_are_split_over_a_mesh_and_recomputed():
  params, x = named.use(members("fr", "de"), ["fr", "de", None, "fr"]), normal(4, 3, D, seed=2)
  zero = Zero(make_mesh(data=2), 3)

  @jax.jit
  def split(params):
    placed = jax.lax.with_sharding_constraint(params, zero.params(params))
    return linear(x, zero.on_params(placed)["w"])

  whole = linear(x, params["w"])
  np.testing.assert_allclose(split(params), whole, atol=1e-5)
  chex.assert_trees_all_equal(whole[2], linear(x, params["w"].base)[2])
  total = lambda params: jnp.square(linear(x, params["w"])).sum()
  grad = lambda f: jax.jit(jax.grad(f, allow_int=True))(params)
  grads = [grad(f) for f in (total, jax.checkpoint(total))]
  of = lambda tree: jax.tree.leaves(tree["w"].members)
  chex.assert_trees_all_close(*map(of, grads), atol=1e-5)


def test_what_is_added_and_removed_leaves_no_trace():
  others = named.use(named.join({k: v for k, v in adapted().items() if k != "de"}), "fr")
  more = named.add(others, "de", detach(adapted()["de"])[1])
  assert named.names(more) == ("de", "fr", "it") and named.names(others) == ("fr", "it")
  chex.assert_trees_all_equal(named.remove(more, "de"), others)
  assert jax.tree.structure(named.remove(more, "de")) == jax.tree.structure(others)
  chex.assert_trees_all_equal(named.use(more, "it"), named.use(together(), "it"))
  bare = functools.reduce(named.remove, ROWS[:2] + ROWS[3:], together())
  chex.assert_trees_all_equal(bare, base())
  for name, tree in adapted().items():
    chex.assert_trees_all_equal(named.take(together(), name), tree)
  assert_close(
    apply(MODULE, named.remove(named.use(together(), ROWS), "de"), TOKENS)[0], alone()[0]
  )


def test_they_come_off_go_on_and_are_saved(tmp_path):
  params = named.use(together(), "it")
  plain, adapters = detach(params)
  chex.assert_trees_all_equal(plain, base())
  chex.assert_trees_all_equal(attach(plain, adapters), params)
  save(params, tmp_path)
  loaded = load(plain, tmp_path)
  chex.assert_trees_all_equal(loaded, params)
  assert jax.tree.structure(loaded) == jax.tree.structure(params)


def test_what_is_named_trains_alone():
  paths = trees.trained(together())
  assert {path.split("members/")[1].split("/")[0] for path in paths} == {"fr", "de", "it"}
  assert {path.rsplit("/", 1)[1] for path in paths} == {"a", "b", "magnitude"}
  params = named.use(together(), "fr")
  assert trees.trained(params) == {path for path in paths if "members/fr/" in path}
  chosen = trees.partition(params, lambda path, x: path in trees.trained(params))[0]
  plain = adapted()["fr"]
  assert trees.count(chosen) == trees.count(plain) - trees.count(base())
  optimizer = optax.adamw(0.1, weight_decay=0.5)
  batch = {"tokens": TOKENS, "targets": jnp.roll(TOKENS, -1, axis=1)}
  step = make_train_step(next_token(MODULE), optimizer)
  state = init_state(jax.tree.map(jnp.array, params), optimizer)
  after = step(state, batch, jax.random.key(0))[0].params
  for name in ("de", "it"):
    chex.assert_trees_all_equal(named.take(after, name), adapted()[name])
  apart = lambda x, y: np.abs(np.asarray(x) - np.asarray(y)).max()
  move = jax.tree.map(apart, *(named.take(tree, "fr") for tree in (after, params)))
  assert max(jax.tree.leaves(move)) > 0.01


def members(*names, nan=(), lead=()):
  """A `Named` over [*lead, D, F] with members of ranks 1, 2, …; those in `nan` hold no numbers."""
  w = normal(*lead, D, F, seed=9)
  tree = {}
  for i, name in enumerate(names):
    a, b = normal(*lead, D, i + 1, seed=i), normal(*lead, i + 1, F, seed=20 + i)
    a, b = (x * (np.nan if name in nan else 0.2) for x in (a, b))
    tree[name] = {"w": LoRA(None, a, b, jnp.full((*lead, 1, 1), i + 0.5))}
  return named.join(tree, {"w": w})


@pytest.mark.parametrize("which", ["fr", ["fr", "fr", None], ["de", "fr", None], {"fr": 0.5}])
def test_one_that_is_not_chosen_has_no_influence_whatever_it_holds(which):
  x, broken = normal(3, 2, D, seed=3), members("fr", "de", nan=["de"])
  sound = members("fr", "de")
  clean = [i for i in range(3) if isinstance(which, list) is False or which[i] != "de"]

  @jax.jit
  def value_and_grads(params, x):
    loss = lambda x, params: jnp.square(linear(x, named.use(params, which)["w"])[np.array(clean)])
    total = lambda x, params: loss(x, params).sum()
    grads = jax.grad(total, (0, 1), allow_int=True)(x, params)
    return linear(x, named.use(params, which)["w"])[np.array(clean)], grads

  found, (dx, grads) = value_and_grads(broken, x)
  expected, (dx_expected, expected_grads) = value_and_grads(sound, x)
  chex.assert_trees_all_equal(found, expected)
  clean = np.array(clean)
  chex.assert_trees_all_equal(dx[clean], dx_expected[clean])
  own = [tree["w"].members for tree in (grads, expected_grads)]
  chex.assert_trees_all_equal(own[0]["fr"], own[1]["fr"])
  if "de" not in which:
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(own[0]["de"]))


def test_weights_are_learned_from_any_start():
  params, x = members("fr", "de", "it"), normal(4, 3, D, seed=4)
  target = linear(x, named.use(params, {"fr": 0.7, "it": -0.2})["w"])

  @jax.jit
  def newton(mix):
    error = lambda mix: jnp.square(linear(x, named.use(params, mix)["w"]) - target).mean()
    return mix - jnp.linalg.solve(jax.hessian(error)(mix), jax.grad(error)(mix))

  np.testing.assert_allclose(newton(jnp.zeros(3)), [0.0, 0.7, -0.2], atol=1e-4)
  by_row = jax.jit(jax.grad(lambda mix: linear(x, named.use(params, mix)["w"]).sum()))(
    jnp.zeros((4, 3))
  )
  parts = [
    linear(x, named.take(params, n)["w"]) - linear(x, params["w"].base) for n in ("de", "fr", "it")
  ]
  np.testing.assert_allclose(by_row, np.stack([y.sum((1, 2)) for y in parts], -1), atol=1e-4)


def test_rows_of_mixtures():
  params, x, y = members("fr", "de"), normal(3, 2, D, seed=3), normal(3, 2, F, seed=5)
  ids = jnp.array([[1, 2], [7, 0], [3, 3]])

  @jax.jit
  def uses(params):
    w = named.use(params, [{"fr": 0.5, "de": 2.0}, None, "de"])["w"]
    products = linear(x, w), linear(x[:, 0], w), linear(x.astype(jnp.bfloat16), w)
    return *products, linear(y, weights.transpose(w)), w.take(ids)

  wide = lambda w: np.asarray(w, np.float64)
  fr, de = (wide(named.take(params, name)["w"]) for name in ("fr", "de"))
  w0 = wide(params["w"].base)
  expected = np.stack([w0 + 0.5 * (fr - w0) + 2 * (de - w0), w0, de])
  product, of_first, half, transposed, rows = uses(params)
  np.testing.assert_allclose(product, wide(x) @ expected, atol=1e-5)
  np.testing.assert_allclose(of_first, (wide(x) @ expected)[:, 0], atol=1e-5)
  np.testing.assert_allclose(transposed, wide(y) @ np.swapaxes(expected, 1, 2), atol=1e-5)
  looked_up = np.stack([w[i] for w, i in zip(expected, ids, strict=True)])
  np.testing.assert_allclose(rows, looked_up, atol=1e-5)
  assert half.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.asarray(half, np.float32), wide(x) @ expected, atol=0.2)


def test_a_batch_is_what_peft_makes_of_it():
  reason = "peer comparisons run on Python 3.11, which has torch and peft"
  torch, peft = pytest.importorskip("torch", reason=reason), pytest.importorskip("peft")
  w, x = normal(D, F, seed=9), normal(4, 2, D, seed=3)
  model = torch.nn.Sequential(torch.nn.Linear(D, F, bias=False))
  model[0].weight.data = torch.tensor(np.asarray(w).T)
  tree = {}
  for i, name in enumerate(["fr", "de", "it"]):
    config = peft.LoraConfig(r=i + 1, lora_alpha=3, target_modules=["0"])
    if i:
      model.add_adapter(name, config)
    else:
      model = peft.get_peft_model(model, config, adapter_name=name)
    one = lora.add({"w": w}, jax.random.key(0), rank=i + 1, alpha=3, targets="w")
    one = tree[name] = moved(one, i)
    layer, tensor = model.base_model.model[0], lambda x: torch.tensor(np.asarray(x).T)
    layer.lora_A[name].weight.data = tensor(one["w"].a)
    layer.lora_B[name].weight.data = tensor(one["w"].b)
  names = ["de", "__base__", "it", "fr"]
  with torch.no_grad():
    expected = model.eval()(torch.tensor(np.asarray(x)), adapter_names=names).numpy()
  rows = [None if name == "__base__" else name for name in names]
  np.testing.assert_allclose(linear(x, named.use(named.join(tree), rows)["w"]), expected, atol=1e-5)


@pytest.mark.parametrize("implementation", ["tiles", "ragged", "reference"])
def test_experts_take_one_choice_for_all_and_refuse_rows(implementation):
  params, x, sizes = members("fr", "de", lead=(3,)), normal(8, D, seed=3), jnp.array([2, 1, 4])
  run = jax.jit(lambda w, x: grouped_linear(x, w, sizes, implementation=implementation))
  mixed = named.use(params, {"fr": 0.5, "de": -1})["w"]
  np.testing.assert_allclose(run(mixed, x), run(mixed.materialize(), x), atol=1e-5)
  for batch in (8, 2):
    with pytest.raises(ValueError, match="rows in another order than the batch's"):
      run(named.use(params, ["fr"] * batch)["w"], x)


def test_rows_that_are_not_the_batch_are_refused():
  rows = named.use(members("fr", "de"), ["fr", "de", None])
  for x in (normal(2, 3, D), normal(D)):
    with pytest.raises(ValueError, match=r"x \(.*\) with an adapter for each of 3 rows; allowed"):
      linear(x, rows["w"])
  with pytest.raises(ValueError, match=r"indices \(2,\) with an adapter for each of 3 rows"):
    rows["w"].take(jnp.array([1, 2]))
  for use in (lora.merge, lambda rows: np.asarray(rows["w"])):
    with pytest.raises(ValueError, match="asked for one matrix"):
      use(rows)


def test_dropout_is_drawn_for_each_member():
  tree = lora.add({"w": normal(D, F)}, jax.random.key(0), rank=2, targets="w", dropout=0.5)
  one, two = moved(tree, 1), moved(tree, 2)
  params = named.use(named.join({"fr": one, "de": two}), {"fr": 1, "de": 1})
  drawn = trees.drawn(params, jax.random.key(3))["w"]
  keys = [jax.random.key_data(drawn.members[name].key) for name in ("fr", "de")]
  assert (keys[0] != keys[1]).any()
  x = jnp.ones((64, D))
  assert np.abs(linear(x, drawn) - linear(x, params["w"])).max() > 0.1
  grads = jax.grad(lambda x: linear(x, drawn).sum())(x)
  assert np.isfinite(grads).all()


@pytest.mark.parametrize(
  ("which", "message"),
  [
    ("es", "which: 'es'; allowed: de, fr, or None"),
    (["fr", "es"], "which: 'es'; allowed: de, fr"),
    ({"fr": float("nan")}, "which: fr nan; allowed: finite numbers"),
    ([], "which: no rows"),
    (np.ones(3), r"which: \(3,\); allowed: \[n\] or \[B, n\], n = 2"),
    (np.full(2, np.inf), "allowed: finite numbers"),
  ],
)
def test_choices_that_are_none_are_named(which, message):
  with pytest.raises(ValueError, match=message):
    named.use(members("fr", "de"), which)


def test_bad_arguments_are_named():
  params, tree = members("fr"), {"w": normal(D, F)}
  one = lora.add(tree, jax.random.key(0), rank=2, targets="w")
  other = dataclasses.replace(one["w"], base=one["w"].base + 1)
  int8 = lora.add({"w": Int8.quantize(tree["w"])}, jax.random.key(0), rank=2, targets="w")
  for call, message in (
    (lambda: named.join({}), "adapters: none"),
    (lambda: named.add(params, "fr", one), "name='fr' is there already"),
    (lambda: named.add(params, "a/b", one), "name='a/b'; allowed"),
    (lambda: named.add(params, "", one), "name=''; allowed"),
    (lambda: named.add(params, "de", tree), "adapters: 'de' has none"),
    (lambda: named.add(tree, "de", {"w": other}), "'w' is over another base"),
    (lambda: named.add(tree, "de", int8), "'w' is over another base"),
    (lambda: named.add({"v": tree["w"]}, "de", one), "params has nothing at 'w'"),
    (lambda: named.add({"w": normal(D, 3)}, "de", detach(one)[1]), r"'w' \(8, 3\): LoRA: b has"),
    (lambda: named.add(tree, "de", named.use(params, None)), "'de' has Named at w; allowed: LoRA"),
    (lambda: named.remove(params, "de"), "name='de'; allowed: fr"),
    (lambda: named.take(params, "de"), "name='de'; allowed: fr"),
    (lambda: named.names(tree), "params has no named adapter"),
    (lambda: named.use(tree, "fr"), "params has no named adapter"),
  ):
    with pytest.raises(ValueError, match=message):
      call()


def test_float64_stays_so():
  with jax.enable_x64(True):
    params = {"w": jnp.asarray(normal(D, F), jnp.float64) / 3}
    one = moved(lora.add(params, jax.random.key(0), rank=2, targets="w"), 1)
    w = named.use(named.join({"fr": one}), {"fr": 0.5})["w"]
    member = w.member("fr")
    delta = np.asarray(member.a, np.float64) @ np.asarray(member.b, np.float64)
    matrix = params["w"] + 0.5 * np.asarray(member.scale, np.float64) * delta
    np.testing.assert_allclose(w.materialize(), matrix, atol=1e-6)
    none = named.use({"w": w}, None)["w"]
    np.testing.assert_array_equal(none.materialize(), params["w"])
    np.testing.assert_allclose(w.beneath(w.materialize()), params["w"], rtol=1e-14)


def test_shapes_suffice():
  shapes = jax.eval_shape(lambda: named.use(together(), ROWS))
  assert trees.count(shapes) == trees.count(together())
  assert shapes["embed"]["embedding"].flops > 2 * 32 * 16
