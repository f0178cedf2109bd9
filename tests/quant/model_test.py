import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.attention.multi_head import Attention
from effjax.core import trees
from effjax.core.register import REPRESENTATIONS, register
from effjax.layers import MLP
from effjax.layers.spec import LayerSpec, TransformerConfig
from effjax.models.transformer import Transformer
from effjax.quant import Int8, dequantize, fake_quantize, methods, quantize
from effjax.quant.model import representer
from tests.modules import apply, random_params

TOKENS = np.arange(12).reshape(2, 6)


@pytest.fixture(scope="module")
def model():
  layer = LayerSpec(Attention(4, kv_heads=2, use_bias=True), MLP(48, "silu", gated=True))
  module = Transformer(TransformerConfig(64, 32, (layer,) * 3, context=8, positions="learned"))
  return module, random_params(module, TOKENS)


def test_default_targets_are_kernels_and_tables(model):
  quantised = trees.items(quantize(model[1]))
  kinds = {path: isinstance(leaf, Int8) for path, leaf in quantised.items()}
  assert all(kind == path.endswith(("kernel", "embedding")) for path, kind in kinds.items())
  assert quantised["embed/embedding"].scale.shape == (64, 1)
  assert quantised["segments_0/layers_0/mixer/query/kernel"].scale.shape == (3, 1, 32)


def test_the_router_stays():
  params = {"router": {"kernel": jnp.ones((4, 2))}, "up": {"kernel": jnp.ones((2, 4, 8))}}
  quantised = quantize(params)
  assert isinstance(quantised["up"]["kernel"], Int8)
  chex.assert_trees_all_equal(quantised["router"], params["router"])


def test_a_scanned_model_computes_with_the_dequantised_matrices(model):
  module, params = model
  quantised = quantize(params)
  got, dense, whole = (
    np.asarray(apply(module, tree, TOKENS)) for tree in (quantised, dequantize(quantised), params)
  )
  np.testing.assert_allclose(got, dense, rtol=1e-4, atol=1e-5)
  assert 0 < np.abs(got - whole).max() / np.abs(got).max() < 0.05
  assert trees.nbytes(quantised) < 0.32 * trees.nbytes(params)
  assert trees.count(quantised) == trees.count(params)


def test_it_runs_on_shapes_and_under_jit(model):
  abstract = jax.eval_shape(quantize, model[1])
  assert trees.nbytes(abstract) == trees.nbytes(quantize(model[1]))


def test_dequantize_undoes_the_base_of_another_weight(model):
  quantised = quantize(model[1], targets="query")
  assert not isinstance(trees.items(quantised)["embed/embedding"], Int8)
  chex.assert_trees_all_equal_shapes_and_dtypes(dequantize(quantised), model[1])


@pytest.mark.parametrize("method", ["int4", "nf4"])
def test_rounding_for_training_is_what_quantising_gives(model, method):
  options = {"group": 8} if method == "int4" else {"block": 8}
  rounded = fake_quantize(model[1], method, "mlp|ffn", **options)
  chex.assert_trees_all_equal(rounded, dequantize(quantize(model[1], method, "mlp|ffn", **options)))
  loss = lambda params: sum(
    jnp.sin(x).sum() for x in jax.tree.leaves(fake_quantize(params, method, "ffn", **options))
  )
  found = jax.jit(jax.grad(loss))(model[1])
  chex.assert_trees_all_close(found, jax.tree.map(jnp.cos, rounded), rtol=1e-5)


def test_rounding_leaves_other_weights_alone(model):
  mixed = quantize(model[1], targets="query")
  found = fake_quantize(mixed, targets="ffn/up")
  assert isinstance(trees.select(found, "query/kernel").popitem()[1], Int8)


@pytest.mark.parametrize("change", [quantize, fake_quantize])
def test_what_a_method_does_not_take_is_named(model, change):
  message = "'int4' has no option 'bits'; allowed: group, scale_dtype, symmetric, table"
  with pytest.raises(ValueError, match=message):
    change(model[1], "int4", bits=3)


OPTIONS = {
  "int8": "granularity scale_dtype",
  "int8dynamic": "granularity scale_dtype",
  "llmint8": "capacity exact granularity scale_dtype threshold",
  "llmint8exact": "capacity exact granularity scale_dtype threshold",
  "int4": "group scale_dtype symmetric table",
  "int4affine": "group scale_dtype symmetric table",
  "nf4": "block double table",
  "fp4": "block double table",
  "palette": "bits steps table",
  "gguf": "table type",
  "ternary": "scale_dtype table",
}


@pytest.mark.parametrize("method", methods())
def test_options_are_those_of_the_method(method):
  with pytest.raises(ValueError, match=f"{method!r} has no option 'w'; allowed: ") as found:
    representer(method, {"w": 1, **dict.fromkeys(OPTIONS[method].split())})
  assert str(found.value).endswith(f"allowed: {', '.join(OPTIONS[method].split())}")


def test_options_of_a_method_of_the_users_own():
  class Own(Int8):
    @classmethod
    def represent(cls, path, w, halves=False):
      return super().represent(path, w, scale_dtype=jnp.float16 if halves else jnp.float32)

  register(kind="quantised")(Own)
  try:
    assert quantize({"kernel": jnp.eye(2)}, "own", halves=True)["kernel"].scale.dtype == jnp.float16
    with pytest.raises(ValueError, match="'own' has no option 'path', 'scale'; allowed: halves"):
      quantize({"kernel": jnp.eye(2)}, "own", scale=1, path="")
  finally:
    REPRESENTATIONS.pop("Own")


def test_whether_it_is_a_table_may_be_said():
  params = {"embedding": jnp.ones((4, 6)), "kernel": jnp.ones((4, 6))}
  usual, other = (quantize(params, "int4", group=2, **told) for told in ({}, {"table": True}))
  assert [leaf.table for leaf in usual.values()] == [True, False]
  assert [leaf.table for leaf in other.values()] == [True, True]


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"method": "int3"}, "method 'int3' is unknown; allowed: int8"),
    ({"targets": "absent"}, "'absent' matches no parameter"),
    ({"targets": "norm/scale"}, "selects no matrix"),
  ],
)
def test_bad_arguments_are_named(model, arguments, message):
  with pytest.raises(ValueError, match=message):
    quantize(model[1], **arguments)


def test_quantising_twice_is_refused(model):
  with pytest.raises(ValueError, match="query/kernel is Int8 already"):
    quantize(quantize(model[1], targets="query"), targets="query")


@pytest.mark.parametrize(
  ("w", "message"),
  [
    (np.ones((2, 3), np.int32), r"up/kernel is int32\[2, 3\]; allowed: matrices of floats"),
    (np.full((2, 3), np.nan, np.float32), "up/kernel: w has NaN"),
    (jnp.array([[jnp.inf, 1.0]], jnp.bfloat16), "up/kernel: w has NaN, infinity"),
  ],
)
def test_what_cannot_be_quantised_is_named(w, message):
  with pytest.raises(ValueError, match=message):
    quantize({"up": {"kernel": w}, "down": {"kernel": jnp.ones((3, 2))}})


def test_numpy_matrices_and_those_of_16_bits():
  params = {"a": {"kernel": np.eye(4)}, "b": {"kernel": 1e-6 * jnp.eye(4, dtype=jnp.float16)}}
  found = dequantize(quantize(params))
  assert [found[name]["kernel"].dtype for name in "ab"] == [jnp.float32, jnp.float16]
  for name in "ab":
    np.testing.assert_allclose(found[name]["kernel"], params[name]["kernel"], rtol=2e-2)
