import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chex import assert_trees_all_equal

from effjax import peft
from effjax.core import trees
from effjax.peft import lora
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
