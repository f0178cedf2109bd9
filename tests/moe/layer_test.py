"""The MoE layer against a loop in float64, against an MLP, and against transformers' Mixtral."""

import types

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from effjax.core import trees
from effjax.layers import MLP, Context, Embed, LayerNorm, Linear, Routing, capture
from effjax.layers.reductions import sum_of_squares
from effjax.moe import MoE, TopK, top_k_routing
from effjax.peft import lora
from effjax.quant.int8 import Int8
from tests.modules import apply, normal, random_params

E, K, D, F = 5, 2, 6, 8
SWIGLU = MLP(F, "silu", gated=True)
LAYER = MoE(TopK(E, K), SWIGLU)


@pytest.fixture
def x():
  return normal(2, 9, D)


def definition(layer, params, x):
  """Token by token, in float64."""
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), dict(params))
  act = {"silu": lambda a: a / (1 + np.exp(-a)), "relu": lambda a: np.maximum(a, 0)}
  rows = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
  out = np.zeros_like(rows)
  linear = lambda p, row: row @ p["kernel"] + p.get("bias", 0.0)

  def mlp(module, p, row):
    hidden = act[module.activation](linear(p["gate" if module.gated else "up"], row))
    return linear(p["down"], hidden * linear(p["up"], row) if module.gated else hidden)

  for t, row in enumerate(rows):
    logits = row @ p["router"]["kernel"]
    probs = np.exp(logits - logits.max())
    probs /= probs.sum()
    chosen = np.argsort(-probs)[: layer.router.top_k]
    scale = probs[chosen].sum() if layer.router.renormalize else 1.0
    for e in chosen:
      expert = jax.tree.map(lambda a, e=e: a[e], p["experts"])
      out[t] += probs[e] / scale * mlp(layer.expert, expert, row)
    if layer.shared is not None:
      out[t] += mlp(layer.shared, p["shared"], row)
  return out.reshape(x.shape)


@pytest.mark.parametrize(("top_k", "form"), [(1, "gated"), (2, "plain"), (E, "gated")])
def test_equals_float64(x, top_k, form):
  layer = MoE(TopK(E, top_k, renormalize=False), SWIGLU)
  if form == "plain":
    layer = MoE(TopK(E, top_k), MLP(F, "relu", use_bias=True), shared=MLP(F, "silu", use_bias=True))
  params = random_params(layer, x)
  chex.assert_trees_all_close(apply(layer, params, x), definition(layer, params, x), atol=1e-5)


def test_jit_equals_eager(x):
  params = random_params(LAYER, x)
  eager = LAYER.apply({"params": params}, x)
  chex.assert_trees_all_close(apply(LAYER, params, x), eager, atol=1e-6)


@pytest.mark.parametrize("gated", [False, True])
def test_one_expert_is_an_mlp(x, gated):
  mlp = MLP(F, "gelu", gated, use_bias=True)
  layer = MoE(TopK(1, 1), mlp)
  dense = random_params(mlp, x)
  experts = jax.tree.map(lambda p: p[None], dense)
  params = {"experts": experts, "router": {"kernel": jnp.ones((D, 1))}}
  chex.assert_trees_all_close(apply(layer, params, x), apply(mlp, dense, x), atol=1e-6)


def test_gradients_equal_finite_differences(x):
  params = random_params(LAYER, x)
  loss = lambda params, x: jnp.sin(apply(LAYER, params, x)).sum()
  grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)
  exact = lambda params, x: np.sin(definition(LAYER, params, x)).sum()
  direction = jax.tree.map(
    lambda a: np.random.default_rng(a.size).normal(size=a.shape), (params, x)
  )
  step = lambda h: exact(
    *jax.tree.map(lambda a, d: np.asarray(a, np.float64) + h * d, (params, x), direction)
  )
  slope = (step(1e-5) - step(-1e-5)) / 2e-5
  ours = sum(
    jax.tree.leaves(jax.tree.map(lambda g, d: (np.asarray(g) * d).sum(), grads, direction))
  )
  assert float(ours) == pytest.approx(slope, rel=1e-3)


