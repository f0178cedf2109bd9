"""LoRA on a tiny Llama, against Hugging Face's peft on the same weights."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.attention.multi_head import Attention
from effjax.core import trees
from effjax.layers import MLP, RMSNorm, Rope
from effjax.layers.spec import LayerSpec, TransformerConfig
from effjax.layers.stack import join
from effjax.models.transformer import Transformer
from effjax.peft import lora
from tests.modules import apply

REASON = "peer comparisons run on Python 3.11, which has torch and peft"
torch = pytest.importorskip("torch", reason=REASON)
peft = pytest.importorskip("peft", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)

NAMES = {
  "mixer/query": "self_attn.q_proj",
  "mixer/key": "self_attn.k_proj",
  "mixer/value": "self_attn.v_proj",
  "mixer/out": "self_attn.o_proj",
  "ffn/gate": "mlp.gate_proj",
  "ffn/up": "mlp.up_proj",
  "ffn/down": "mlp.down_proj",
}
TOKENS = np.arange(24).reshape(2, 12) % 50
RANK, ALPHA = 4, 6


def llama():
  torch.manual_seed(0)
  config = transformers.LlamaConfig(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=16,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    tie_word_embeddings=True,
    initializer_range=0.2,
  )
  return transformers.LlamaForCausalLM(config).eval()


def ours():
  attention = Attention(4, kv_heads=2, rope=Rope(1e4))
  layer = LayerSpec(attention, MLP(48, "silu", gated=True))
  return Transformer(TransformerConfig(50, 32, (layer,) * 2, norm=RMSNorm(1e-6), context=16))


def array(tensor):
  return tensor.detach().numpy()


def converted(model, config):
  """The weights of a `LlamaForCausalLM` as a parameter tree."""
  state = model.state_dict()
  vector = lambda name: {"scale": array(state[f"model.{name}.weight"])}

  def layer(i):
    tree = {"mixer": {}, "ffn": {}}
    for path, name in NAMES.items():
      place, leaf = path.split("/")
      tree[place][leaf] = {"kernel": array(state[f"model.layers.{i}.{name}.weight"]).T}
    tree["mixer_norm"] = vector(f"layers.{i}.input_layernorm")
    tree["ffn_norm"] = vector(f"layers.{i}.post_attention_layernorm")
    return tree

  embedding = {"embedding": array(state["model.embed_tokens.weight"])}
  rest = {"embed": embedding, "final_norm": vector("norm")}
  return jax.tree.map(jnp.asarray, join(config, [layer(0), layer(1)], rest))


def factors(wrapped, path, part):
  name = NAMES[path.removeprefix("segments_0/layers_0/").removesuffix("/kernel")]
  state = wrapped.state_dict()
  key = "base_model.model.model.layers.{}.{}.lora_{}.default.weight"
  return jnp.asarray(np.stack([array(state[key.format(i, name, part)]).T for i in range(2)]))


QV, ALL = "mixer/(query|value)/kernel", "(mixer|ffn)/.*kernel"


@pytest.mark.parametrize(
  ("targets", "rs", "dora"),
  [(QV, False, False), (QV, True, False), (ALL, False, False), (ALL, True, True)],
)
def test_logits_and_merged_weights_equal_pefts(targets, rs, dora):
  model, module = llama(), ours()
  params = converted(model, module.config)
  chosen = [name for path, name in NAMES.items() if re.search(targets, f"{path}/kernel")]
  names = [name.rsplit(".", 1)[-1] for name in chosen]
  config = peft.LoraConfig(
    r=RANK, lora_alpha=ALPHA, target_modules=names, use_rslora=rs, use_dora=dora
  )
  wrapped = peft.get_peft_model(model, config).eval()
  for name, tensor in wrapped.named_parameters():
    if "lora_B" in name:
      torch.nn.init.normal_(tensor, std=0.3)

  options = {"rank": RANK, "alpha": ALPHA, "rs": rs, "dora": dora}
  adapted = lora.add(params, jax.random.key(0), targets=targets, **options)
  take = lambda path, w: dataclasses.replace(
    w, a=factors(wrapped, path, "A"), b=factors(wrapped, path, "B")
  )
  adapted = trees.update(adapted, targets, take)

  logits = lambda params: np.asarray(apply(module, params, TOKENS))
  with torch.no_grad():
    expected = wrapped(torch.from_numpy(TOKENS)).logits.numpy()
  assert np.abs(expected - logits(params)).max() > 0.1
  np.testing.assert_allclose(logits(adapted), expected, rtol=1e-3, atol=1e-4)

  merged = converted(wrapped.merge_and_unload(), module.config)
  for path, leaf in trees.items(jax.jit(lora.merge)(adapted)).items():
    np.testing.assert_allclose(leaf, trees.items(merged)[path], rtol=1e-5, atol=1e-5, err_msg=path)


def test_trainable_parameters_are_as_many_as_pefts():
  model, module = llama(), ours()
  params = jax.eval_shape(module.init, jax.random.key(0), jnp.asarray(TOKENS))["params"]
  adapted = jax.eval_shape(lambda p: lora.add(p, jax.random.key(0), rank=RANK), params)
  wrapped = peft.get_peft_model(model, peft.LoraConfig(r=RANK, target_modules=["q_proj", "v_proj"]))
  assert trees.count(adapted) - trees.count(params) == wrapped.get_nb_trainable_parameters()[0]
