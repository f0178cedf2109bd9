import struct

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effjax.models.gguf_file import GGUFFile

Q = gguf.GGMLQuantizationType
METADATA = {
  "x.integer": 7,
  "x.text": "héllo",
  "x.real": 0.5,
  "x.flag": True,
  "x.words": ["a", "ü", ""],
  "x.numbers": [1, 2, 3],
}


def write_gguf(path, kinds=(Q.F32,)):
  """A small GGUF by the writer of the gguf package; gives the arrays that went in."""
  writer = gguf.GGUFWriter(path, "test")
  writer.add_uint32("x.integer", 7)
  writer.add_string("x.text", "héllo")
  writer.add_float32("x.real", 0.5)
  writer.add_bool("x.flag", True)
  writer.add_array("x.words", METADATA["x.words"])
  writer.add_array("x.numbers", METADATA["x.numbers"])
  arrays = {}
  for i, kind in enumerate(kinds):
    x = np.random.default_rng(i).standard_normal((6, 512)).astype(np.float32)
    stored = gguf.quants.quantize(x, kind)
    writer.add_tensor(f"t{i}.weight", stored, raw_dtype=kind)
    arrays[f"t{i}.weight"] = gguf.quants.dequantize(stored, kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return arrays


@pytest.fixture(scope="module")
def small(tmp_path_factory):
  path = tmp_path_factory.mktemp("gguf") / "small.gguf"
  return path, write_gguf(path)


def test_metadata_and_tensors_of_every_type(tmp_path):
  path = tmp_path / "x.gguf"
  kinds = (Q.F32, Q.F16, Q.BF16, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q8_0)
  arrays = write_gguf(path, kinds)
  file = GGUFFile(path)
  assert {k: file.metadata[k] for k in METADATA} == METADATA
  assert file.names() == list(arrays)
  for name, value in arrays.items():
    assert file.shape(name) == (6, 512)
    np.testing.assert_array_equal(file.read(name), value)


def test_reads_into_a_transposed_array(small):
  path, arrays = small
  out = np.zeros((512, 6), np.float32)
  GGUFFile(path).read("t0.weight", out.T)
  np.testing.assert_array_equal(out, arrays["t0.weight"].T)


def test_unknown_tensor(small):
  with pytest.raises(ValueError, match=r"'u\.weight' is missing"):
    GGUFFile(small[0]).read("u.weight")


def test_values_that_are_not_finite(small, tmp_path):
  whole = bytearray(small[0].read_bytes())
  whole[-4:] = struct.pack("<f", np.inf)
  (tmp_path / "bad.gguf").write_bytes(whole)
  with pytest.raises(ValueError, match=r"'t0\.weight' holds values that are not finite"):
    GGUFFile(tmp_path / "bad.gguf").read("t0.weight")


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda b: b"GGML" + b[4:], "begins with b'GGML', not b'GGUF'"),
    (lambda b: b[:4] + struct.pack("<I", 9) + b[8:], "GGUF version 9; allowed"),
    (lambda b: b[:-1], "truncated: tensor 't0.weight' ends at byte"),
    (lambda b: b[:100], "truncated or damaged"),
    (lambda b: b[:10], "truncated or damaged"),
    (lambda b: b"", "is empty"),
  ],
)
def test_damage_is_named(small, tmp_path, change, message):
  path = tmp_path / "bad.gguf"
  path.write_bytes(change(small[0].read_bytes()))
  with pytest.raises(ValueError, match=message):
    GGUFFile(path)


def text(value):
  return struct.pack("<Q", len(value)) + value.encode()


def header(pairs=(), tensors=(), body=bytes(64)):
  """A GGUF file of metadata (name, bytes of type and value) and float32 tensors [2] at offsets."""
  start = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs))
  named = b"".join(text(name) + value for name, value in pairs)
  infos = [text(name) + struct.pack("<IQIQ", 1, 2, int(Q.F32), offset) for name, offset in tensors]
  whole = start + named + b"".join(infos)
  return whole + bytes(-len(whole) % 32) + body


NUMBER = struct.pack("<II", 4, 7)
NESTED = struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 10_000
ALIGNED = ("general.alignment", struct.pack("<IQ", 10, 0))


@pytest.mark.parametrize(
  ("whole", "message"),
  [
    (header([("x", NUMBER), ("x", NUMBER)]), "'x' stands twice"),
    (header(tensors=[("t", 0), ("t", 32)]), "'t' stands twice"),
    (header(tensors=[("t", 0), ("u", 0)]), "tensor 'u' overlaps tensor 't'"),
    (header(tensors=[("t", 4)]), "tensor 't' begins at 4, not aligned"),
    (header([("x", NESTED)]), "arrays nested too deeply"),
    (header([ALIGNED]), "general.alignment=0"),
  ],
)
def test_hostile_headers_are_named(whole, message, tmp_path):
  path = tmp_path / "bad.gguf"
  path.write_bytes(whole)
  with pytest.raises(ValueError, match=rf"bad\.gguf: .*{message}"):
    GGUFFile(path)


def test_types_that_cannot_be_dequantised(tmp_path):
  whole = header(tensors=[("t", 0)]).replace(
    struct.pack("<IQIQ", 1, 2, int(Q.F32), 0), struct.pack("<IQIQ", 1, 2, int(Q.I32), 0)
  )
  (tmp_path / "x.gguf").write_bytes(whole)
  with pytest.raises(ValueError, match="tensor 't' is I32; allowed"):
    GGUFFile(tmp_path / "x.gguf").read("t")


def test_missing_file(tmp_path):
  with pytest.raises(FileNotFoundError, match="no such file"):
    GGUFFile(tmp_path / "none.gguf")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_truncation_raises_value_error(small, tmp_path_factory, data):
  whole = small[0].read_bytes()
  path = tmp_path_factory.mktemp("cut") / "x.gguf"
  path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
  with pytest.raises(ValueError, match=r"x\.gguf"):
    GGUFFile(path)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_changed_header_byte_raises_value_error_or_reads(small, tmp_path_factory, data):
  whole = bytearray(small[0].read_bytes())
  header = len(whole) - 6 * 512 * 4
  whole[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
  path = tmp_path_factory.mktemp("flip") / "x.gguf"
  path.write_bytes(whole)
  try:
    file = GGUFFile(path)
    arrays = [file.read(name) for name in file.names()]
  except ValueError as error:
    assert str(path) in str(error)
  else:
    assert all(array.size <= 4 * len(whole) for array in arrays)
