import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chex import assert_trees_all_equal

from effjax import peft
from effjax.core import trees
from effjax.core.register import REPRESENTATIONS, register
from effjax.core.typing import PyTree
from effjax.peft import LoRA, lora
from effjax.peft.beside import Adapter, Tuned
from effjax.quant import quantize

BASE = {"query": {"kernel": jnp.ones((3, 4, 6))}, "out": {"kernel": jnp.ones((6, 4))}}


def trained(base, rank=2):
  """Adapters whose B is not zero, one of them over another."""
  params = lora.add(base, jax.random.key(0), rank=rank, targets="kernel")
  params["out"]["kernel"] = lora.init(params["out"]["kernel"], jax.random.key(1), rank=1, scale=1.0)
  chosen, rest = trees.partition(params, peft.trainable(params))
  return trees.merge(jax.tree.map(lambda x: x + 0.5, chosen), rest)


@pytest.mark.parametrize("base", [BASE, quantize(BASE)], ids=["float32", "int8"])
def test_adapters_come_off_and_go_on_again(base):
  params = trained(base)
  plain, adapters = peft.detach(params)
  assert_trees_all_equal(plain, base)
  assert set(adapters) == {"query/kernel", "out/kernel"}
  factors = trees.partition(params, peft.trainable(params))[0]
  scales = 4 * (3 + 1 + 1)
  assert trees.nbytes(adapters) == trees.nbytes(factors) + scales
  assert_trees_all_equal(peft.attach(plain, adapters), params)


def test_a_file_holds_the_factors_alone(tmp_path):
  params = trained(BASE)
  path = peft.save(params, tmp_path / "run")
  assert path.stat().st_size < trees.nbytes(peft.detach(params)[1]) + 2000
  loaded = peft.load(BASE, tmp_path / "run")
  assert_trees_all_equal(loaded, params)
  over_int8 = peft.load(quantize(BASE), tmp_path / "run")
  assert type(over_int8["query"]["kernel"].base).__name__ == "Int8"
  np.testing.assert_array_equal(over_int8["out"]["kernel"].a, params["out"]["kernel"].a)


def test_what_does_not_fit_is_named(tmp_path):
  peft.save(trained(BASE), tmp_path)
  with pytest.raises(FileExistsError, match="is there already"):
    peft.save(trained(BASE), tmp_path)
  with pytest.raises(ValueError, match=r"nothing at 'out/kernel'; allowed: query/kernel"):
    peft.load({"query": BASE["query"]}, tmp_path)
  other = BASE | {"out": {"kernel": jnp.ones((6, 5))}}
  with pytest.raises(ValueError, match=r"'out/kernel' \(6, 5\): LoRA: b has shape"):
    peft.load(other, tmp_path)
  with pytest.raises(FileNotFoundError, match=r"allowed: a folder that peft\.save wrote"):
    peft.load(BASE, tmp_path / "nowhere")
  with pytest.raises(ValueError, match="kernel' has one already"):
    peft.load(trained(BASE), tmp_path)
  with pytest.raises(ValueError, match="no adapter"):
    peft.save(BASE, tmp_path / "new")


def test_damaged_files_are_refused(tmp_path):
  path = peft.save(trained(BASE), tmp_path)
  whole = path.read_bytes()
  for damaged in (whole[: len(whole) // 2], b"", whole.replace(b"LoRA", b"LoRB")):
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="damaged or not a file of adapters"):
      peft.load(BASE, tmp_path)


LAYER = {"norm": {"scale": jnp.ones((2, 4))}, "ffn": {"kernel": jnp.ones((2, 4, 4))}}
STACK = {"embed": {"embedding": jnp.ones((5, 4))}, "segments_0": {"layers_0": LAYER}}


def with_new(params=STACK):
  """A layer with a module more, of new parameters, and one in place of a frozen one."""
  layer = params["segments_0"]["layers_0"]
  new = {"up": {"kernel": Tuned(None, jnp.ones((2, 4, 3))), "bias": Tuned(None, jnp.ones((2, 3)))}}
  scale = Tuned(layer["norm"]["scale"], jnp.full((2, 4), 3.0))
  over = LoRA(new["up"]["kernel"], *(jnp.ones((2, *s)) for s in ((4, 1), (1, 3), (1, 1))))
  new["up"]["kernel"] = over
  layer = {**layer, "norm": {"scale": scale}, "after_ffn": new}
  return {**params, "prompt": Tuned(None, jnp.ones((3, 4))), "segments_0": {"layers_0": layer}}


def test_new_parameters_come_off_without_a_trace_and_go_on_where_nothing_is(tmp_path):
  params = with_new()
  base, adapters = peft.detach(params)
  assert_trees_all_equal(base, STACK)
  assert set(adapters) == {
    "prompt",
    "segments_0/layers_0/norm/scale",
    "segments_0/layers_0/after_ffn/up/kernel",
    "segments_0/layers_0/after_ffn/up/bias",
  }
  assert_trees_all_equal(peft.attach(base, adapters), params)
  peft.save(params, tmp_path)
  loaded = peft.load(STACK, tmp_path)
  assert_trees_all_equal(loaded, params)
  assert jax.tree.structure(loaded) == jax.tree.structure(params)


def test_new_parameters_of_another_model_are_refused_by_name():
  _, adapters = peft.detach(with_new())
  shorter = jax.tree.map(lambda x: jnp.ones((3, *x.shape[1:])), STACK)
  scale = "segments_0/layers_0/norm/scale"
  for params, message in (
    (with_new(), "'segments_0/layers_0/norm/scale' has one already"),
    (STACK | {"prompt": jnp.ones(3)}, "'prompt' is new, and params has 'prompt'; allowed: nothing"),
    (STACK | {"segments_0": {}}, f"nothing at '{scale}'"),
    (shorter, f"'{scale}' .* value has shape"),
  ):
    with pytest.raises(ValueError, match=message):
      peft.attach(params, adapters)
  adapters.pop(scale)
  for params, message in (
    (STACK | {"segments_0": {}}, "up/kernel': params has no segments_0/layers_0/"),
    (shorter, r"has shape \(2, 4, 3\); allowed: 3 layers"),
  ):
    with pytest.raises(ValueError, match=message):
      peft.attach(params, {p: x for p, x in adapters.items() if p.endswith("up/kernel")})


@register(static=("names", "size"), trains=("factors",), kind="adapter")
class Several(Adapter):
  """An adapter of parts, with static fields."""

  factors: PyTree
  names: tuple
  size: float

  def added(self, x, y, bias):
    return y

  def materialize(self):
    return self.base


def test_fields_of_any_form_come_back_as_they_were(tmp_path):
  factors = {"a": jnp.ones(3), "b": (jnp.zeros(2, jnp.bfloat16), None, Tuned(None, jnp.ones(1)))}
  params = {"kernel": Several(jnp.ones((3, 4)), factors, ("x", ("y", 2), None), 0.1)}
  peft.save(params, tmp_path)
  loaded = peft.load({"kernel": jnp.ones((3, 4))}, tmp_path)
  assert jax.tree.structure(loaded) == jax.tree.structure(params)
  assert_trees_all_equal(loaded, params)
  REPRESENTATIONS.pop("Several")
