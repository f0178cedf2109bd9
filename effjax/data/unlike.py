"""Texts that are not nearly equal to others, found exactly without comparing all with all."""

import collections
import math
import re
from collections.abc import Iterable, Sequence

ALIKE = 0.8


def unlike(items: Sequence[Sequence[str]]) -> list[int]:
  """The places of the items of which no text is nearly equal to one before, or to another of it.

  Two texts are nearly equal when |A ∩ B| ≥ 0.8 |A ∪ B| for their sets of words. Then they share
  one of the |A| − ⌈0.8 |A|⌉ + 1 rarest words of either, by which such texts are found (Chaudhuri
  et al., "A primitive operator for similarity joins", 2006). What is left out hides nothing.

  Args:
    items: each with one or more texts.

  Example:
    >>> unlike([["One two three four five."], ["Five, four; THREE two: one!"], ["Six, seven."]])
    [0, 2]
  """
  words = [[set(_words(text)) for text in item] for item in items]
  often = collections.Counter(word for item in words for text in item for word in text)
  seen: dict[str, list[set[str]]] = {}
  kept = []
  for place, item in enumerate(words):
    found: dict[str, list[set[str]]] = {}
    for text in item:
      rare = _rarest(text, often)
      if any(_alike(text, x) for word in rare for of in (seen, found) for x in of.get(word, ())):
        break
      for word in rare:
        found.setdefault(word, []).append(text)
    else:
      kept.append(place)
      for word, texts in found.items():
        seen.setdefault(word, []).extend(texts)
  return kept


def _words(text: str) -> Iterable[str]:
  """Words, or where there are none the text itself."""
  return re.findall(r"\w+", text.casefold()) or [text]


def _rarest(words: set[str], often: collections.Counter[str]) -> list[str]:
  """The words of which any nearly equal text has one."""
  count = len(words) - math.ceil(ALIKE * len(words)) + 1
  return sorted(words, key=lambda word: (often[word], word))[:count]


def _alike(a: set[str], b: set[str]) -> bool:
  return len(a & b) >= ALIKE * len(a | b)
