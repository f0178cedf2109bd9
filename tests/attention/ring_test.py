"""A sequence on eight devices attends as it does on one."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from effjax.attention import attend, masks, ring_attend
from effjax.attention.masks import Causal, Documents, Full, Global, SlidingWindow, longformer
from effjax.attention.scores import ALiBi, RelativeBias, Term

B, T, N, K, H, DEVICES = 2, 48, 4, 2, 8, 8
IDS = jnp.array([[0] * 10 + [1] * 25 + [2] * 9 + [-1] * 4, [4] * 48])
MASKS = {
  "full": Full(),
  "causal": Causal(),
  "window": Causal() & SlidingWindow(9, 0),
  "far": Causal() & ~SlidingWindow(13, 0),
  "both ways": SlidingWindow(5, 4),
  "longformer": longformer(4, (0, 31), dilation=(1, 1, 2, 3), causal=True),
  "global": SlidingWindow(3, 3) | Global(2),
  "documents": Causal() & Documents(IDS),
  "bigbird": masks.bigbird(jax.random.key(1), T, block=4, number=1, heads=N, causal=True),
  "prefix": Causal() | masks.Prefix(jnp.array([7, 20])),
  "own": Causal()
  & masks.Predicate(
    lambda q, k, left, kind, head, batch: (q - k < left) & ((k + head + batch) % 5 != kind),
    queries={"left": jnp.arange(B * T).reshape(B, 1, T) * 7 % 40 + 1},
    keys={"kind": jnp.arange(N * T).reshape(1, N, T) % 6},
    heads=N,
    batch=B,
  ),
}


@functools.cache
def mesh(batch=1):
  return jax.make_mesh(
    (batch, DEVICES // batch), ("batch", "ring"), axis_types=(AxisType.Auto,) * 2
  )


def problem(dtype="float32", length=T):
  """Query, key, value, sinks, and cotangents of out and the log-sum-exp."""
  shapes = [(B, length, n, H) for n in (N, K, K)]
  shapes += [(N,), (B, length, N, H), (B, length, N)]
  rng = np.random.default_rng(0)
  return [jax.device_put(rng.normal(size=shape).astype(dtype)) for shape in shapes]


def ring(batch=1, **arguments):
  """`ring_attend` of whole arrays, with the mask as an argument."""
  spec = P("batch", "ring")
  ids = {name: arguments.pop(name) for name in ("segment_ids",) if name in arguments}

  def local(q, k, v, sinks, mask, ids):
    options = {"mask": mask, "sinks": sinks, "return_lse": True, **ids, **arguments}
    return ring_attend(q, k, v, axis="ring", **options)

  specs = (spec,) * 3 + (P(), P(), spec)
  run = jax.shard_map(local, mesh=mesh(batch), in_specs=specs, out_specs=spec)
  return lambda q, k, v, sinks, mask: run(q, k, v, sinks, mask, ids)


def evaluate(function, mask, arrays):
  """out, lse and the gradients of query, key, value and sinks."""
  *inputs, d_out, d_lse = arrays
  results, backward = jax.vjp(lambda *x: function(*x, mask), *inputs)
  cotangents = [d.astype(x.dtype) for d, x in zip((d_out, d_lse), results, strict=True)]
  return *results, *backward(tuple(cotangents))


def exact(arrays, mask, **arguments):
  with jax.enable_x64(True):
    arrays = [jax.device_put(np.asarray(x, np.float64)) for x in arrays]
    options = {"return_lse": True, "implementation": "reference", **arguments}
    function = lambda q, k, v, sinks, mask: attend(q, k, v, mask=mask, sinks=sinks, **options)
    run = jax.jit(functools.partial(evaluate, function, mask))
    return jax.tree.map(np.asarray, run(arrays))


def check(arrays, mask, tolerance=2e-6, batch=1, **arguments):
  run = jax.jit(functools.partial(evaluate, ring(batch, **arguments), mask))
  got = run(arrays)
  for x, y in zip(got, exact(arrays, mask, **arguments), strict=True):
    scale = max(np.abs(y).max(), 1)
    np.testing.assert_allclose(np.asarray(x, np.float64), y, rtol=0, atol=tolerance * scale)
  return got


FAST = ("causal", "both ways", "longformer", "own")
CASES = [pytest.param(n, marks=[] if n in FAST else [pytest.mark.slow]) for n in MASKS]


@pytest.mark.parametrize("name", CASES)
def test_equals_one_device(name):
  check(problem(), MASKS[name])


def test_segments_and_a_batch_split_too():
  """With a soft cap; rows that see nothing are zeros, and their log-sum-exp the sink."""
  arrays = problem()
  arrays[-1] = jnp.where((IDS < 0)[..., None], 0, arrays[-1])
  out, lse, *_ = check(arrays, Causal(), batch=2, segment_ids=IDS, logit_softcap=1.5, scale=0.7)
  assert (out[0, 44:] == 0).all() and (lse[0, 44:] == arrays[3][None]).all()


def test_scores_and_their_gradients():
  """Of arrays and a soft cap that every device has whole; distances beyond the last one's too."""
  rng = np.random.default_rng(1)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  own = Term(
    lambda q, k, u, w, z, head: jnp.sin(u * w) + z * u - 0.01 * head * abs(q - k),
    queries={"u": normal(B, 1, T)},
    keys={"w": normal(1, N, T)},
    distances={"z": normal(B, N, 21)},
    heads=N,
  )
  scores = ALiBi.standard(N) + RelativeBias(normal(8, N), True, 20) + own
  spec, arrays, cap = P("batch", "ring"), problem(), jnp.float32(1.5)

  def local(q, k, v, sinks, scores, cap):
    options = {"mask": Causal(), "sinks": sinks, "logit_softcap": cap, "return_lse": True}
    return ring_attend(q, k, v, axis="ring", scores=scores, **options)

  def all_of(function, scores, cap):
    run = lambda q, k, v, sinks, given: function(q, k, v, sinks, *given)
    gradients = lambda *x: jax.vjp(run, *x[:4], (scores, cap))
    results, backward = jax.jit(gradients)(*arrays[:4])
    return jax.tree.leaves((results, backward(tuple(arrays[4:]))))

  whole = jax.shard_map(
    local, mesh=mesh(), in_specs=(spec,) * 3 + (P(),) * 3, out_specs=(spec, spec)
  )
  alone = lambda q, k, v, sinks, scores, cap: attend(
    q, k, v, mask=Causal(), sinks=sinks, scores=scores, logit_softcap=cap, return_lse=True
  )
  for x, y in zip(all_of(whole, scores, cap), all_of(alone, scores, cap), strict=True):
    np.testing.assert_allclose(x, y, rtol=0, atol=4e-6 * max(np.abs(y).max(), 1))


