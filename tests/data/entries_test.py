"""Entries cut out of texts laid out as the packages' are; near duplicates beside all pairs."""

import itertools
import re

import numpy as np
import pytest

from effjax.data import debian, entries, pairs
from effjax.data.corpus import Document
from effjax.data.entries import Entry
from effjax.data.unlike import unlike
from tests.entries import store

FOLDOC = """woman

   <tool> A replacement for the Unix man browsing command.  Version 1.157
   of woman runs under many systems.

   (1999-01-15)
"""
MANUAL = """NAME
getent - get entries

SO_PEERSEC
This option returns the security context of the peer.
By default, this is the same as
that of the process.

This line, which is none,
is not the name of anything.  It is the text of it, going on.
"""
HEADED = """8.10.2. Getting the Sources

The sources are available in a package. To retrieve them, install it.

This is text.

It has more than a sentence. But its head is no heading.

# apt install

The command installs a package at once. Its name does not begin with a word.
"""


def texts(domain, text):
  found = entries.cut(Document(domain, "title", text))
  return [entry.texts for entry in found]


def test_wordnet():
  text = 'duress, force: compulsory force or threat; "confessed under duress"; "by force or not"\n'
  assert texts("wordnet", text) == [
    ("duress, force", "compulsory force or threat", "confessed under duress")
  ]
  assert texts("wordnet", "duress: compulsory force or threat\n") == []


def test_foldoc():
  found = (
    "woman", "A replacement for the Unix man browsing command.",
    "Version 1.157 of woman runs under many systems.",
  )  # fmt: skip
  assert texts("foldoc", FOLDOC) == [found]
  assert texts("foldoc", FOLDOC.replace("<tool> ", "1. <tool> ")) == []


def test_manuals_and_headed_sections():
  found = (
    "SO_PEERSEC", "This option returns the security context of the peer.",
    "By default, this is the same as that of the process.",
  )  # fmt: skip
  assert texts("manpages", MANUAL) == [found]
  found = (
    "Getting the Sources", "The sources are available in a package.",
    "To retrieve them, install it.",
  )  # fmt: skip
  for domain in ("python3.11-doc", "debian-handbook", "debian-handbook/fr-FR"):
    assert texts(domain, HEADED) == [found]


def test_parts_that_are_too_short_or_long_make_no_entry():
  text = 'a{}: a definition of the word{}; "an example that is long enough{}"'
  assert len(texts("wordnet", text.format("b", "", ""))) == 1
  for wrong in (("", "", ""), ("b", "x" * 300, ""), ("b", "", "x" * 300), ("b" * 80, "", "")):
    assert not texts("wordnet", text.format(*wrong))


def entry(name, definition, detail, domain="a", split="train"):
  return Entry(domain, "1", name, definition, detail, split)


def test_names_are_one_entrys_alone():
  one, two = entry("Run", "move fast", "She runs"), entry("run", "a score in cricket", "Two runs")
  other = entry("run", "to execute a program", "Run it", domain="b")
  assert entries.distinct([one, two, other]) == (other,)
  assert entries.distinct([one, one]) == (one,)


def test_near_duplicates_are_found_as_by_comparing_all():
  rng = np.random.default_rng(0)
  items = [
    [" ".join(rng.choice(list("abcdefghij"), rng.integers(1, 7))) for _ in range(2)]
    for _ in range(300)
  ]
  sets = lambda item: [set(re.findall(r"\w+", text)) for text in item]
  near = lambda a, b: len(a & b) / len(a | b) >= 0.8
  kept: list[int] = []
  for place, item in enumerate(items):
    before = [x for other in kept for x in sets(items[other])]
    pairs_of = itertools.product(sets(item), before)
    if not near(*sets(item)) and not any(near(a, b) for a, b in pairs_of):
      kept.append(place)
  assert unlike(items) == kept and 10 < len(kept) < 200
  assert unlike([["…"], ["!"], ["…"]]) == [0, 1]


@pytest.fixture
def stored(cache):
  return store(cache)


def test_documents_are_in_one_split(stored):
  found = entries.read("wordnet", "manpages")
  assert len(found) == 400 and found == entries.read("wordnet", "manpages")
  splits: dict[tuple[str, str], set[str]] = {}
  for each in found:
    splits.setdefault((each.domain, each.title), set()).add(each.split)
  assert len(splits) == 240 and all(len(split) == 1 for split in splits.values())
  share = np.mean([each.split == "validation" for each in found])
  assert 0.1 < share < 0.3
  more = entries.choose(entries.read("wordnet", held_out=0.5), split="validation")
  few = entries.choose(found, domain="wordnet", split="validation")
  assert set(few) < set(more) and 70 < len(more) < 130


def test_a_limit_takes_a_part_of_what_a_larger_one_takes(stored):
  found = entries.read("manpages")
  ten, twenty = (entries.choose(found, split="train", limit=n) for n in (10, 20))
  assert len(ten) == 10 and ten == twenty[:10] and ten != found[:10]
  assert len(entries.choose(found, limit=10_000)) == len(found)


def test_bad_input_is_named(stored):
  for message, call in {
    r"domain 'austen' has no entries; allowed: wordnet, foldoc": lambda: entries.read("austen"),
    r"domains \(none\)": entries.read,
    r"domains wordnet, wordnet": lambda: entries.read("wordnet", "wordnet"),
    r"held_out": lambda: entries.read("wordnet", held_out=1.0),
    r"split 'test' is unknown": lambda: entries.choose([], split="test"),
    r"no entry has domain='b'": lambda: entries.choose([entry("x", "y", "z")], domain="b"),
    r"limit 0": lambda: entries.choose([entry("x", "y", "z")], limit=0),
    r"task 'nothing'; allowed: define": lambda: pairs.of([], "nothing"),
    r"allowed: two or more of each": lambda: pairs.diagonal(["a"], ["define", "name"]),
  }.items():
    with pytest.raises(ValueError, match=message):
      call()


def test_without_the_package_it_is_said_what_to_do(cache, monkeypatch):
  monkeypatch.setattr(debian.shutil, "which", lambda name: None)
  with pytest.raises(FileNotFoundError, match=r"dict-foldoc.*put the package's \.deb"):
    entries.read("foldoc")


def test_pairs_are_parts_of_one_entry():
  given = [entry("x", "what x is", "more of x"), entry("y", "what y is", "more of y")]
  for task, (asks, answers) in pairs.TASKS.items():
    for each, pair in zip(given, pairs.of(given, task), strict=True):
      assert (pair.query, pair.document) == (getattr(each, asks), getattr(each, answers))
      assert sorted((pair.query, pair.document, *pair.others)) == sorted(each.texts)
      assert (pair.domain, pair.task) == ("a", task)
  assert set(pairs.pool(given)) == {text for each in given for text in each.texts}


def test_diagonals_hold_every_combination_out_once():
  domains, tasks = ["a", "b", "c"], ["define", "expand", "name"]
  held = [pairs.diagonal(domains, tasks, shift) for shift in range(3)]
  assert sorted(x for each in held for x in each) == sorted(itertools.product(domains, tasks))
  for each in held:
    assert {domain for domain, _ in each} == set(domains) and {task for _, task in each} == {*tasks}
  assert len(pairs.diagonal("abcde", tasks)) == 5  # more domains than tasks
