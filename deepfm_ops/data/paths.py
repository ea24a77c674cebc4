"""Files by path, list or glob, plain or compressed."""

import contextlib
import glob
import gzip
import io
import os
import pathlib
import zlib


def expand(paths):
    """The files, as a list of str.

    Args:
        paths: str or pathlib.Path of a file, or a glob, whose files are sorted; or a list of these.

    Raises:
        FileNotFoundError: a file that is not there, a glob that no file matches.
        TypeError: anything else.
        ValueError: an empty list.

    """
    if isinstance(paths, list | tuple):
        if not paths:
            raise ValueError("path must name a file at least, got an empty list")
        return [file for path in paths for file in expand(path)]
    if not isinstance(paths, str | os.PathLike):
        raise TypeError(f"path must be a path, a glob or a list of these, got {type(paths).__name__}")
    path = os.fspath(paths)
    if isinstance(path, bytes):
        path = os.fsdecode(path)
    if os.path.exists(path):  # a name may have brackets
        return [path]
    found = sorted(glob.glob(path, recursive=True))
    if not found:
        what = "no file matches" if glob.has_magic(path) else "there is no file"
        raise FileNotFoundError(f"{what} {path}")
    return found


@contextlib.contextmanager
def opened(path):
    """Opens a file to read its bytes; those that are packed in it where its name ends in .gz or .zst.

    Raises:
        ImportError: a .zst, and pyarrow is not installed.
        ValueError: the file is cut off or damaged; what reads it inside the block raises this.

    """
    suffix = pathlib.Path(path).suffix
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(path, "rb"))
        damage = ()
        if suffix == ".gz":
            file = stack.enter_context(gzip.GzipFile(fileobj=file))
            damage = (EOFError, gzip.BadGzipFile, zlib.error)
        elif suffix == ".zst":
            try:
                import pyarrow as pa
            except ImportError as error:
                raise ImportError(f"{path}: reading .zst takes pyarrow: pip install 'deepfm_ops[data]'") from error
            file = stack.enter_context(io.BufferedReader(pa.CompressedInputStream(file, "zstd")))
            damage = (OSError,)
        try:
            yield file
        except damage as error:
            raise ValueError(f"{path} is cut off or damaged: {error}") from error
