"""Prefix and prompt tuning on tiny models, against Hugging Face's peft on the same weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax import models
from effjax.layers.objective import through
from effjax.peft import prefix, soft_prompt
from effjax.train import next_token
from tests.modules import apply

REASON = "peer comparisons run on Python 3.11, which has torch and peft"
torch = pytest.importorskip("torch", reason=REASON)
peft = pytest.importorskip("peft", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)

DECODER = {
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
}
GEMMA = {
  "num_key_value_heads": 1,
  "head_dim": 16,
  "query_pre_attn_scalar": 20,
  "sliding_window": 5,
  "layer_types": ["sliding_attention", "full_attention"],
}
TINY = {
  "llama": DECODER | {"rope_theta": 5000.0},
  "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32},
  "gemma3_text": DECODER | GEMMA,
}
TOKENS = np.int32([[5, 9, 2, 6, 5, 3, 5, 8], [1, 2, 3, 4, 5, 6, 7, 8]])
KEY, P, RATE = jax.random.key(0), 3, 0.5
# Each label is the next token; the last predicts nothing.
BATCH = {
  "tokens": TOKENS,
  "targets": np.roll(TOKENS, -1, axis=1),
  "weights": np.float32([[1] * 7 + [0]] * 2),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
  """A function: a random transformers model, and it as ours."""

  @functools.cache
  def make(kind):
    config = transformers.AutoConfig.for_model(
      kind, vocab_size=40, max_position_embeddings=32, **TINY[kind], attn_implementation="eager",
      bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
      for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape))
    folder = tmp_path_factory.mktemp("prompts") / kind
    model.save_pretrained(folder)
    return folder, models.load(folder)

  def fresh(kind):
    folder, ours = make(kind)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
      folder, dtype=torch.float32, attn_implementation="eager"
    )
    return theirs.eval(), ours

  return fresh


def wrapped(model, config):
  """A peft model with a drawn prompt."""
  found = peft.get_peft_model(model, config).eval()
  with torch.no_grad():
    for _, tensor in found.prompt_encoder.named_parameters():
      tensor.copy_(0.3 * torch.randn(tensor.shape))
  return found


def array(tensor):
  return jnp.asarray(tensor.detach().numpy())


def after_a_step(found):
  """Logits, loss, and trained tensors by name after a step of gradient descent."""
  tokens = torch.from_numpy(TOKENS).long()
  out = found(input_ids=tokens, labels=tokens)
  out.loss.backward()
  state = found.prompt_encoder.named_parameters()
  moved = {n.removeprefix("default."): array(x - RATE * x.grad) for n, x in state}
  return out.logits.detach().numpy(), float(out.loss), moved


def stepped(objective, trained, batch):
  @jax.jit
  def step(trained, batch):
    (loss, _), slopes = jax.value_and_grad(objective, has_aux=True, allow_int=True)(
      trained, batch, None
    )
    move = lambda x, dx: x - RATE * dx if jnp.issubdtype(x.dtype, jnp.floating) else x
    return loss, jax.tree.map(move, trained, slopes)

  return step(trained, batch)


@pytest.mark.parametrize("kind", TINY)
def test_prefix_tuning_is_pefts(pair, kind):
  model, ours = pair(kind)
  mixer = ours.config.layers[0].mixer
  K, H = mixer.kv_shape(ours.config.width)
  sizes = {"token_dim": K * H, "num_attention_heads": K, "num_layers": 2}
  config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P, **sizes)
  found = wrapped(model, config)
  values = array(found.prompt_encoder.default.embedding.weight)
  logits, loss, moved = after_a_step(found)

  tuned, params = prefix.add(ours.config, ours.params, KEY, length=P)
  params, module = prefix.put(tuned, params, values), models.Transformer(tuned)
  np.testing.assert_allclose(apply(module, params, TOKENS), logits, rtol=1e-4, atol=1e-4)
  view = lambda values: prefix.put(tuned, params, values)
  got, new = stepped(through(next_token(module), view), values, BATCH)
  assert float(got) == pytest.approx(loss, rel=1e-5)
  np.testing.assert_allclose(new, moved["embedding.weight"], atol=1e-4)
  assert np.abs(new - values).max() > 1e-2
  np.testing.assert_array_equal(prefix.flat(tuned, params), values)


def test_the_reparametrisation_is_pefts(pair):
  model, ours = pair("llama")
  sizes = {"encoder_hidden_size": 12, "token_dim": 16, "num_attention_heads": 2, "num_layers": 2}
  config = peft.PrefixTuningConfig(
    task_type="CAUSAL_LM", num_virtual_tokens=P, prefix_projection=True, **sizes
  )
  found = wrapped(model, config)
  names = {"up": "transform.0", "down": "transform.2"}

  def tree(state):
    of = lambda name: {"kernel": state[f"{name}.weight"].T, "bias": state[f"{name}.bias"]}
    return {"embedding": state["embedding.weight"]} | {n: of(m) for n, m in names.items()}

  before = tree({n: array(x) for n, x in found.prompt_encoder.default.named_parameters()})
  logits, _, moved = after_a_step(found)
  tuned, params = prefix.add(ours.config, ours.params, KEY, length=P)
  drawn, view = prefix.reparametrize(tuned, params, KEY, hidden=12)
  assert jax.tree.map(jnp.shape, drawn) == jax.tree.map(jnp.shape, before)
  module = models.Transformer(tuned)
  np.testing.assert_allclose(apply(module, view(before), TOKENS), logits, rtol=1e-4, atol=1e-4)
  _, new = stepped(through(next_token(module), view), before, BATCH)
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), new, tree(moved))


@pytest.mark.parametrize("kind", TINY)
def test_prompt_tuning_is_pefts(pair, kind):
  model, ours = pair(kind)
  config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
  found = wrapped(model, config)
  values = array(found.prompt_encoder.default.embedding.weight)[None]
  logits, loss, moved = after_a_step(found)

  _, params = soft_prompt.add(ours.config, ours.params, KEY, length=P)
  batch = soft_prompt.prepend(params, BATCH)

  def view(values):
    table = params["embed"]["embedding"]
    table = soft_prompt.Prompted(table.base, values, table.scale)
    return params | {"embed": {"embedding": table}}

  module = models.Transformer(ours.config)
  got = apply(module, view(values), batch["tokens"])
  np.testing.assert_allclose(got, logits, rtol=1e-4, atol=1e-4)
  got, new = stepped(through(next_token(module), view), values, batch)
  assert float(got) == pytest.approx(loss, rel=1e-5)
  np.testing.assert_allclose(new[0], moved["embedding.weight"], atol=1e-4)
  assert np.abs(new - values).max() > 1e-3
