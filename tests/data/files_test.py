"""Files of other people: lines, marks, names, and what is held out."""

import json
import os

import pytest

from effjax.data import split_of, text
from effjax.data.batches import domain_rows
from effjax.data.tokenizers import ByteTokenizer

CUTS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"  # where str.splitlines cuts too


def _splits(corpus):
  found = {"train": "", "validation": ""}
  for document in corpus:
    found[split_of(document)] += document.text
  return found


def test_json_lines_end_at_line_feeds_alone(tmp_path):
  written = [f"one {CUTS[:3]} two", "three"]
  lines = [json.dumps({"text": each}, ensure_ascii=False) for each in written]
  (tmp_path / "a.jsonl").write_bytes(("\ufeff" + "\r\n\r\n".join(lines) + "\r\n").encode())
  corpus = text(f"path:{tmp_path}")
  assert [d.text for d in corpus] == ["one \u2028\u2029\x85 two\n", "three\n"]
  assert [d.title for d in corpus] == ["a.jsonl:1", "a.jsonl:3"]


@pytest.mark.parametrize("cut", CUTS)
def test_an_error_names_the_line_that_an_editor_shows(tmp_path, cut):
  good = json.dumps({"text": f"a{cut}b"}, ensure_ascii=False)
  (tmp_path / "a.jsonl").write_text(f'{good}\n{good}\n{{"text": 1}}\n')
  with pytest.raises(ValueError, match=r"a\.jsonl, line 3|a\.jsonl, line 1 is not JSON.*control"):
    text(f"path:{tmp_path}")


@pytest.mark.parametrize(
  "line",
  [
    '{"text": "a"} {"text": "b"}',
    "[" * 100_000,
    '{"text": "a", "n": ' + "1" * 5000 + "}",
    '{"text": "\\ud800"}',
    "null",
    '{"text": null}',
    "\ufeff{}",
  ],
)
def test_a_bad_line_is_named(tmp_path, line):
  (tmp_path / "a.jsonl").write_text(f'{{"text": "first"}}\n{line}\n')
  with pytest.raises(ValueError, match=r"a\.jsonl, line 2"):
    text(f"path:{tmp_path}")


def test_a_byte_order_mark_is_no_text(tmp_path):
  for name in ("a.txt", "b.html", "c.py"):
    (tmp_path / name).write_bytes(b"\xef\xbb\xbfwords " + name.encode())
  assert all(d.text.startswith("words") for d in text(f"path:{tmp_path}"))


@pytest.mark.parametrize("mark", [b"\xff\xfe", b"\xfe\xff"])
def test_another_encoding_is_named(tmp_path, mark):
  (tmp_path / "a.txt").write_bytes(mark + "hello".encode("utf-16-le"))
  with pytest.raises(ValueError, match=r"a\.txt is not UTF-8 text: byte 0"):
    text(f"path:{tmp_path}")


def test_endings_in_capitals_are_read_as_what_they_are(tmp_path):
  (tmp_path / "A.TXT").write_text("plain")
  (tmp_path / "B.JSONL").write_text('{"text": "record"}\n')
  assert [d.text for d in text(f"path:{tmp_path}")] == ["plain\n", "record\n"]
  assert [d.text for d in text(f"path:{tmp_path}/B.JSONL")] == ["record\n"]


def test_a_name_that_is_no_text_is_replaced(tmp_path):
  path = os.fsencode(tmp_path) + b"/caf\xe9.txt"
  try:
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
  except OSError:
    pytest.skip("this disk refuses the name")
  with open(path, "w") as file:
    file.write("coffee")
  (document,) = text(f"path:{tmp_path}")
  assert document.title == "caf\ufffd.txt" and text(f"path:{tmp_path}").fingerprint


def _write_five(folder, words=300):
  whole = {}
  for name in "abcde":
    content = "".join(f"{name} line {i} of this file\n" for i in range(words))
    (folder / f"{name}.txt").write_text(content)
    whole[name] = content
  return whole


def test_five_files_give_both_splits_text_and_lose_nothing(tmp_path):
  whole = _write_five(tmp_path)
  corpus = text(f"path:{tmp_path}")
  found = _splits(corpus)
  assert 0.04 < len(found["validation"]) / corpus.nbytes < 0.06
  assert all(f"{name} line 299" in found["validation"] for name in whole)
  together = "".join(sorted("".join(found.values()).splitlines(keepends=True)))
  assert together == "".join(sorted("".join(whole.values()).splitlines(keepends=True)))
  for split in found:
    assert domain_rows(corpus, ByteTokenizer(), length=128, split=split)


@pytest.mark.parametrize(
  "content", ["word " * 60, "x" * 300, "\n".join("ab" * 9 for _ in "abcdefgh")]
)
def test_one_small_file_gives_both_splits_text(tmp_path, content):
  (tmp_path / "one.txt").write_text(content)
  for source in (f"path:{tmp_path}", f"path:{tmp_path}/one.txt"):
    found = _splits(text(source))
    assert found["train"] + found["validation"] == content.strip() + "\n" or " \n" not in content
    assert len(found["train"]) > 5 * len(found["validation"]) > 0


def test_texts_too_short_to_cut_are_held_out_whole(tmp_path):
  for name in "abc":
    (tmp_path / f"{name}.txt").write_text(name)
  found = _splits(text(f"path:{tmp_path}"))
  assert (len(found["train"]), len(found["validation"])) == (4, 2)


def test_a_json_lines_file_gives_both_splits_text(tmp_path):
  records = [json.dumps({"text": f"record {i} " * 60}) for i in range(3)]
  (tmp_path / "a.jsonl").write_text("\n".join(records))
  found = _splits(text(f"path:{tmp_path}/a.jsonl"))
  assert len(found["train"]) > len(found["validation"]) > 30


@pytest.mark.parametrize("share", [0.5, 0.2, 0.0])
def test_a_share_can_be_asked_for(tmp_path, share):
  _write_five(tmp_path)
  corpus = text(f"path:{tmp_path}?validation={share}")
  found = _splits(corpus)
  assert abs(len(found["validation"]) / corpus.nbytes - share) < 0.25
  assert bool(found["validation"]) == (share > 0)


def test_validation_text_can_lie_in_files_of_its_own(tmp_path):
  (tmp_path / "held").mkdir()
  _write_five(tmp_path)
  (tmp_path / "held" / "x.txt").write_text("held out")
  inside = text(f"path:{tmp_path}?validation={tmp_path}/held")
  assert _splits(inside)["validation"] == "held out\n"
  assert "held out" not in _splits(inside)["train"] and len(inside) == 6


@pytest.mark.parametrize("option", ["1.0", "-0.1", "nan"])
def test_a_share_out_of_range_is_named(tmp_path, option):
  _write_five(tmp_path, 2)
  with pytest.raises(ValueError, match=f"validation={option}; allowed: from 0, below 1"):
    text(f"path:{tmp_path}?validation={option}")
