"""A cache folder of its own for every test, and a small corpus of two domains."""

import pytest

from effjax.data.corpus import Corpus, Document


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("EFFJAX_CACHE", str(tmp_path / "cache"))
  return tmp_path / "cache"


@pytest.fixture(scope="session")
def corpus():
  """120 documents of lengths from 3 to about 190 bytes; every text says which it is."""
  documents = [
    Document(domain, str(number), f"{domain} {number} " + "abcdefg " * (number * 7 % 23))
    for domain in ("left", "right")
    for number in range(60)
  ]
  return Corpus("two", tuple(documents))
