"""One linear layer and one table, each with an adapter of Hugging Face's peft and one of ours."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from effjax.core import linear, trees
from effjax.core.weights import take
from effjax.peft import LoRA, lora
from tests.modules import normal

REASON = "peer comparisons run on Python 3.11, which has torch and peft"
torch = pytest.importorskip("torch", reason=REASON)
peft = pytest.importorskip("peft", reason=REASON)

D, F, V, RANK, ALPHA, RATE = 12, 10, 9, 3, 5, 0.5
X, IDS = np.array(normal(4, 7, D, seed=1)), np.arange(28).reshape(4, 7) % V
METHODS = {
  "lora": {},
  "rslora": {"rs": True},
  "dora": {"dora": True},
  "pissa": {"start": "pissa"},
  "dora from pissa": {"dora": True, "start": "pissa"},
}
NAMES = {"rs": "use_rslora", "dora": "use_dora", "start": "init_lora_weights"}


class Net(torch.nn.Module):
  def __init__(self):
    super().__init__()
    torch.manual_seed(0)
    self.lin, self.emb = torch.nn.Linear(D, F), torch.nn.Embedding(V, F)

  def forward(self, x, ids):
    return self.lin(x) * self.emb(ids)


def array(tensor):
  return jnp.asarray(tensor.detach().numpy())


def peers(method, **options):
  """The same net by peft and by us, of which the factors of both are peft's."""
  names = {NAMES[name]: value for name, value in method.items()}
  targets = ["lin"] if "start" in method else ["lin", "emb"]
  config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, **names, **options)
  net = Net()
  linear, table = array(net.lin.weight).T, array(net.emb.weight)
  params = {"kernel": linear, "bias": array(net.lin.bias), "embedding": table}
  wrapped = peft.get_peft_model(net, config)
  chosen = "kernel" if "start" in method else "kernel|embedding"
  key, dropout = jax.random.key(0), options.get("lora_dropout", 0.0)
  adapted = lora.add(params, key, rank=RANK, alpha=ALPHA, targets=chosen, dropout=dropout, **method)
  return wrapped, adapted


def taken(wrapped, path):
  """The parameters that peft trains at one of our paths, laid out as ours."""
  layer = wrapped.base_model.model.lin if path == "kernel" else wrapped.base_model.model.emb
  if not hasattr(layer, "lora_A"):
    return {}
  if path == "kernel":
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
  else:
    a, b = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
  found = {"a": array(a).T, "b": array(b).T}
  if "default" in layer.lora_magnitude_vector:
    found["magnitude"] = array(layer.lora_magnitude_vector["default"].weight)[None]
  return found


def with_factors_of(wrapped, adapted):
  put = lambda path, w: dataclasses.replace(w, **taken(wrapped, path))
  return trees.update(adapted, lambda path, w: isinstance(w, LoRA), put)


def outputs(params, key=None):
  params = params if key is None else trees.drawn(params, key)
  rows = take(params["embedding"], jnp.asarray(IDS))
  return linear(jnp.asarray(X), params["kernel"], params["bias"]) * rows


def step(params, key=None, rate=0.1):
  """The outputs, and the parameters after one step of gradient descent on their mean square."""
  chosen, rest = trees.partition(params, lambda path, _: path in trees.trained(params))
  loss = lambda chosen: jnp.square(outputs(trees.merge(chosen, rest), key)).mean()
  grads = jax.jit(jax.grad(loss))(chosen)
  after = trees.merge(jax.tree.map(lambda x, g: x - rate * g, chosen, grads), rest)
  return outputs(params, key), after


def step_of_peft(wrapped, rate=0.1):
  optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], rate)
  y = wrapped(torch.from_numpy(X), torch.from_numpy(IDS))
  y.square().mean().backward()
  optimizer.step()
  return array(y)


def assert_alike(wrapped, params):
  for path in ("kernel", "embedding"):
    for name, expected in taken(wrapped, path).items():
      np.testing.assert_allclose(getattr(params[path], name), expected, atol=1e-5, err_msg=name)


