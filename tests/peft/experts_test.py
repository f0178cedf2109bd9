"""LoRA experts over one feed-forward layer, against numpy and against plain LoRA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from chex import assert_trees_all_close, assert_trees_all_equal

from effjax import peft
from effjax.core import trees
from effjax.kernels.grouped_matmul import grouped_linear
from effjax.layers import MLP, LayerSpec, TransformerConfig
from effjax.models import Model, Transformer
from effjax.moe import MoE, TopK
from effjax.parallel import Zero, make_mesh
from effjax.peft import LoRA, experts, lora
from effjax.peft.experts import Shared
from effjax.quant import NF4, quantize
from effjax.train import init_state, make_train_step, next_token
from tests.modules import apply, normal
from tests.peft.adapters_test import CONFIG, TOKENS, drawn

KEY = jax.random.key(0)
MIXTURE = functools.partial(MoE, TopK(4, 2))
ONE = TransformerConfig(24, 8, (LayerSpec(None, MLP(12, "relu", use_bias=True)),), context=8)
E, D, F = 3, 8, 4


def moved(params):
  """`params` with factors B that are not zero."""
  move = lambda path, w: LoRA(w.base, w.a, jnp.asarray(normal(*w.b.shape) / 4), w.scale)
  return trees.update(params, lambda path, w: isinstance(w, LoRA), move)


def bank(base, *lead):
  shape = lambda *last: normal(*lead, E, *last)
  return LoRA(Shared(base, E), shape(D, 2), shape(2, F), jnp.full((*lead, E, 1, 1), 0.5))


@pytest.mark.parametrize(
  ("implementation", "quantised"),
  [("tiles", False), ("tiles", True), ("ragged", False), ("reference", True)],
)
def test_the_grouped_product_is_that_of_copies(implementation, quantised):
  base, x, sizes = normal(D, F), normal(7, D, seed=1), jnp.array([2, 0, 4])
  w = bank(NF4.quantize(base, block=4) if quantised else base)
  bias = Shared(normal(F, seed=2), E, 1)
  value = lambda w, x: grouped_linear(
    x, w, sizes, bias.materialize(), implementation=implementation
  )
  copies = LoRA(w.base.materialize(), w.a, w.b, w.scale)
  assert copies.base.shape == w.shape == (E, D, F) and bias.shape == (E, F)
  assert_trees_all_close(value(w, x), value(copies, x), atol=1e-5)
  assert not np.asarray(value(w, x.at[6].set(jnp.nan)))[6].any()
  if quantised:
    return
  loss = lambda w, x: jnp.square(value(w, x)).sum()
  (dw, dx), (dcopies, dx_copies) = (jax.grad(loss, (0, 1))(each, x) for each in (w, copies))
  assert_trees_all_close(dx, dx_copies, atol=1e-4)
  assert_trees_all_close((dw.a, dw.b), (dcopies.a, dcopies.b), atol=1e-4)
  assert_trees_all_close(dw.base.base, dcopies.base.sum(0), atol=1e-4)


def test_it_is_one_array_whatever_stands_before_and_after():
  w = bank(normal(2, D, F), 2)
  assert w.shape == (2, E, D, F) and w.base.by_parts and w.by_parts
  assert w.parameters == 2 * D * F + 2 * E * 2 * (D + F) and w.base.base.shape == (2, D, F)
  one = jax.tree.map(lambda x: x[1], w)
  assert one.shape == (E, D, F)
  assert_trees_all_equal(np.asarray(w.materialize())[1], np.asarray(one.materialize()))
  turned = np.asarray(one.T.materialize())
  np.testing.assert_allclose(turned, np.swapaxes(one.materialize(), 1, 2), rtol=1e-5)
  specs = w.specs(("layers", "experts", "in", "out"))
  assert tuple(specs.base.base) == ("layers", "in", "out")
  assert tuple(specs.a) == ("layers", "experts", "in", None)
  with pytest.raises(ValueError, match="count=0"):
    Shared(normal(D, F), 0)


def test_at_the_start_it_is_the_mlp_and_comes_off_bit_identically(tmp_path):
  base = quantize(drawn())
  config, params = experts.add(CONFIG, base, KEY, MIXTURE, rank=2)
  grown = 3 * (8 * 4 + 4 * 3 * 2 * (8 + 12))
  assert trees.count(params) == trees.count(base) + grown
  assert trees.nbytes(params) == trees.nbytes(base) + 4 * (grown + 3 * 3 * 4)
  before = apply(Transformer(CONFIG), base, TOKENS)
  assert_trees_all_close(apply(Transformer(config), params, TOKENS), before, atol=1e-5)
  plain, removed = experts.remove(config, moved(params))
  assert plain == CONFIG and jax.tree.structure(removed) == jax.tree.structure(base)
  assert_trees_all_equal(removed, base)
  peft.save(moved(params), tmp_path)
  assert_trees_all_equal(peft.load(peft.detach(params)[0], tmp_path), moved(params))


def test_a_model_of_that_configuration_takes_them_from_a_folder(tmp_path):
  base = drawn(ONE)
  config, params = experts.add(ONE, base, KEY, MIXTURE, rank=2)
  model = Model(config, Transformer(config), moved(params))
  peft.save(model, tmp_path)
  bare = Model(config, model.module, peft.detach(params)[0])
  assert_trees_all_equal(peft.load(bare, tmp_path).params, model.params)
  with pytest.raises(ValueError, match=r"model.config has no place for, or lacks, .*ffn/experts"):
    peft.load(Model(ONE, Transformer(ONE), base), tmp_path)


@pytest.mark.parametrize("options", [{"dora": True}, {"dropout": 0.5}], ids=["dora", "dropout"])
def test_the_experts_may_be_of_any_kind_of_lora(options):
  base, x = drawn(ONE), normal(2, 6, 8, seed=5)
  changed, params = experts.add(ONE, base, KEY, MIXTURE, rank=2, **options)
  ffn = params["segments_0"]["layers_0"]["ffn"]
  plain = apply(ONE.layers[0].ffn, base["segments_0"]["layers_0"]["ffn"], x)
  at_start = apply(changed.layers[0].ffn, trees.drawn(ffn, KEY), x)
  np.testing.assert_allclose(at_start, plain, atol=1e-5)
  assert_trees_all_equal(experts.remove(changed, params)[1], base)


def test_each_expert_is_the_mlp_with_its_own_lora():
  base = drawn(ONE)
  changed, params = experts.add(ONE, base, KEY, MIXTURE, rank=2)
  ffn = moved(params)["segments_0"]["layers_0"]["ffn"]
  x = normal(2, 6, 8, seed=5)
  p = jax.nn.softmax(x @ ffn["router"]["kernel"].value)
  gates, chosen = jax.lax.top_k(p, 2)
  gates = np.asarray(gates / gates.sum(-1, keepdims=True))

  def expert(e):
    pick = lambda w: (
      LoRA(w.base.base, w.a[e], w.b[e], w.scale[e]) if isinstance(w, LoRA) else w.base
    )
    tree = jax.tree.map(pick, ffn["experts"], is_leaf=trees.is_weight)
    return np.asarray(apply(ONE.layers[0].ffn, tree, x))

  each = np.stack([expert(e) for e in range(4)], axis=2)
  expected = np.einsum("btkd,btk->btd", np.take_along_axis(each, chosen[..., None], 2), gates)
  np.testing.assert_allclose(apply(changed.layers[0].ffn, ffn, x), expected, atol=1e-5)


def test_factors_and_router_train_alone_under_remat_and_zero_3():
  base = drawn()
  config, params = experts.add(CONFIG, base, KEY, MIXTURE, rank=8, alpha=4)
  assert {path.rsplit("/", 1)[-1] for path in trees.trained(params)} == {"a", "b", "value"}
  objective, optimizer = next_token(Transformer(config, remat=True)), optax.sgd(0.1)
  batch = {"tokens": np.tile(TOKENS, (2, 1)), "targets": np.tile(np.roll(TOKENS, -1, 1), (2, 1))}
  params, zero = moved(params), Zero(make_mesh(data=4), 3)
  state = init_state(jax.tree.map(jnp.array, params), optimizer)
  state = jax.device_put(state, zero.state(state))
  state, metrics = make_train_step(objective, optimizer, placement=zero)(state, batch, KEY)
  np.testing.assert_allclose(metrics["loss"], jax.jit(objective)(params, batch, None)[0], rtol=1e-5)
  assert {"load_balance", "router_z", "max_load"} <= set(metrics)
  chosen = [trees.partition(p, peft.trainable(p))[0] for p in (state.params, params)]
  assert not any(jax.tree.leaves(jax.tree.map(np.array_equal, *chosen)))
  assert_trees_all_equal(experts.remove(config, state.params)[1], base)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"layers": [5]}, "layers 5; allowed: -3 … 2"),
    ({"targets": "bias"}, "matches no parameter|selects no matrix"),
    ({"rank": 9}, "rank 9 .* allowed: 1 … 8"),
    ({"start": "pissa"}, "experts/down/kernel: PiSSA over Shared"),
    ({"mixture": lambda mlp: mlp}, "mixture gives MLP; allowed: a layer with a router"),
    ({"mixture": lambda mlp: MIXTURE(MLP(3))}, "mixture gives MoE; allowed"),
    ({"mixture": lambda mlp: MIXTURE(mlp, MLP(3))}, "mixture has shared/.* besides"),
  ],
)
def test_bad_arguments_are_named(arguments, message):
  arguments = {"mixture": MIXTURE, "rank": 2} | arguments
  with pytest.raises(ValueError, match=message):
    experts.add(CONFIG, drawn(), KEY, **arguments)


def test_what_is_there_already_or_not_is_refused():
  base = drawn()
  config, params = experts.add(CONFIG, base, KEY, MIXTURE, rank=2, layers=[1])
  with pytest.raises(ValueError, match="ffn of layer 1 is MoE; allowed: MLP"):
    experts.add(config, params, KEY, MIXTURE, layers=[1])
  with pytest.raises(ValueError, match="params has none over one MLP"):
    experts.remove(CONFIG, base)
  adapted = lora.add(base, KEY, rank=2, targets="up/kernel")
  with pytest.raises(ValueError, match="ffn/up/kernel of layer 0 is a LoRA; merge"):
    experts.add(CONFIG, adapted, KEY, MIXTURE)
