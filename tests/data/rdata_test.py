import gzip
import struct
import zlib

import pytest

from effjax.data.rdata import read_package_data


def number(value):
  return struct.pack(">i", value)


def characters(text):
  return number(0x00040009) + number(len(text.encode())) + text.encode()


def strings(values):
  return number(16) + number(len(values)) + b"".join(map(characters, values))


def named_list(names, values, first=False):
  """A list whose attribute "names" is a pairlist; the symbol is written once, then referred to."""
  symbol = number(1) + characters("names") if first else number(0x1FF)
  attributes = number(0x402) + symbol + strings(names) + number(254)
  return number(19 | 512) + number(len(values)) + b"".join(values) + attributes


def integers(*values):
  return number(13) + number(len(values)) + b"".join(map(number, values))


HEADER = b"X\n" + number(3) + number(0x40201) + number(0x30500) + number(5) + b"UTF-8"


def package(folder, value, compress=zlib.compress):
  stored = number(len(HEADER + value)) + compress(HEADER + value)
  variables = named_list(["book"], [integers(0, len(stored))], first=True)
  index = HEADER + named_list(["variables", "compressed"], [variables, integers(1)])
  (folder / "Rdata.rdb").write_bytes(stored)
  (folder / "Rdata.rdx").write_bytes(gzip.compress(index))
  return folder / "Rdata.rdx"


def test_character_vectors_are_read(tmp_path):
  assert read_package_data(package(tmp_path, strings(["Emma", "", "é"]))) == {
    "book": ["Emma", "", "é"]
  }


@pytest.mark.parametrize(
  "value, message",
  [
    (number(16) + number(5) + characters("a"), "ends early"),
    (number(25), "type 25 is not supported"),
  ],
)
def test_what_cannot_be_read_is_refused(tmp_path, value, message):
  with pytest.raises(ValueError, match=message):
    read_package_data(package(tmp_path, value))


def test_other_compressions_and_formats_are_refused(tmp_path):
  with pytest.raises(ValueError, match="bzip2 or xz"):
    read_package_data(package(tmp_path, strings([]), lambda data: b"Z" + data))
  (tmp_path / "bad.rdx").write_bytes(gzip.compress(b"RDX3 something else"))
  (tmp_path / "bad.rdb").write_bytes(b"")
  with pytest.raises(ValueError, match="must start with 'X'"):
    read_package_data(tmp_path / "bad.rdx")