def test_expert_without_tokens_gets_exactly_zero_gradient(x):
  params = random_params(LAYER, x)
  x = jnp.asarray(np.where(np.arange(D) == 0, 10.0, x), jnp.float32)
  router = np.array(params["router"]["kernel"])
  router[0, 3] = -50.0
  params["router"]["kernel"] = jnp.asarray(router)
  grads = jax.jit(jax.grad(lambda params: (apply(LAYER, params, x) ** 2).sum()))(params)
  for name in ("up", "gate", "down"):
    grad = np.asarray(grads["experts"][name]["kernel"])
    assert not grad[3].any()
    assert grad.any()


def test_order_of_tokens_and_of_experts_does_not_matter(x):
  params = random_params(LAYER, x)
  y = apply(LAYER, params, x)
  rng = np.random.default_rng(0)
  tokens, experts = rng.permutation(9), rng.permutation(E)
  params, x, y = jax.tree.map(np.asarray, (params, x, y))
  chex.assert_trees_all_close(apply(LAYER, params, x[:, tokens]), y[:, tokens], atol=1e-6)
  shuffled = {"experts": jax.tree.map(lambda p: p[experts], params["experts"])}
  shuffled["router"] = {"kernel": params["router"]["kernel"][:, experts]}
  chex.assert_trees_all_close(apply(LAYER, shuffled, x), y, atol=1e-6)


def test_padding_gives_zero_and_counts_nowhere(x):
  layer = MoE(TopK(E, K), MLP(F, use_bias=True), shared=MLP(2 * F, use_bias=True))
  params = random_params(layer, x)
  ids = jnp.array([[0] * 6 + [-1] * 3, [0] * 4 + [1] * 5])
  context, kinds = Context(segment_ids=ids), ["losses", "metrics"]
  run = jax.jit(lambda x: layer.apply({"params": params}, x, context, mutable=kinds))
  y, sown = run(x)
  other, other_sown = run(np.where(ids[..., None] < 0, np.float32(7), x))
  y = np.asarray(y)
  assert not y[0, 6:].any()
  chex.assert_trees_all_close((y, sown), (other, other_sown), atol=1e-6)
  chex.assert_trees_all_close(y[1], np.asarray(apply(layer, params, x))[1], atol=1e-6)


def test_sown_losses_carry_their_coefficients(x):
  layer = LAYER.copy(router=TopK(E, K, load_balance=0.5, z=0.0))
  run = jax.jit(lambda params, x: layer.apply({"params": params}, x, mutable=["losses", "metrics"]))
  _, sown = run(random_params(layer, x), x)
  losses, metrics = sown["losses"]["router"], sown["metrics"]["router"]
  assert set(losses) == {"load_balance"}
  raw = metrics["load_balance_raw"][0]
  assert float(losses["load_balance"][0]) == pytest.approx(0.5 * float(raw))
  assert 1 <= float(metrics["max_load"][0]) <= E / K


def test_shared_experts_are_an_mlp_beside(x):
  layer = LAYER.copy(shared=MLP(2 * F, "silu", gated=True))
  params = random_params(layer, x)
  shared = apply(layer.shared, params["shared"], x)
  routed = apply(LAYER, {n: p for n, p in params.items() if n != "shared"}, x)
  chex.assert_trees_all_close(
    apply(layer, params, x), np.asarray(routed) + np.asarray(shared), atol=1e-6
  )


def test_bfloat16_follows_float32(x):
  params = random_params(LAYER, x)
  y = apply(LAYER, params, x.astype(jnp.bfloat16))
  assert y.dtype == jnp.bfloat16
  expected = apply(LAYER, params, x.astype(jnp.bfloat16).astype(jnp.float32))
  chex.assert_trees_all_close(y.astype(jnp.float32), expected, atol=0.05)


