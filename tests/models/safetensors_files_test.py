import json
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from effjax.models.safetensors_files import INDEX, SINGLE, SafetensorsFolder, read_header, write

TENSORS = {
  "a": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
  "b.weight": np.arange(5).astype(ml_dtypes.bfloat16),
  "half": np.full((2, 2), 0.5, np.float16),
  "scalar": np.array(3.0, np.float32),
  "ids": np.arange(4, dtype=np.int64)[None],
  "none": np.zeros((0, 4), np.float32),
}


def folder_with(tmp_path, tensors=TENSORS):
  safetensors.numpy.save_file(tensors, tmp_path / SINGLE)
  return tmp_path


def test_reads_what_safetensors_wrote(tmp_path):
  source = SafetensorsFolder(folder_with(tmp_path))
  assert set(source.names()) == set(TENSORS)
  for name, value in TENSORS.items():
    got = source.read(name)
    assert got.dtype == value.dtype
    assert source.shape(name) == value.shape
    np.testing.assert_array_equal(got, value)


def test_reads_into_a_given_array_of_another_type(tmp_path):
  source = SafetensorsFolder(folder_with(tmp_path))
  out = np.zeros(5, np.float32)
  assert source.read("b.weight", out) is out
  np.testing.assert_array_equal(out, np.arange(5))
  scalar = np.zeros((), np.float32)
  assert source.read("scalar", scalar) == 3.0


def test_safetensors_reads_what_is_written(tmp_path):
  tensors = {k: v for k, v in TENSORS.items() if k != "ids"}
  write(tmp_path / "x", {k: (v.shape, v.dtype, lambda v=v: v) for k, v in tensors.items()})
  got = safetensors.numpy.load_file(tmp_path / "x")
  assert set(got) == set(tensors)
  for name, value in tensors.items():
    np.testing.assert_array_equal(got[name], value)


def test_write_refuses_other_types(tmp_path):
  with pytest.raises(ValueError, match=r"'x' is int32; allowed: float32, float16, bfloat16"):
    write(tmp_path / "x", {"x": ((1,), np.dtype(np.int32), lambda: np.zeros(1))})
  assert not (tmp_path / "x").exists()


