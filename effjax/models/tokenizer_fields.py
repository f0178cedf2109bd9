"""What tokenizer_config.json and its like say about a tokenizer, applied to its backend."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import tokenizers as hf
from tokenizers import normalizers, processors

from effjax.models.families import harmless
from effjax.models.families.fields import Fields
from effjax.models.folders import Folder

ROLES = {
  "bos_token": ("bos_token", "cls_token"),
  "eos_token": ("eos_token", "sep_token"),
  "pad_token": ("pad_token",),
}
# Classes that take a tokenizer.json as it is.
GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")
FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")
DEFAULTS = {"tokenizer_class": None, "chat_template": None} | dict.fromkeys(
  (
    "add_bos_token",
    "add_eos_token",
    "add_prefix_space",
    "do_lower_case",
    "strip_accents",
    "tokenize_chinese_chars",
  )
)


def of_folder(files: Folder) -> tuple[Fields, dict[str, Any]]:
  """The fields of special_tokens_map.json and tokenizer_config.json, as such and as they stand."""
  names = ("special_tokens_map.json", "tokenizer_config.json")
  found: dict[str, Any] = {}
  for name in names:
    found |= files.json(name) if files.has(name) else {}
  return Fields(str(files.file(names[1])), found, DEFAULTS), found


def of_class(fields: Fields, files: Folder, make: Callable[[str], hf.Tokenizer]) -> hf.Tokenizer:
  """Byte-level BPE as the class that the fields name has it; `make` takes the name of a split."""
  said = fields.text("tokenizer_class", null=True)
  if said is None and files.has("config.json"):
    said = CLASS_OF_MODEL.get(str(files.json("config.json").get("model_type")))
  name = (said or "GPT2Tokenizer").removesuffix("Fast")
  if name not in CLASSES:
    raise fields.wrong("tokenizer_class", ", ".join(CLASSES))
  return CLASSES[name](fields, make)


def _gpt2(fields: Fields, make: Callable[[str], hf.Tokenizer]) -> hf.Tokenizer:
  backend = make("gpt-2")
  _assume(fields, backend, dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"))
  return backend


def _roberta(fields: Fields, make: Callable[[str], hf.Tokenizer]) -> hf.Tokenizer:
  backend = make("gpt-2")
  names = {"bos": "<s>", "eos": "</s>", "sep": "</s>", "cls": "<s>", "unk": "<unk>"}
  names |= {"pad": "<pad>", "mask": "<mask>"}
  _assume(fields, backend, {f"{role}_token": token for role, token in names.items()})
  ends = [content(fields, name) for name in ("cls_token", "sep_token")]
  backend.post_processor = around(backend, *ends)
  return backend


def _qwen2(fields: Fields, make: Callable[[str], hf.Tokenizer]) -> hf.Tokenizer:
  backend = make("qwen2")
  backend.normalizer = normalizers.NFC()
  _assume(fields, backend, dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"))
  return backend


CLASSES = {"GPT2Tokenizer": _gpt2, "RobertaTokenizer": _roberta, "Qwen2Tokenizer": _qwen2}
CLASS_OF_MODEL = {
  "roberta": "RobertaTokenizer",
  "qwen2": "Qwen2Tokenizer",
  "qwen3": "Qwen2Tokenizer",
}


def _assume(fields: Fields, backend: hf.Tokenizer, names: Mapping[str, str]) -> None:
  """The special tokens that a class has where the fields name none."""
  fields.assume({k: v for k, v in names.items() if backend.token_to_id(v) is not None})


def apply(backend: hf.Tokenizer, fields: Fields, files: Folder, whole: bool) -> None:
  """Changes `backend` as the fields and added_tokens.json say.

  Where `whole`, it is from a tokenizer.json, which says itself what stands around a text.

  Raises:
    ValueError: for fields of a wrong type, for added tokens whose ids cannot be had, and for fields
      that are not known.
  """
  _add_tokens(backend, fields, files)
  _change_normalizer(backend, fields)
  _change_prefix(backend, fields)
  flags = ("add_bos_token", "add_eos_token")
  if not whole and any(name in fields for name in flags):
    ends = [_end(fields, name) for name in flags]
    backend.post_processor = around(backend, *ends)
  fields.need("do_basic_tokenize", True, None)
  fields.need("never_split", None, [])
  if fields.need("split_special_tokens", False, True, None):
    backend.encode_special_tokens = True
  fields.unused("tokenizer_class", "chat_template", *flags)
  fields.finish(
    {*harmless.TOKENIZER, *(name for name in fields.names() if name.endswith("_token_id"))}
  )


def _end(fields: Fields, name: str) -> str | None:
  """The token that stands at an end of each text, None where none shall."""
  if name not in fields or not fields.flag(name):
    fields.unused(name)
    return None
  token = content(fields, name.removeprefix("add_"))
  if token is None:
    raise fields.wrong(name, f"false where there is no {name.removeprefix('add_')}")
  return token


def around(
  backend: hf.Tokenizer, before: str | None, after: str | None
) -> processors.TemplateProcessing:
  """The post-processor that puts the given special tokens around a text.

  Raises:
    ValueError: when one of them is not in the vocabulary.
  """
  parts = [*([before] if before else []), "$A", *([after] if after else [])]
  special = [(token, backend.token_to_id(token)) for token in (before, after) if token]
  missing = [token for token, number in special if number is None]
  if missing:
    raise ValueError(f"token {missing[0]!r} is not in the vocabulary")
  return processors.TemplateProcessing(single=parts, special_tokens=special)


def _add_tokens(backend: hf.Tokenizer, fields: Fields, files: Folder) -> None:
  """Tokens with ids of their own, in the order of these; then those that are named."""
  for number, token in sorted(_numbered(fields, files).items()):
    if backend.token_to_id(token.content) is None:
      (backend.add_special_tokens if token.special else backend.add_tokens)([token])
    if backend.token_to_id(token.content) != number:
      raise ValueError(
        f"{fields.where}: added token {token.content!r} has id {number}, and here it would get "
        f"{backend.token_to_id(token.content)}; allowed: the id that follows the others"
      )
  extra = [
    _token(fields, name, fields.raw(name))
    for name in fields.names()
    if name.endswith("_token") and not name.startswith("add_") and name in fields
  ]
  for name in ("additional_special_tokens", "extra_special_tokens"):
    given = fields.raw(name) if name in fields else []
    given = list(given.values()) if isinstance(given, dict) else given
    if not isinstance(given, list):
      raise fields.wrong(name, "a list of tokens")
    extra += [_token(fields, name, value) for value in given]
  backend.add_special_tokens(extra)


def _numbered(fields: Fields, files: Folder) -> dict[int, hf.AddedToken]:
  """Id → token of `added_tokens_decoder`, else of added_tokens.json."""
  if "added_tokens_decoder" in fields:
    entries = fields.inner("added_tokens_decoder")
    number = lambda name: int(name) if name.isdecimal() and len(name) < 10 else None
    wrong = [name for name in entries.names() if number(name) is None]
    if wrong:
      raise entries.wrong(wrong[0], "ids as names")
    return {
      int(name): _token(entries, name, entries.raw(name), named=False) for name in entries.names()
    }
  fields.unused("added_tokens_decoder")
  if not files.has("added_tokens.json"):
    return {}
  where = str(files.file("added_tokens.json"))
  entries = Fields(where, files.json("added_tokens.json"))
  named = {content(fields, name) for name in fields.names() if name.endswith("_token")}
  return {
    entries.integer(name, least=0): hf.AddedToken(
      name, normalized=name not in named, special=name in named
    )
    for name in entries.names()
  }


def _token(fields: Fields, name: str, value: Any, named: bool = True) -> hf.AddedToken:
  """The token that a field describes, as text or with its flags; `named` ones are special."""
  if isinstance(value, str) and value:
    return hf.AddedToken(value, normalized=False, special=True)
  if not isinstance(value, dict):
    raise fields.wrong(name, "a token")
  given = Fields(f"{fields.where}: {name}", value)
  given.unused("__type")
  content = given.text("content")
  flags = {flag: given.flag(flag) for flag in FLAGS if flag in given}
  given.finish(FLAGS)
  if not content:
    raise fields.wrong(name, "a token that is not empty")
  return hf.AddedToken(content, **(flags | ({"special": True} if named else {})))


def content(fields: Fields, name: str) -> str | None:
  """The text of the token that field `name` holds, as text or as a dictionary; None for another."""
  value = fields.raw(name) if name in fields else None
  value = value.get("content") if isinstance(value, dict) else value
  return value if isinstance(value, str) else None


def _change_normalizer(backend: hf.Tokenizer, fields: Fields) -> None:
  names = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
  }
  given = {ours: fields.flag(name) for name, ours in names.items() if name in fields}
  fields.unused(*names)
  if given and isinstance(backend.normalizer, normalizers.BertNormalizer):
    for name, value in given.items():
      setattr(backend.normalizer, name, value)


def _change_prefix(backend: hf.Tokenizer, fields: Fields) -> None:
  """Whether a space stands before each text: of classes that do not take what is in a file."""
  fields.unused("add_prefix_space")
  if "add_prefix_space" not in fields or fields.raw("tokenizer_class") in GENERIC:
    return
  state = json.loads(backend.to_str())
  steps = state["pre_tokenizer"] or {}
  for step in steps.get("pretokenizers", [steps]):
    if step.get("type") == "ByteLevel":
      step["add_prefix_space"] = fields.flag("add_prefix_space")
  backend.pre_tokenizer = hf.Tokenizer.from_str(
    json.dumps(state | {"model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": []})
  ).pre_tokenizer


def roles(backend: hf.Tokenizer, fields: Fields) -> list[int | None]:
  """The ids that begin, end and fill texts."""

  def number(names: tuple[str, ...]) -> int | None:
    found = (content(fields, name) for name in names)
    token = next((token for token in found if token is not None), None)
    return None if token is None else backend.token_to_id(token)

  return [number(names) for names in ROLES.values()]


def template(fields: Fields, files: Folder) -> str | None:
  """The chat template: a file, a field, or of several in a field the one called "default"."""
  if files.has("chat_template.jinja"):
    return files.text("chat_template.jinja")
  given = fields.raw("chat_template")
  if isinstance(given, list):
    named = [one for one in given if isinstance(one, dict) and one.get("name") == "default"]
    given = named[0].get("template") if named else None
  if given is not None and not isinstance(given, str):
    raise fields.wrong("chat_template", "text")
  return given


def written(
  kept: Mapping[str, Any], named: Mapping[str, str], chat_template: str | None
) -> dict[str, Any]:
  """tokenizer_config.json: what it said before, and the special tokens and template of today."""
  config = {"tokenizer_class": GENERIC[0], **kept}
  for role, token in named.items():
    said = [config.get(name) for name in ROLES[role]]
    said = [one.get("content") if isinstance(one, dict) else one for one in said]
    if token not in said:
      config[role] = token
  return config | ({"chat_template": chat_template} if chat_template else {})
