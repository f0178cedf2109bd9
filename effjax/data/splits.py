"""Validation text where documents are too few for whole ones to be drawn."""

import dataclasses

from effjax.data.corpus import SPLITS, Corpus, Document, fraction, split_of


def divide(corpus: Corpus, share: float) -> Corpus:
  """`corpus` with a share of its text in the split "validation".

  Documents are drawn by the hash of their names. Where that leaves a split without any, each
  document is cut, its end being held out: at a line end near the place, at a blank, or there.
  Where they are too short for that, one document is held out, and of a single one nothing.

  Example:
    >>> corpus = divide(Corpus("one", [Document("a", "1", "word " * 40)]), 0.1)
    >>> [(split_of(document), len(document.text)) for document in corpus]
    [('train', 180), ('validation', 20)]
  """
  drawn = [_into(d, "validation" if fraction(d) < share else "train") for d in corpus]
  if share == 0 or {split_of(document) for document in drawn} == {*SPLITS}:
    return Corpus(corpus.name, tuple(drawn))
  parts = [part for document in corpus for part in _cut(document, share)]
  if "validation" in map(split_of, parts):
    return Corpus(corpus.name, tuple(parts))
  lowest = min(corpus, key=fraction) if len(corpus) > 1 else None
  chosen = (_into(d, "validation" if d is lowest else "train") for d in corpus)
  return Corpus(corpus.name, tuple(chosen))


def _into(document: Document, split: str) -> Document:
  return dataclasses.replace(document, split=split)


def _cut(document: Document, share: float) -> list[Document]:
  """A document as its start, to train on, and its end; whole where one would be empty."""
  text = document.text
  place = _place(text, share)
  start, end = text[:place], text[place:]
  if not (start.strip() and end.strip()):
    return [_into(document, "train")]
  held_out = dataclasses.replace(document, title=f"{document.title}#end", text=end)
  return [_into(dataclasses.replace(document, text=start), "train"), _into(held_out, "validation")]


def _place(text: str, share: float) -> int:
  """Where the last `share` of a text begins, moved by up to half of it."""
  place, reach = int(len(text) * (1 - share)), int(len(text) * min(share, 1 - share) / 2)
  first, last = place - reach, place + reach
  for boundary in "\n ":
    before, after = text.rfind(boundary, first, place) + 1, text.find(boundary, place, last) + 1
    near = [at for at in (before, after) if at]
    if near:
      return min(near, key=lambda at: abs(at - place))
  return place
