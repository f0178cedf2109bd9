"""What is added to scores, as values: against the same as a bias, transformers, and float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.attention import Attention, ShiftedSparseAttention, attend, masks
from effjax.attention.masks import Causal, Full, Predicate, SlidingWindow
from effjax.attention.scores import ALiBi, RelativeBias, Score, Sum, Term
from effjax.kernels.flash_attention import cases
from effjax.kernels.flash_attention.fused.sizes import Size, Sizes
from effjax.kernels.flash_attention.tiled.tiles import Tiles
from effjax.layers import Context

B, T, S, K, G = 2, 21, 29, 2, 2
N = K * G
OUTSIDE = jnp.ones((1,) * 5)
SHAPE = (B, T, S, K, G, 8, 8)


def normal(rng, *shape):
  return rng.normal(size=shape).astype(np.float32)


def mixed(q, k, u, w, z, head, batch):
  return jnp.sin(u * w) + z * u - 0.01 * head * abs(q - k) + 0.1 * batch * k / S


def plain(rng):
  return ALiBi.standard(N)


def summed(rng):
  key_score = Term(lambda q, k, w: w, keys={"w": normal(rng, B, 1, S)})
  table = normal(rng, 8, N)
  return ALiBi(abs(normal(rng, N)) / 8) + RelativeBias(table, True, 20) + key_score


def own(rng):
  arrays = {"queries": {"u": normal(rng, B, 1, T)}, "keys": {"w": normal(rng, 1, N, S)}}
  return Term(mixed, **arrays, distances={"z": normal(rng, B, N, 21)}, heads=N, batch=B)


def problem(scores, **changes):
  sizes = Sizes(Size(16, 16), Size(16, 16), Size(16, 16))
  given = {"dtype": "float32", "scale": 0.4, "softcap": None, "bias": None}
  given |= {"mask": lambda rng: Causal(), "segments": False, "positions": False}
  given |= {"tiles": Tiles(1, 1, 8, 16, fixed=True), "sizes": sizes, "scores": scores}
  return cases.Structure(SHAPE, **(given | changes))


def errors(structure):
  arrays, where = structure.draw(np.random.default_rng(0))
  run = cases.programs(structure, ("xla",), interpret=True)["xla"]
  return cases.errors(run(arrays, where), cases.exact(**structure.options)(arrays, where))


@pytest.mark.parametrize(
  "structure, names",
  [
    pytest.param(problem(plain), 5, id="static"),
    pytest.param(problem(summed, positions=True), 5 + 3, id="positions"),
    pytest.param(
      problem(own, bias=(1, N, T, S), segments=True, softcap=1.5, learned_cap=True),
      6 + 4,
      id="everything",
    ),
    pytest.param(problem(summed, tiles=Tiles(2, 2, 8, 8)), 5 + 3, id="all heads at once"),
  ],
)
def test_values_and_gradients_in_tiles(structure, names):
  """Of each array and of a cap that is data; nothing for slopes that are part of the program."""
  found = errors(structure)
  assert len(found) == names and max(found.values()) < 4e-6, found


def test_half_precision():
  found = errors(problem(summed, dtype="bfloat16"))
  assert max(found.values()) < 1e-2, found


@pytest.mark.parametrize("positions", [False, True])
def test_tangents(positions):
  structure = problem(own, softcap=1.5, learned_cap=True, positions=positions)
  arrays, where = structure.draw(np.random.default_rng(0))
  arrays, mask, places = arrays[:3], where["mask"], where["query_positions"]
  moving = arrays, where["scores"], where["logit_softcap"]
  moves = jax.tree.map(lambda x: jnp.cos(7 * x), moving)

  def along(implementation):
    options = {"mask": mask, "query_positions": places, "return_lse": True}
    attention = functools.partial(attend, **options, implementation=implementation)
    run = lambda qkv, scores, cap: attention(*qkv, scores=scores, logit_softcap=cap)
    return jax.jit(lambda: jax.jvp(run, moving, moves))()

  for x, y in zip(*(jax.tree.leaves(along(name)) for name in ("xla", "reference")), strict=True):
    x, y = (jnp.where(jnp.isfinite(z), z, 0) for z in (x, y))
    np.testing.assert_allclose(x, y, atol=2e-5)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_alibi_equals_the_same_bias(implementation):
  q, k, v = cases.operands(B, T, S, N, K, 8, 8)[:3]
  scores = ALiBi.standard(N)
  distance = abs(np.arange(S - T, S)[:, None] - np.arange(S))
  bias = -np.array(scores.slopes)[:, None, None] * distance
  np.testing.assert_allclose(scores.dense(T, S)[0], bias, rtol=1e-6)
  run = jax.jit(functools.partial(attend, mask=Causal(), implementation=implementation))
  want = run(q, k, v, bias=jnp.asarray(bias[None], jnp.float32))
  got = run(q, k, v, scores=scores)
  np.testing.assert_allclose(got, want, atol=2e-6)


@pytest.mark.parametrize("heads", [1, 2, 3, 8, 12, 20])
def test_slopes_are_those_of_transformers(heads):
  torch = pytest.importorskip("torch", reason="torch is installed with Python 3.11 only")
  bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
  wanted = bloom.build_alibi_tensor(torch.ones(1, 5), heads, torch.float64).reshape(heads, 5)
  ours = np.array(ALiBi.standard(heads).slopes)[:, None] * np.arange(5)
  np.testing.assert_allclose(ours, wanted.numpy(), rtol=1e-6)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("buckets, most", [(32, 128), (8, 20), (64, 1000)])
def test_buckets_are_those_of_transformers(bidirectional, buckets, most):
  torch = pytest.importorskip("torch", reason="torch is installed with Python 3.11 only")
  t5 = pytest.importorskip("transformers.models.t5.modeling_t5").T5Attention
  distances = np.arange(-1500, 1501)
  wanted = t5._relative_position_bucket(torch.tensor(-distances), bidirectional, buckets, most)
  score = RelativeBias(np.arange(buckets, dtype=np.float32)[:, None], bidirectional, most)
  np.testing.assert_array_equal(score.line(distances)[0, 0], wanted.numpy())
  known, traced = score.line(distances), jax.jit(score.line)(jnp.asarray(distances))
  np.testing.assert_array_equal(known, traced)


def test_values_are_equal_and_hashable():
  shift = lambda q, k: q - k
  known = ALiBi.standard(4) + Term(shift)
  assert known == ALiBi.standard(4) + Term(shift)
  assert known != ALiBi.standard(2) + Term(shift)
  assert {known: 1}[ALiBi.standard(4) + Term(shift)] == 1
  held = [known + ALiBi(x) for x in (jnp.ones(4), np.ones(4, np.float32), jnp.zeros(4))]
  assert held[0] == held[1] != held[2] and len({*held, known}) == 3
  assert Predicate(shift) == Predicate(shift) and hash(Predicate(shift)) == hash(Predicate(shift))
  with pytest.raises(TypeError, match="truth value"):
    bool(known)


@pytest.mark.usefixtures("optimized")
def test_no_matrix_is_held():
  """Twice the length takes about twice the memory; the bias alone would take four times."""

  def temporaries(length):
    x = jax.ShapeDtypeStruct((1, length, 4, 32), jnp.float32)
    shapes = jax.ShapeDtypeStruct((32, 4), jnp.float32), jax.ShapeDtypeStruct((4,), jnp.float32)

    def value(q, k, v, table, slopes):
      scores = ALiBi(slopes) + RelativeBias(table)
      out = attend(q, k, v, mask=Causal(), scores=scores, implementation="xla")
      return jnp.square(out).sum()

    run = jax.jit(jax.grad(value, argnums=(0, 1, 2, 3, 4)))
    return run.lower(x, x, x, *shapes).compile().memory_analysis().temp_size_in_bytes

  short, long = temporaries(2048), temporaries(4096)
  assert long < 2.2 * short and long < 4 * 4096**2


@pytest.mark.parametrize("implementation", ["xla", "reference", "interpret"])
@pytest.mark.parametrize(
  "given, message",
  [
    ({"scores": ALiBi((1.0, 2.0))}, "tells 2 heads apart, and query has 4"),
    ({"scores": ALiBi.standard(2) + ALiBi.standard(3)}, "scores of 2 and of 3 heads"),
    ({"scores": Causal()}, "scores is Causal, .* a mask as mask="),
    ({"scores": jnp.zeros((N, T, S))}, "can be given as a bias"),
    ({"mask": ALiBi((1.0,))}, "mask is ALiBi, .* scores as scores="),
    ({"scores": RelativeBias(jnp.ones((1, 8, N))) + ALiBi((1.0,))}, "expected .buckets, 4 or 1"),
    ({"scores": RelativeBias(jnp.ones((7, N)))}, "an even number of buckets"),
    ({"scores": RelativeBias(jnp.ones((32, N)), max_distance=8)}, "allowed: more than 8"),
    ({"scores": Term(abs, keys={"w": jnp.ones((1, 1, S + 1))})}, "keys has w of shape"),
    ({"scores": Term(lambda q, k: (q - k) * OUTSIDE)}, "reads an array .* from outside"),
    ({"mask": Predicate(lambda q, k: k < OUTSIDE)}, "reads an array .* from outside"),
    ({"scores": Term(lambda q, k: jnp.zeros((7, 1)))}, r"gives \(7, 1\) for pairs"),
    ({"scores": Term(lambda q, k: q > k)}, "gives bool; allowed: numbers"),
    ({"scores": Term(lambda q, k: (q, k))}, "gives int32 and int32; allowed: numbers"),
    ({"mask": Predicate(lambda q, k: None)}, "gives None; allowed: booleans"),
    ({"mask": Predicate(lambda q, k: q - k)}, "gives int32; allowed: booleans"),
    ({"logit_softcap": 0}, "logit_softcap 0; allowed: above 0"),
    ({"logit_softcap": np.float32(-1)}, "logit_softcap -1.0"),
    ({"logit_softcap": jnp.float32(np.inf)}, "logit_softcap inf"),
    ({"logit_softcap": jnp.ones(2)}, r"logit_softcap float32\[2\]"),
    ({"scale": np.nan}, "scale nan; allowed: finite"),
    ({"scale": jnp.ones((N, 1))}, r"scale float32\[4, 1\]"),
  ],
)
def test_what_does_not_fit_is_named(implementation, given, message):
  q, k, v = cases.operands(B, T, S, N, K, 8, 8)[:3]
  with pytest.raises(ValueError, match=message):
    attend(q, k, v, implementation=implementation, **given)


@pytest.mark.parametrize(
  "given, message",
  [
    ({"queries": {"q": jnp.ones((1, 1, 1))}}, "names an array 'q'"),
    ({"queries": {"x": jnp.ones((1, 1, 1))}, "keys": {"x": jnp.ones((1, 1, 1))}}, "a name of its"),
    ({"keys": {"x": [1.0]}}, "keys has x of list"),
    ({"heads": 0}, "heads=0 must be 1 or more"),
  ],
)
def test_names_and_shapes_are_checked(given, message):
  for kind in (Term, Predicate):
    with pytest.raises(ValueError, match=message):
      kind(lambda q, k, **_: q >= k, **given)


@pytest.mark.parametrize("implementation", ["xla", "reference", "interpret"])
def test_a_predicate_reads_arrays_heads_and_batch(implementation):
  """The same as the booleans it stands for, given as a bias."""
  q, k, v = cases.operands(B, T, S, N, K, 8, 8)[:3]
  rng = np.random.default_rng(1)
  left, kind = rng.integers(1, 9, (B, 1, T)), rng.integers(0, 3, (1, N, S))
  see = lambda q, k, left, kind, head, batch: (
    (q - k < left) & ((kind > 0) | (k % 2 == batch + head))
  )
  mask = Predicate(see, Causal(), {"left": left}, {"kind": kind}, heads=N, batch=B)
  row, column = np.arange(S - T, S)[:, None], np.arange(S)
  head, batch = np.arange(N)[None, :, None, None], np.arange(B)[:, None, None, None]
  seen = see(row, column, left[..., None], kind[:, :, None], head, batch) & (column <= row)
  np.testing.assert_array_equal(mask.dense(T, S), seen)
  run = functools.partial(attend, implementation=implementation)
  want = attend(q, k, v, bias=jnp.where(seen, 0, -jnp.inf), implementation="reference")
  np.testing.assert_allclose(jax.jit(run)(q, k, v, mask=mask), want, atol=2e-6)


@pytest.mark.parametrize(
  "given, message",
  [
    (([[1.0]] * 8,), "RelativeBias: table is list"),
    ((jnp.ones((8, 1)), True, 0), "RelativeBias: max_distance=0 must be 1 or more"),
  ],
)
def test_a_relative_bias_is_of_a_table_and_a_whole_number(given, message):
  with pytest.raises(ValueError, match=message):
    RelativeBias(*given)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_a_function_is_told_of_one_head_and_one_row_too(implementation):
  """What is written for N heads and B rows runs where there is one of them."""
  q, k, v = cases.operands(1, T, S, 1, 1, 8, 8)[:3]
  mask = Predicate(lambda q, k, head, batch: q >= k + head + batch, heads=1, batch=1)
  score = Term(lambda q, k, head, batch: (head + batch + 1.0) * k, heads=1, batch=1)
  got = attend(q, k, v, mask=mask, scores=score, implementation=implementation)
  bias = jnp.arange(S, dtype=jnp.float32)[None, None, None]
  want = attend(q, k, v, mask=Causal(), bias=bias, implementation="reference")
  np.testing.assert_allclose(got, want, atol=2e-6)


@pytest.mark.parametrize("kind", [np.float32, np.float64, jnp.float32, int])
def test_numbers_of_any_kind_are_numbers(kind):
  q, k, v = cases.operands(1, 3, 3, N, K, 8, 8)[:3]
  run = functools.partial(attend, implementation="reference")
  want = run(q, k, v, scale=2.0, logit_softcap=3.0)
  np.testing.assert_array_equal(run(q, k, v, scale=kind(2), logit_softcap=kind(3)), want)


@pytest.mark.parametrize("shape", [(), (N,)])
def test_a_scale_trains(shape):
  """The gradient of a temperature, also of each head, is that of the queries it multiplies."""
  q, k, v = cases.operands(1, T, T, N, K, 8, 8)[:3]
  scale = jnp.linspace(0.3, 0.6, N) if shape else jnp.float32(0.4)

  def value(implementation):
    run = lambda s: attend(q, k, v, scale=s, mask=Causal(), implementation=implementation)
    return jax.jit(jax.value_and_grad(lambda s: jnp.sin(3 * run(s)).sum()))(scale)

  for x, y in zip(value("xla"), value("reference"), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-4)
  alone = [attend(q, k, v, scale=float(s), mask=Causal()) for s in jnp.broadcast_to(scale, (N,))]
  want = jnp.stack([out[:, :, n] for n, out in enumerate(alone)], 2)
  np.testing.assert_allclose(attend(q, k, v, scale=scale, mask=Causal()), want, atol=2e-6)


def test_the_module_passes_scores_on(key):
  """In full and token by token; a window composes."""
  x = jax.random.normal(key, (2, 9, 16))
  module = Attention(4, mask=SlidingWindow(5, 0), scores=ALiBi.standard(4))
  params = module.init(key, x)
  whole, _ = module.apply(params, x)
  assert not np.allclose(whole, module.clone(scores=None).apply(params, x)[0], atol=1e-3)
  cache, step = module.init_cache(16, 2, 9), jax.jit(module.apply)
  for t in range(9):
    y, cache = step(params, x[:, t : t + 1], Context(positions=jnp.full((2, 1), t)), cache)
    np.testing.assert_allclose(y[:, 0], whole[:, t], atol=2e-6)


def test_modules_without_positions_refuse(key):
  x = jnp.ones((1, 4, 16))
  with pytest.raises(ValueError, match="cross=True with scores"):
    module = Attention(4, cross=True, scores=ALiBi((1.0,)))
    jax.eval_shape(module.init, key, x, Context(memory=x))
  with pytest.raises(ValueError, match="scores=None"):
    jax.eval_shape(ShiftedSparseAttention(4, scores=ALiBi((1.0,))).init, key, x)


def test_a_score_of_ones_own_is_one_class(key):
  """A pytree with features of queries and keys: a product of low rank."""

  @jax.tree_util.register_dataclass
  @dataclasses.dataclass(frozen=True, eq=False)
  class Bilinear(Score):
    left: jax.Array
    right: jax.Array

    def features(self, q_positions, length):
      return self.left[None, None, q_positions[0]], self.right[None, None]

    def term(self, q, k, q_features, k_features, line):
      return q_features * k_features

  x, y = jax.random.normal(key, (2, S))
  q, k, v = cases.operands(B, S, S, N, K, 8, 8)[:3]
  bias = (x[:, None] * y[None])[None, None]
  got = attend(q, k, v, scores=Sum(Bilinear(x, y), ALiBi((0.5,))), mask=Full())
  want = attend(q, k, v, bias=bias + ALiBi((0.5,)).dense(S), mask=masks.Full())
  np.testing.assert_allclose(got, want, atol=2e-6)