def randomize(wrapped):
  """No factor is 0."""
  for name, tensor in wrapped.named_parameters():
    if "lora_B" in name or "lora_embedding_A" in name:
      torch.nn.init.normal_(tensor, std=0.3)


@pytest.mark.parametrize("name", list(METHODS))
def test_outputs_and_a_step_and_merged_weights_are_pefts(name):
  wrapped, adapted = peers(METHODS[name])
  if "start" not in METHODS[name]:
    randomize(wrapped)
    adapted = with_factors_of(wrapped, adapted)
  else:  # the same but for signs, which singular vectors have in common
    np.testing.assert_allclose(
      adapted["kernel"].base, array(wrapped.base_model.model.lin.base_layer.weight).T, atol=1e-5
    )
    w = adapted["kernel"]
    factors = taken(wrapped, "kernel")
    product = w.scale * (factors["a"] @ factors["b"])
    np.testing.assert_allclose(w.delta(), product, atol=1e-5)
    adapted = with_factors_of(wrapped, adapted)
  y, after = step(adapted)
  np.testing.assert_allclose(y, step_of_peft(wrapped), atol=1e-4)
  assert_alike(wrapped, after)
  merged, net = jax.jit(lora.merge)(after), wrapped.merge_and_unload()
  np.testing.assert_allclose(merged["kernel"], array(net.lin.weight).T, atol=1e-5)
  np.testing.assert_allclose(merged["embedding"], array(net.emb.weight), atol=1e-5)


class Mask(torch.nn.Module):
  """What our dropout of that key leaves of an input, in place of peft's own."""

  def __init__(self, w):
    super().__init__()
    self.factor = torch.from_numpy(np.array(w.dropped(jnp.ones(X.shape))))

  def forward(self, x):
    return x * self.factor if self.training else x


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_dropout_drops_what_pefts_does(name):
  wrapped, adapted = peers(METHODS[name], lora_dropout=RATE)
  randomize(wrapped)
  adapted, key = with_factors_of(wrapped, adapted), jax.random.key(3)
  mask = Mask(trees.drawn(adapted, key)["kernel"])
  assert 0.3 < float((mask.factor == 0).float().mean()) < 0.7
  wrapped.base_model.model.lin.lora_dropout["default"] = mask
  y, after = step(adapted, key)
  np.testing.assert_allclose(y, step_of_peft(wrapped.train()), atol=1e-4)
  assert_alike(wrapped, after)
  np.testing.assert_allclose(
    outputs(after), array(wrapped.eval()(torch.from_numpy(X), torch.from_numpy(IDS))), atol=1e-4
  )


def test_trained_pissa_over_the_first_base_is_what_peft_exports(tmp_path):
  wrapped, started = peers(METHODS["pissa"])
  started = with_factors_of(wrapped, started)
  config = wrapped.peft_config["default"]
  for start, folder in ((True, "start"), ("pissa", "plain")):
    config.init_lora_weights = start
    first = (
      {} if start is True else {"path_initial_model_for_weight_conversion": tmp_path / "start"}
    )
    wrapped.save_pretrained(tmp_path / folder, **first)
    if start is True:
      step_of_peft(wrapped)
  exported = load_file(tmp_path / "plain/adapter_model.safetensors")
  original = {"kernel": array(Net().lin.weight).T}
  w = lora.rebase(*({"kernel": each["kernel"]} for each in (step(started)[1], started)), original)
  for name in ("A", "B"):
    expected = exported[f"base_model.model.lin.lora_{name}.weight"].T
    np.testing.assert_allclose(getattr(w["kernel"], name.lower()), expected, atol=1e-5)
  rank = json.loads((tmp_path / "plain/adapter_config.json").read_text())
  assert w["kernel"].rank == rank["r"] == 2 * RANK and rank["lora_alpha"] == 2 * ALPHA


def test_factors_start_as_pefts_do():
  wrapped, adapted = peers({})
  for path in ("kernel", "embedding"):
    for name, theirs in taken(wrapped, path).items():
      ours = np.asarray(getattr(adapted[path], name))
      assert bool(ours.any()) == bool(np.asarray(theirs).any())
      assert ours.shape == theirs.shape