def sharded(tmp_path):
  safetensors.numpy.save_file({"a": TENSORS["a"]}, tmp_path / "model-00001-of-00002.safetensors")
  safetensors.numpy.save_file({"b": TENSORS["a"]}, tmp_path / "model-00002-of-00002.safetensors")
  home = {k: f"model-0000{i}-of-00002.safetensors" for i, k in ((1, "a"), (2, "b"))}
  (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": home}))
  return tmp_path


def test_shards_are_one_source(tmp_path):
  source = SafetensorsFolder(sharded(tmp_path))
  assert set(source.names()) == {"a", "b"}
  np.testing.assert_array_equal(source.read("b"), TENSORS["a"])


def test_a_missing_shard_is_named(tmp_path):
  (sharded(tmp_path) / "model-00002-of-00002.safetensors").unlink()
  with pytest.raises(FileNotFoundError, match=r"missing: \['model-00002"):
    SafetensorsFolder(tmp_path)


def test_a_tensor_that_its_shard_lacks_is_named(tmp_path):
  index = json.loads((sharded(tmp_path) / INDEX).read_text())
  index["weight_map"]["c"] = "model-00001-of-00002.safetensors"
  (tmp_path / INDEX).write_text(json.dumps(index))
  with pytest.raises(ValueError, match="'c' is missing in model-00001"):
    SafetensorsFolder(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_damaged_index(tmp_path, text):
  (sharded(tmp_path) / INDEX).write_text(text)
  with pytest.raises(ValueError, match=r"index\.json: damaged"):
    SafetensorsFolder(tmp_path)


def test_a_folder_without_weights(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
    SafetensorsFolder(tmp_path)


def test_unknown_tensor(tmp_path):
  with pytest.raises(ValueError, match="tensor 'zzz' is missing"):
    SafetensorsFolder(folder_with(tmp_path)).read("zzz")


def test_extra_bytes_and_unsupported_types(tmp_path):
  whole = (folder_with(tmp_path) / SINGLE).read_bytes()
  (tmp_path / SINGLE).write_bytes(whole + b"xx")
  with pytest.raises(ValueError, match="2 bytes after the last tensor"):
    read_header(tmp_path / SINGLE)
  header = json.dumps({"x": {"dtype": "F4", "shape": [1], "data_offsets": [0, 1]}}).encode()
  (tmp_path / SINGLE).write_bytes(struct.pack("<Q", len(header)) + header + b"x")
  with pytest.raises(ValueError, match="tensor 'x' is F4; allowed: F64, F32"):
    read_header(tmp_path / SINGLE)


def rewritten(path, change, body=None):
  """The file with another header: `change` takes its text and gives another."""
  whole = path.read_bytes()
  base = 8 + struct.unpack("<Q", whole[:8])[0]
  text = change(whole[8:base].decode()).encode()
  path.write_bytes(struct.pack("<Q", len(text)) + text + (whole[base:] if body is None else body))
  return path


@pytest.mark.parametrize(
  ("entries", "message"),
  [
    ({"a": [0, 8], "b": [0, 8]}, "tensor 'b' overlaps tensor 'a'"),
    ({"a": [0, 8], "b": [4, 12]}, "tensor 'b' overlaps tensor 'a'"),
    ({"a": [0, 8], "b": [12, 20]}, "4 bytes between tensors"),
    ({"a": [1, 9], "b": [9, 17]}, r"tensor 'a' is F32\[2\] in bytes 1 to 9"),
    ({"a": [0, 8], "b": [8, 10**30]}, "tensor 'b' is F32"),
    ({"a": [0, 8], "b": [-8, 0]}, "describes tensor 'b' as"),
    ({"a": [0, 8], "b": [True, 9]}, "describes tensor 'b' as"),
  ],
)
def test_tensors_lie_side_by_side(tmp_path, entries, message):
  one = {"dtype": "F32", "shape": [2]}
  header = json.dumps({name: one | {"data_offsets": span} for name, span in entries.items()})
  end = max(e[1] for e in entries.values())
  path = rewritten(folder_with(tmp_path) / SINGLE, lambda _: header, bytes(min(end, 20)))
  with pytest.raises(ValueError, match=rf"model\.safetensors: .*{message}"):
    read_header(path)


def test_a_name_that_stands_twice(tmp_path):
  twice = lambda text: text.rstrip()[:-1] + ', "a": {}}'
  path = rewritten(folder_with(tmp_path) / SINGLE, twice)
  with pytest.raises(ValueError, match="field 'a' stands twice"):
    read_header(path)


def test_a_header_nested_too_deeply(tmp_path):
  path = rewritten(folder_with(tmp_path) / SINGLE, lambda _: '{"a": ' * 10**5)
  with pytest.raises(ValueError, match=r"model\.safetensors: header: damaged"):
    read_header(path)


@pytest.mark.parametrize("where", ["../secret", "/etc/hostname", "", ".", "a\0b", "link"])
def test_shards_outside_the_folder_are_not_opened(tmp_path, where):
  safetensors.numpy.save_file({"b": TENSORS["a"]}, tmp_path / "secret")
  folder = tmp_path / "folder"
  folder.mkdir()
  index = json.loads((sharded(folder) / INDEX).read_text())
  (folder / "link").symlink_to(tmp_path / "secret")
  index["weight_map"]["b"] = where
  (folder / INDEX).write_text(json.dumps(index))
  with pytest.raises((ValueError, FileNotFoundError), match=r"inside the folder|missing"):
    SafetensorsFolder(folder)


def test_a_snapshot_of_the_hub_links_to_its_blobs(tmp_path):
  snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
  for folder in (snapshot, blobs):
    folder.mkdir(parents=True)
  safetensors.numpy.save_file(TENSORS, blobs / "0123")
  (snapshot / SINGLE).symlink_to("../../blobs/0123")
  assert set(SafetensorsFolder(snapshot).names()) == set(TENSORS)


def test_a_tensor_in_two_shards(tmp_path):
  second = sharded(tmp_path) / "model-00002-of-00002.safetensors"
  safetensors.numpy.save_file({"a": TENSORS["a"], "b": TENSORS["a"]}, second)
  with pytest.raises(ValueError, match=r"tensor 'a' is in model-00002.* and in another shard"):
    SafetensorsFolder(tmp_path)


def test_integers_are_no_parameters(tmp_path):
  source = SafetensorsFolder(folder_with(tmp_path))
  with pytest.raises(ValueError, match="tensor 'ids' is int64; allowed: real numbers"):
    source.read("ids", np.zeros((1, 4), np.float32))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_truncation_raises_value_error(tmp_path_factory, data):
  path = tmp_path_factory.mktemp("cut") / SINGLE
  whole = safetensors.numpy.save(TENSORS)
  path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
  with pytest.raises(ValueError, match=r"model\.safetensors"):
    read_header(path)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_changed_header_byte_raises_value_error_or_reads(tmp_path_factory, data):
  folder = tmp_path_factory.mktemp("flip")
  whole = bytearray(safetensors.numpy.save(TENSORS))
  length = struct.unpack("<Q", whole[:8])[0]
  whole[data.draw(st.integers(0, 7 + length))] = data.draw(st.integers(0, 255))
  (folder / SINGLE).write_bytes(whole)
  try:
    source = SafetensorsFolder(folder)
    arrays = [source.read(name) for name in source.names()]
  except ValueError as error:
    assert str(folder) in str(error)
  else:
    assert all(array.size <= len(whole) for array in arrays)