def test_kernels_may_be_weights(key, x):
  params = random_params(LAYER, x)
  up = Int8.quantize(params["experts"]["up"]["kernel"])
  with_up = lambda up: {**params, "experts": {**params["experts"], "up": {"kernel": up}}}
  quantized, plain = with_up(up), with_up(up.materialize())
  expected = apply(LAYER, plain, x)
  chex.assert_trees_all_close(apply(LAYER, quantized, x), expected, atol=1e-5)
  adapted = lora.add(quantized, key, rank=2, targets="(up|down)/kernel$")
  chex.assert_trees_all_close(apply(LAYER, adapted, x), expected, atol=1e-5)
  loss = lambda params: (apply(LAYER, params, x) ** 2).sum()
  grads = jax.jit(jax.grad(loss, allow_int=True))(adapted)
  assert np.asarray(grads["experts"]["up"]["kernel"].b).any()
  assert np.asarray(grads["experts"]["down"]["kernel"].b).any()


def test_on_a_mesh(x):
  params = random_params(LAYER, x)
  x = np.tile(x, (4, 1, 1))
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  place = lambda a, *spec: jax.device_put(a, jax.NamedSharding(mesh, PartitionSpec(*spec)))
  step = jax.jit(jax.value_and_grad(lambda params, x: (apply(LAYER, params, x) ** 2).mean()))
  expected = step(params, x)
  spread = trees.update(params, "up/kernel", lambda _, w: place(w, None, None, "data"))
  chex.assert_trees_all_close(step(spread, place(x, "data")), expected, rtol=1e-4, atol=1e-6)


def test_costs(x):
  layer = LAYER.copy(shared=SWIGLU)
  params = random_params(layer, x)
  assert layer.flops(D, 9) == 2 * D * E + (K + 1) * 6 * D * F
  leaves = trees.items(params).items()
  active = sum(x.size * layer.share(path) for path, x in leaves)
  assert active == D * E + (K + 1) * 3 * D * F


def test_more_choices_than_experts(x):
  with pytest.raises(ValueError, match="top_k=3, experts=2; allowed: 1 ≤ top_k ≤ experts"):
    MoE(TopK(2, 3), MLP(4)).init(jax.random.key(0), x)


def test_equals_mixtral_of_transformers(x):
  torch = pytest.importorskip(
    "torch", reason="compares with transformers, which needs torch (3.11)"
  )
  from transformers import MixtralConfig
  from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

  config = MixtralConfig(
    hidden_size=D, intermediate_size=F, num_local_experts=E, num_experts_per_tok=K
  )
  block = MixtralSparseMoeBlock(config).eval()
  torch.manual_seed(0)
  with torch.no_grad():
    for parameter in block.parameters():
      parameter.normal_(std=0.4)
    theirs = block(torch.tensor(np.asarray(x)))
  theirs = theirs[0] if isinstance(theirs, tuple) else theirs
  state = {name: value.detach().numpy() for name, value in block.named_parameters()}
  gate_up, down = state["experts.gate_up_proj"], state["experts.down_proj"]  # [E, 2F, D], [E, D, F]
  experts = {"gate": gate_up[:, :F], "up": gate_up[:, F:], "down": down}
  params = {
    "router": {"kernel": jnp.asarray(state["gate.weight"].T)},
    "experts": {n: {"kernel": jnp.asarray(w.swapaxes(1, 2))} for n, w in experts.items()},
  }
  chex.assert_trees_all_close(apply(LAYER, params, x), theirs.numpy(), atol=1e-5)


class Normed(nn.Module):
  """An expert with a norm inside, random and sowing."""

  @nn.compact
  def __call__(self, x, context):
    y = Linear(F, use_bias=True, name="up")(LayerNorm(name="norm")(x))
    self.sow("metrics", "mean_square", jnp.square(y).mean())
    if self.has_rng("dropout"):
      y = y * jax.random.bernoulli(self.make_rng("dropout"), 0.5, y.shape)
    return Linear(x.shape[-1], name="down")(y)