@pytest.mark.slow
def test_half_precision():
  out, *_ = check(problem("bfloat16"), Causal(), 1e-2)
  assert out.dtype == jnp.bfloat16


def permutes(jaxpr, times=1) -> int:
  """How often the program sends something on."""
  total = 0
  for equation in jaxpr.eqns:
    total += times * (equation.primitive.name == "ppermute")
    often = times * equation.params.get("length", 1) if equation.primitive.name == "scan" else times
    for inner in jax.tree.leaves(
      list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
    ):
      inner = getattr(inner, "jaxpr", inner)
      total += permutes(inner, often) if hasattr(inner, "eqns") else 0
  return total


@pytest.mark.parametrize(
  "mask, forward, back",
  [
    (Causal(), 7, 8),  # gradients have one more way, home
    (Causal() & SlidingWindow(6, 0), 1, 2),
    (SlidingWindow(0, 0), 0, 0),
    (SlidingWindow(6, 6), 2, 3),  # to the left, then two places on at once, to the right
    (~SlidingWindow(30, None), 3, 3),  # five places at once, and two steps on
  ],
)
def test_steps_that_nobody_needs_are_left_out(mask, forward, back):
  arrays = problem()
  run = lambda *x: ring()(*x, mask)
  assert permutes(jax.make_jaxpr(run)(*arrays[:4]).jaxpr) == 2 * forward
  gradients = lambda *x: jax.vjp(run, *x[:4])[1](x[4:])
  both = 2 * forward + 2 * forward + 2 * back
  assert permutes(jax.make_jaxpr(gradients)(*arrays).jaxpr) == both


def test_devices_that_see_nothing_of_the_visitors_compute_nothing():
  steps = []

  def causal(q, k):
    see = lambda q, k: steps.append((int(q), int(k)))
    jax.debug.callback(see, q[0, 0, 0, 0, 0] // 6, k[0, 0, 0, 0, 0] // 6)
    return q >= k

  arrays = problem()[:4]
  run = jax.jit(lambda *x: ring()(*x, masks.Predicate(causal, visited=Causal())))
  jax.block_until_ready(run(*arrays))
  jax.effects_barrier()
  assert collections.Counter(steps) == {(i, j): 1 for i in range(DEVICES) for j in range(i + 1)}


@pytest.mark.usefixtures("optimized")
def test_what_a_device_holds_does_not_grow_with_the_ring():
  """Twice the devices with as many tokens each: no more keys are kept, let alone scores."""

  def temporaries(batch, own=1024):
    spec = P(None, "ring")
    attention = functools.partial(ring_attend, axis="ring", mask=Causal())
    run = jax.shard_map(attention, mesh=mesh(batch), in_specs=spec, out_specs=spec)
    gradients = jax.jit(jax.grad(lambda *x: jnp.square(run(*x)).sum(), (0, 1, 2)))
    x = jax.ShapeDtypeStruct((1, own * DEVICES // batch, 1, 64), jnp.float32)
    compiled = gradients.lower(x, x, x).compile()
    assert "all-gather" not in compiled.as_text()
    return compiled.memory_analysis().temp_size_in_bytes

  assert temporaries(1) <= 1.01 * temporaries(2)


@pytest.mark.parametrize(
  "change, message",
  [
    ({"sinks": jnp.zeros(3)}, r"sinks has shape \(3,\)"),
    ({"mask": Documents(IDS[:, :6])}, r"expected \(2, 48\)"),
    ({"mask": jnp.ones((6, 6))}, "expected a mask"),
    ({"segment_ids": jnp.zeros((2, 6))}, "segment_ids has shape .* of float32"),
    ({"key": jnp.zeros((B, 16, K, H))}, "key has 2 tokens; allowed: 6"),
  ],
)
def test_what_does_not_fit_is_named(change, message):
  names = ("query", "key", "value")
  arrays = dict(zip(names, problem()[:3], strict=True))
  arrays |= {name: change.pop(name) for name in names if name in change}
  arrays["value"] = arrays["key"]
  run = jax.shard_map(
    lambda x: ring_attend(**x, axis="ring", **change),
    mesh=mesh(),
    in_specs=P(None, "ring"),
    out_specs=P(None, "ring"),
  )
  with pytest.raises(ValueError, match=message):
    run(arrays)
