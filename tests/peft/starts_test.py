import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import trees
from effjax.peft import lora
from effjax.quant import GGUF, NF4, Int4, Int8, Palette
from tests.modules import normal

KEY = jax.random.key(0)
PARAMS = {"query": {"kernel": normal(2, 32, 12)}, "embed": {"embedding": normal(16, 8, seed=1)}}


def add(params=PARAMS, rank=4, targets="kernel", **options):
  return lora.add(params, KEY, rank=rank, alpha=6, targets=targets, **options)


def nearest(matrix, rank):
  """The nearest matrices of a rank, by numpy in float64."""
  u, s, vt = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
  return (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :]


@pytest.mark.parametrize("alpha", [6, -6])
def test_pissa_starts_with_the_principal_part(alpha):
  w = lora.add(PARAMS, KEY, rank=4, alpha=alpha, targets="kernel", start="pissa")["query"]["kernel"]
  matrix = PARAMS["query"]["kernel"]
  np.testing.assert_allclose(w.delta(), nearest(matrix, 4), atol=1e-5)
  np.testing.assert_allclose(w.base, matrix - nearest(matrix, 4), atol=1e-5)
  grams = (np.swapaxes(w.a, -1, -2) @ w.a, w.b @ np.swapaxes(w.b, -1, -2))
  np.testing.assert_allclose(*grams, atol=1e-5)


def test_pissa_is_the_same_each_time_and_leaves_tables_of_rank_one():
  first, second = (add(start="pissa", targets="kernel|embedding") for _ in range(2))
  chex.assert_trees_all_equal(first, second)
  for path, matrix in trees.items(lora.merge(first)).items():
    np.testing.assert_allclose(matrix, trees.items(PARAMS)[path], atol=1e-5)


METHODS = {
  "int4": functools.partial(Int4.represent, group=8),
  "nf4": functools.partial(NF4.represent, block=8),
  "palette": functools.partial(Palette.represent, bits=3, steps=2),
  "gguf": functools.partial(GGUF.represent, type="Q4_0"),
}


@pytest.mark.parametrize("method", list(METHODS))
def test_loftq_is_nearer_to_the_matrix_than_quantising_is(method):
  represent, matrix = METHODS[method], np.asarray(PARAMS["query"]["kernel"])
  error = lambda w: np.linalg.norm(np.asarray(w) - matrix)
  alone = error(represent("kernel", jnp.asarray(matrix)))
  once, thrice = (
    add(start=lora.LoftQ(represent, steps=steps))["query"]["kernel"] for steps in (1, 3)
  )
  assert type(once.base) is type(represent("kernel", jnp.asarray(matrix)))
  assert error(thrice) < error(once) < 0.9 * alone


def test_one_step_of_loftq_is_the_nearest_correction():
  w = add(start=lora.LoftQ(Int8.represent))["query"]["kernel"]
  matrix = PARAMS["query"]["kernel"]
  quantised = Int8.quantize(matrix)
  chex.assert_trees_all_equal(w.base, quantised)
  left = np.asarray(matrix, np.float64) - np.asarray(quantised)
  np.testing.assert_allclose(w.delta(), nearest(left, 4), atol=1e-5)


def test_what_pissa_leaves_can_be_quantised():
  plain, small = (add(start=start) for start in ("pissa", lora.PiSSA(Int8.represent)))
  chex.assert_trees_all_equal(
    small["query"]["kernel"].base, Int8.quantize(plain["query"]["kernel"].base)
  )
  chex.assert_trees_all_equal(small["query"]["kernel"].a, plain["query"]["kernel"].a)


@pytest.mark.parametrize("dora", [False, True])
def test_trained_pissa_is_plain_lora_over_the_matrix_it_began_with(dora):
  started = add(start="pissa", dora=dora)
  chosen, rest = trees.partition(started, lambda path, _: path in trees.trained(started))
  params = trees.merge(jax.tree.map(lambda x: x + 0.1, chosen), rest)
  plain = lora.rebase(params, started, PARAMS)
  w = plain["query"]["kernel"]
  assert w.rank == 8 and w.base is PARAMS["query"]["kernel"]
  chex.assert_trees_all_equal(w.scale, started["query"]["kernel"].scale)
  np.testing.assert_allclose(
    w.materialize(), params["query"]["kernel"].materialize(), rtol=1e-4, atol=1e-4
  )


def test_a_start_may_be_a_function_of_ones_own():
  ones = lambda path, w, key, rank, scale: (
    w, jnp.ones((*w.shape[:-1], rank)), jnp.zeros((*w.shape[:-2], rank, w.shape[-1]))
  )  # fmt: skip
  assert bool((add(start=ones)["query"]["kernel"].a == 1).all())


def test_shapes_suffice():
  for start in ("pissa", lora.LoftQ(Int8.represent, steps=2)):
    shapes = jax.eval_shape(lambda params, start=start: add(params, start=start), PARAMS)
    assert shapes["query"]["kernel"].a.shape == (2, 32, 4)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"start": "piss"}, r"start='piss'; allowed: default, pissa, PiSSA\(represent\), LoftQ\("),
    ({"start": lora.PiSSA}, "start=<class '.*PiSSA'>; allowed: default"),
    ({"start": "pissa", "params": {"kernel": Int8.quantize(normal(8, 8))}},
     r"^kernel: PiSSA over Int8\[8, 8\] float32; allowed: a plain matrix"),
    ({"start": lora.LoftQ(functools.partial(Int4.represent, group=6))},
     r"^query/kernel: group 6 does not divide the 32 inputs"),
    ({"start": lambda *given: (given[1], normal(2, 32, 3), normal(2, 4, 12))},
     r"^query/kernel: LoRA: b has shape \(2, 4, 12\); allowed: \(2, 3, 12\)"),
  ],
)  # fmt: skip
def test_bad_starts_are_named(options, message):
  with pytest.raises(ValueError, match=message):
    add(**options)


def test_more_bad_input_is_named():
  with pytest.raises(ValueError, match="alpha 0 with PiSSA"):
    lora.add(PARAMS, KEY, rank=2, alpha=0, targets="kernel", start="pissa")
  with pytest.raises(ValueError, match="LoftQ: steps=0; allowed: from 1, an integer"):
    lora.LoftQ(Int8.represent, steps=0)
  for call in (lora.LoftQ, lora.PiSSA, functools.partial(lora.merge, add())):
    with pytest.raises(ValueError, match=r"represent=<class .*; allowed: a function .*NF4\.repr"):
      call(NF4)
  started, other = add(start="pissa"), add(rank=3)
  with pytest.raises(ValueError, match=r"started has LoRA.* at query/kernel"):
    lora.rebase(started, other, PARAMS)
  with pytest.raises(ValueError, match=r"original has no matrix \(2, 32, 12\) at query/kernel"):
    lora.rebase(started, started, {"embed": PARAMS["embed"]})
  with pytest.raises(ValueError, match=r"no LoRA; allowed: what lora\.add"):
    lora.rebase(PARAMS, started, PARAMS)
