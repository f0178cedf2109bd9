"""A lock on a directory that several processes might write to."""

import contextlib
import os
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path

from effjax.train import workdir


@contextlib.contextmanager
def locked(path: str | os.PathLike) -> Iterator[None]:
  """Holds the lock file `path`; the system lets go of it when the process ends, however it ends.

  The file stays, with the number of the process that last held it. Where the disk knows no locks,
  a warning says so.

  Raises:
    BlockingIOError: when somebody else holds it, naming them.
    OSError: when the file cannot be written.

  Example:
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "lock")
    >>> with locked(path), locked(path):
    ...   pass
    Traceback (most recent call last):
    ...
    BlockingIOError: [Errno 11] in use by process ...
  """
  path = Path(path)
  workdir.make(path.parent)
  with open(path, "ab+", buffering=0) as file:
    _take(file, path)
    yield


def _take(file, path: Path) -> None:
  import fcntl  # only where there is POSIX

  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as error:
    file.seek(0)
    holder = file.read().decode() or "another process"
    allowed = "allowed: wait until it ends, or another directory"
    raise BlockingIOError(error.errno, f"in use by {holder}; {allowed}", str(path.parent)) from None
  except OSError as error:
    warnings.warn(f"{path} cannot be locked ({error.strerror}): keep others away", stacklevel=4)
    return
  with contextlib.suppress(OSError):  # on a full disk it is held without a name
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
