"""Files that are replaced whole or not at all."""

import contextlib
import os
import pathlib
import secrets
import shutil


def to_disk(path):
    """Returns when what the file or folder at `path` holds would survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path):
    """Gives a path to write a file at; what is there in the end takes the place of `path`, in one step.

    Where the block raises, or the process dies, `path` is what it was. A link at `path` stays a link, a file there
    keeps its mode.
    """
    path = pathlib.Path(os.path.realpath(path))
    fresh = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.new")
    try:
        yield fresh
        to_disk(fresh)
        if path.exists():
            shutil.copymode(path, fresh)
        os.replace(fresh, path)
        to_disk(path.parent)
    finally:
        fresh.unlink(missing_ok=True)