class Factors(nn.Module):
  """Two matrices of rank 2: with a router, a bank of LoRA factors."""

  @nn.compact
  def __call__(self, x, context):
    return Linear(x.shape[-1], name="b")(Linear(2, name="a")(x))


@pytest.mark.parametrize("expert", [Normed(), Factors()])
def test_an_expert_is_any_module_for_single_tokens(x, expert):
  layer = MoE(TopK(E, K), expert)
  params = random_params(layer, x)
  y, sown = jax.jit(lambda p, x: layer.apply({"params": p}, x, mutable=["metrics"]))(params, x)

  @jax.jit
  def expected(params, rows):
    routing = top_k_routing(rows @ params["router"]["kernel"], k=K)
    one = lambda p: expert.apply({"params": p}, rows[None], Context())[0]
    outputs = jax.vmap(one)(params["experts"])[routing.experts, jnp.arange(len(rows))[:, None]]
    return (outputs * routing.gates[..., None]).sum(1)

  chex.assert_trees_all_close(y, expected(params, x.reshape(-1, D)).reshape(x.shape), atol=1e-5)
  found = set(sown["metrics"].get("experts", ()))
  assert found == ({"mean_square"} if isinstance(expert, Normed) else set())


def test_experts_draw_at_random_and_are_drawn_one_by_one(x):
  layer = MoE(TopK(E, K), Normed())
  params = jax.jit(layer.init)(jax.random.key(3), x)["params"]
  kernels = np.asarray(params["experts"]["up"]["kernel"])
  assert kernels.std() == pytest.approx(D**-0.5, rel=0.2)
  assert np.abs(kernels[:, None] - kernels[None]).sum((2, 3))[~np.eye(E, dtype=bool)].min() > 0
  run = jax.jit(lambda key: layer.apply({"params": params}, x, rngs={"dropout": key}))
  draw = lambda seed: run(jax.random.key(seed))
  chex.assert_trees_all_equal(draw(0), draw(0))
  assert not np.allclose(draw(0), draw(1))


def test_parameters_lie_where_checkpoints_look_for_them(x):
  layer = MoE(TopK(E, K), MLP(F, use_bias=True), shared=MLP(4))
  params = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
  assert {path: leaf.shape for path, leaf in trees.items(params).items()} == {
    "router/kernel": (D, E),
    "experts/up/kernel": (E, D, F),
    "experts/up/bias": (E, F),
    "experts/down/kernel": (E, F, D),
    "experts/down/bias": (E, D),
    "shared/up/kernel": (D, 4),
    "shared/down/kernel": (4, D),
  }
  assert (layer.share("experts/up/kernel"), layer.share("shared/up/kernel")) == (K / E, 1)


def test_an_expert_that_wants_plain_arrays_is_refused(x):
  class Dense(nn.Module):
    @nn.compact
    def __call__(self, x, context):
      return nn.Dense(x.shape[-1])(x)

  with pytest.raises(ValueError, match=r"MoE: expert=Dense.*allowed: .* layers\.weight"):
    jax.eval_shape(MoE(TopK(E, K), Dense()).init, jax.random.key(0), x)


def test_what_is_in_padding_has_no_influence(x):
  layer = MoE(TopK(E, K), MLP(F, use_bias=True), shared=MLP(F, use_bias=True))
  params = random_params(layer, x)
  ids = jnp.array([[0] * 6 + [-1] * 3, [0] * 4 + [1] * 5])
  at = (ids < 0)[..., None]

  @jax.jit
  def run(params, x, dy):
    def outputs(params, x):
      context = Context(segment_ids=ids)
      y, sown = layer.apply({"params": params}, x, context, mutable=["losses"])
      return y, jax.tree.leaves(sown)

    (y, losses), pull = jax.vjp(outputs, params, x)
    return y, losses, pull((dy, [jnp.ones(())] * len(losses)))

  spoil = lambda a: np.where(at, np.float32(np.nan), a)
  dy = np.ones(x.shape, np.float32)
  clean = run(params, x, dy)
  chex.assert_tree_all_finite(clean)
  chex.assert_trees_all_equal(run(params, spoil(x), spoil(dy)), clean)


