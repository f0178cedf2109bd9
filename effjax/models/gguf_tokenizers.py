"""Tokenizers from the metadata of GGUF files.

SmolLM2's GGUF names the pre-tokenizer "smollm". The released tokenizer, and llama.cpp under that
name, set every digit apart before the GPT-2 pattern applies; transformers knows no "smollm" and
applies the GPT-2 pattern alone. As no merge of the vocabulary joins a digit with anything, the
two give the same ids except where two or more spaces stand before a digit: "a   1" ends in
"ĠĠĠ", "1" in the released form and in "ĠĠ", "Ġ", "1" in transformers' form. effjax follows
transformers, whose ids others compare with; `from_gguf(metadata, split="digits")` gives the
released form. SmolLM2-135M prefers that on tables: it takes 11 to 14 % fewer tokens, and 998 nats
against 1015 for aligned columns, 590 against 870 for a calendar; 1210 against 1188 for a list of
indented integers.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers as hf
from tokenizers import decoders, normalizers, pre_tokenizers

from effjax.models.families.fields import Fields
from effjax.models.model import TokenIds
from effjax.models.tokenizer_fields import around
from effjax.models.tokenizers import SPLITS, PretrainedTokenizer, built, byte_level

CONTROL, USER_DEFINED = 3, 4
PREFIX = "tokenizer.ggml."
LONGEST_TOKEN = 10_000
# Splits of vocabularies that begin texts with <bos> unless the file says otherwise.
BEGINNING = ("llama-bpe", "llama3", "llama-v3", "tekken")
DEFAULTS = {
  "merges": None,
  "scores": None,
  "token_type": None,
  "pre": "default",
  "add_space_prefix": None,
  "add_bos_token": None,
  "add_eos_token": False,
}


def from_gguf(
  metadata: Mapping[str, Any], split: str | None = None, where: str = "GGUF"
) -> PretrainedTokenizer:
  """The tokenizer that GGUF metadata describe.

  Args:
    metadata: `GGUFFile.metadata`.
    split: how byte-level BPE cuts text into words, one of `SPLITS`; None takes what the file
      names.
    where: what errors begin with.

  Raises:
    ValueError: for a kind of tokenizer that is not supported, for metadata that are missing or
      damaged, and for those that would change the ids and are not known.
  """
  kind = metadata.get(f"{PREFIX}model")
  if not isinstance(kind, str) or kind not in GGUF_KINDS:
    raise ValueError(f"{where}: GGUF tokenizer {kind!r}; allowed: {', '.join(GGUF_KINDS)}")
  fields, template = _fields(metadata, where), metadata.get("tokenizer.chat_template")
  fields.unused("model", "token_type_count")
  fields.need("add_sep_token", False, None)
  fields.need("remove_extra_whitespaces", False, None)
  tokens = fields.items("tokens", (str,))
  if not tokens or max(map(len, tokens)) > LONGEST_TOKEN:
    raise fields.wrong("tokens", f"a list of tokens of up to {LONGEST_TOKEN} characters")
  ids = {role: _id(fields, f"{role}_token_id", len(tokens)) for role in ROLES}
  architecture = metadata.get("general.architecture", "")
  backend, begins = GGUF_KINDS[kind](fields, tokens, ids["unknown"], split, architecture)
  marks = fields.items("token_type", (int,), len(tokens)) or ()
  _add_marked(backend, tokens, marks, kind == "gpt2")
  begins = begins if fields.raw("add_bos_token") is None else fields.flag("add_bos_token")
  before = _token(fields, tokens, ids["bos"], begins, "add_bos_token")
  after = _token(fields, tokens, ids["eos"], fields.flag("add_eos_token"), "add_eos_token")
  backend.post_processor = around(backend, before, after)
  fields.finish(())
  if template is not None and not isinstance(template, str):
    raise ValueError(f"{where}: metadata tokenizer.chat_template; allowed: text")
  return PretrainedTokenizer(backend, ids["bos"], ids["eos"], ids["padding"], template)


ROLES = ("bos", "eos", "padding", "unknown")


def token_ids(metadata: Mapping[str, Any], where: str = "GGUF") -> TokenIds:
  """The ids that begin, end and fill sequences: a text ends at the end of a turn, too."""
  fields = _fields(metadata, where)
  one = lambda role: next(iter(fields.ids(f"{role}_token_id")), None)
  ends = dict.fromkeys(one(role) for role in ("eos", "eot", "eom"))
  return TokenIds(one("bos"), tuple(x for x in ends if x is not None), one("padding"))


def _fields(metadata: Mapping[str, Any], where: str) -> Fields:
  """What begins with `PREFIX`, without it; names of special tokens that nobody needs left out."""
  named = {k.removeprefix(PREFIX): v for k, v in metadata.items() if k.startswith(PREFIX)}
  needed = {f"{role}_token_id" for role in (*ROLES, "eot", "eom")}
  special = re.compile(r"\w+_token_ids?")
  values = {k: v for k, v in named.items() if k in needed or not special.fullmatch(k)}
  return Fields(f"{where}: tokenizer", values, DEFAULTS, noun="metadata")


def _id(fields: Fields, name: str, count: int) -> int | None:
  found = fields.ids(name)
  if any(not 0 <= token < count for token in found):
    raise fields.wrong(name, f"0 to {count - 1}")
  return next(iter(found), None)


def _token(
  fields: Fields, tokens: Sequence[str], number: int | None, added: bool, flag: str
) -> str | None:
  """The token that stands at an end of each text, None where none shall."""
  if added and number is None:
    raise fields.wrong(flag, "false where there is no such token")
  return tokens[number] if added and number is not None else None


def sentencepiece(tokens: Sequence[str], unknown: str | None) -> hf.Tokenizer:
  """Gemma's SentencePiece BPE with byte fallback.

  The file holds no merges. They are every pair of tokens that joins to a token, those of earlier
  tokens first, the longest left part first. Runs of spaces are spelled with spaces in the file
  and with "▁" in text.
  """
  tokens = ["▁" * len(t) if " " in t and not t.strip() else t for t in tokens]
  backend = _fallback(tokens, _joins(tokens), unknown)
  backend.normalizer = normalizers.Replace(" ", "▁")
  backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
  backend.decoder = decoders.Sequence(_plain_text())
  return backend


def scored(
  tokens: Sequence[str], scores: Sequence[float], unknown: str | None, prefix: bool = True
) -> hf.Tokenizer:
  """Llama's SentencePiece BPE with byte fallback: pairs join in the order of the scores.

  Args:
    tokens: the vocabulary, "▁" for a space.
    scores: of each token; the pair that joins to the best one goes first.
    unknown: the token for what is not in it.
    prefix: whether a space stands before each text.
  """
  number = {token: i for i, token in enumerate(tokens)}
  rank = lambda pair: (scores[number["".join(pair)]], *map(len, pair))
  in_order = sorted(_joins(tokens), key=lambda p: (number["".join(p)], number[p[0]], number[p[1]]))
  backend = _fallback(tokens, sorted(in_order, key=rank, reverse=True), unknown)
  scheme = "first" if prefix else "never"
  backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
  strip = [decoders.Strip(" ", left=1)] if prefix else []
  backend.decoder = decoders.Sequence([*_plain_text(), *strip])
  return backend


def _joins(tokens: Sequence[str]) -> list[tuple[str, str]]:
  """Every pair of tokens that joins to a token, the longest left part first."""
  vocab = set(tokens)
  return [
    (token[:cut], token[cut:])
    for token in tokens
    for cut in range(len(token) - 1, 0, -1)
    if token[:cut] in vocab and token[cut:] in vocab
  ]


def _fallback(
  tokens: Sequence[str], merges: Sequence[tuple[str, str]], unknown: str | None
) -> hf.Tokenizer:
  vocab = {token: i for i, token in enumerate(tokens)}
  options = {"unk_token": unknown, "fuse_unk": True, "byte_fallback": True}
  return hf.Tokenizer(hf.models.BPE(vocab, list(merges), **options))


def _plain_text() -> list:
  return [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]


def _gguf_byte_level(
  fields: Fields, tokens: Sequence[str], unknown: int | None, split: str | None, architecture: str
) -> tuple[hf.Tokenizer, bool]:
  merges = fields.items("merges", (str,))
  if merges is None or not all(len(merge.split(" ")) == 2 for merge in merges):
    raise fields.wrong("merges", "a list of pairs, each two tokens and a space between")
  fields.unused("scores")
  fields.need("add_space_prefix", None, False)
  named = fields.text("pre") if split is None else split
  fields.unused("pre")
  if named not in SPLITS:
    raise ValueError(f"{fields.where}: split={named!r}; allowed: {', '.join(SPLITS)}")
  pairs = [tuple(merge.split(" ")) for merge in merges]
  vocab = {token: i for i, token in enumerate(tokens)}
  make = lambda: byte_level(vocab, pairs, named, whole=named in BEGINNING)
  return built(fields.where, make), named in BEGINNING


def _gguf_sentencepiece(
  fields: Fields, tokens: Sequence[str], unknown: int | None, split: str | None, architecture: str
) -> tuple[hf.Tokenizer, bool]:
  if split is not None:
    raise ValueError(f"split={split!r}; allowed: None for a SentencePiece tokenizer")
  fields.unused("pre", "merges")
  token = None if unknown is None else tokens[unknown]
  # SentencePiece files without a flag are older than it, and want <bos> and the space.
  if architecture.startswith("gemma"):
    fields.need("add_space_prefix", None, False)
    fields.unused("scores")
    return built(fields.where, lambda: sentencepiece(tokens, token)), True
  scores = fields.items("scores", (float,), len(tokens))
  if scores is None:
    raise fields.wrong("scores", "one for each token")
  prefix = fields.raw("add_space_prefix")
  prefix = True if prefix is None else fields.flag("add_space_prefix")
  return built(fields.where, lambda: scored(tokens, scores, token, prefix)), True


GGUF_KINDS = {"gpt2": _gguf_byte_level, "llama": _gguf_sentencepiece}


def _add_marked(
  backend: hf.Tokenizer, tokens: Sequence[str], marks: Sequence[int], bytes_only: bool
) -> None:
  # In a byte-level vocabulary a control token outside the byte alphabet is a mislabelled one.
  alphabet = set(pre_tokenizers.ByteLevel.alphabet()) if bytes_only else None
  spelled = lambda token: alphabet is None or set(token) <= alphabet
  vocab = backend.get_vocab()
  plain = lambda token, special: hf.AddedToken(token, normalized=False, special=special)
  marked = list(zip(tokens, marks, strict=False))
  control = [t for t, mark in marked if mark == CONTROL and spelled(t)]
  user = [t for t, mark in marked if mark == USER_DEFINED and t in vocab]
  backend.add_special_tokens([plain(token, True) for token in control])
  backend.add_tokens([plain(token, False) for token in user])
