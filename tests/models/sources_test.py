import numpy as np
import pytest

from effjax.models.gguf_file import GGUFFile
from effjax.models.safetensors_files import SafetensorsFolder
from effjax.models.sources import CHUNK_BYTES, MappedFile, TensorSource, missing_tensor


def test_readers_are_tensor_sources():
  methods = {name for name in vars(TensorSource) if not name.startswith("_")}
  assert methods == {"names", "shape", "read"}
  assert methods <= set(dir(GGUFFile)) & set(dir(SafetensorsFolder))


@pytest.mark.parametrize("rows", [1, 3, 5])
def test_decode_joins_chunks_whatever_the_strides(tmp_path, rows):
  width = CHUNK_BYTES // 8  # two rows a chunk
  values = np.arange(rows * width, dtype=np.float32).reshape(rows, width)
  (tmp_path / "file").write_bytes(b"head" + values.tobytes())
  out = np.zeros((width, rows), np.float32).T
  MappedFile(tmp_path / "file").decode("x", 4, 4 * width, out, lambda raw: raw.view(np.float32))
  np.testing.assert_array_equal(out, values)


def test_decode_refuses_values_that_are_not_finite(tmp_path):
  (tmp_path / "file").write_bytes(np.array([1, np.nan], np.float32).tobytes())
  with pytest.raises(ValueError, match="'x' holds values that are not finite"):
    MappedFile(tmp_path / "file").decode(
      "x", 0, 4, np.zeros((2, 1), np.float32), lambda raw: raw.view(np.float32)
    )


def test_missing_and_empty_files(tmp_path):
  with pytest.raises(FileNotFoundError, match="no such file"):
    MappedFile(tmp_path / "none")
  (tmp_path / "empty").touch()
  with pytest.raises(ValueError, match="is empty"):
    MappedFile(tmp_path / "empty")


def test_missing_tensor_names_its_like(tmp_path):
  error = missing_tensor(tmp_path, "layers.3.q.weight", ["layers.0.q.weight", "norm.bias"])
  assert "'layers.3.q.weight' is missing; it has, for example, layers.0.q.weight" in str(error)