def test_a_hash_router_reads_the_tokens(x):
  class Hash(nn.Module):
    experts: int = E
    used: float = 1.0
    axes = types.MappingProxyType({})

    def __call__(self, rows, context, mask):
      experts = context.tokens.reshape(-1, 1) % self.experts
      return Routing(experts, jnp.ones(experts.shape))

    def flops(self, width, length, queries=None):
      return 0.0

  layer = MoE(Hash(), SWIGLU)
  tokens = jnp.asarray(np.arange(18).reshape(2, 9))
  params = random_params(layer, x, Context(tokens))
  assert set(params) == {"experts"}
  y = apply(layer, params, x, Context(tokens))
  third = jax.tree.map(lambda p: p[3], params["experts"])
  chex.assert_trees_all_close(y[1, 4], np.asarray(apply(SWIGLU, third, x))[1, 4], atol=1e-6)
  assert layer.flops(D, 9) == 6 * D * F


class Model(nn.Module):
  """Embeddings and a layer that is told which tokens are padding."""

  layer: nn.Module = LAYER

  @nn.compact
  def __call__(self, tokens, segment_ids=None):
    return self.layer(Embed(7, D, name="embed")(tokens), Context(segment_ids=segment_ids))


def test_taps_see_what_routers_and_experts_are_given():
  tokens = jnp.array([[1, 2, 3, 6], [4, 6, 6, 6]])
  params = random_params(Model(), tokens)
  table = np.array(params["embed"]["embedding"])
  table[6] = np.nan  # padding's
  params = params | {"embed": {"embedding": jnp.asarray(table)}}
  batch = {"tokens": tokens, "segment_ids": jnp.asarray(np.where(tokens == 6, -1, 0))}
  kinds = (Linear, TopK)
  found = capture(Model(), params, batch, reduce=sum_of_squares, kind=kinds)
  real = np.square(table[[1, 2, 3, 4]]).sum(0)
  np.testing.assert_allclose(found["layer/router"], real, rtol=1e-5)
  # Every token goes to K experts, each of which has a statistic of what it is given itself.
  np.testing.assert_allclose(found["layer/experts/up"].sum(0), K * real, rtol=1e-5)
  logits = table[[1, 2, 3, 4]] @ np.asarray(params["layer"]["router"]["kernel"])
  chosen = np.argsort(-logits, axis=1)[:, :K]
  own = [np.square(table[[1, 2, 3, 4]][(chosen == e).any(1)]).sum(0) for e in range(E)]
  np.testing.assert_allclose(found["layer/experts/up"], own, rtol=1e-5)
  assert found["layer/experts/down"].shape == (E, F)
  assert np.isfinite(found["layer/experts/down"]).all()


@pytest.mark.parametrize("shape", [(0, 3, D), (2, 0, D)])
def test_no_tokens_at_all(x, shape):
  params = random_params(LAYER, x)
  run = jax.jit(
    jax.value_and_grad(lambda params: LAYER.apply({"params": params}, jnp.ones(shape)).sum())
  )
  value, grads = run(params)
  assert float(value) == 0 and not any(g.any() for g in jax.tree.leaves(grads["experts"]))


def test_on_the_default_mesh_which_is_explicit(x):
  mesh = jax.make_mesh((2,), ("data",))
  assert mesh.axis_types == (AxisType.Explicit,)
  params = random_params(LAYER, x)
  apply = jax.jit(lambda params, x: LAYER.apply({"params": params}, x))
  expected = apply(params, x)
  put = lambda tree, spec: jax.device_put(tree, jax.NamedSharding(mesh, spec))
  with jax.set_mesh(mesh):
    y = apply(put(params, PartitionSpec()), put(x, PartitionSpec("data")))
  assert y.sharding.spec[0] == "data"
  np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
