"""Files as a source: which ones, where, and how their columns are called."""

import dataclasses
import fnmatch
import glob
import os
import pathlib
import re

CRITEO = ["label", *(f"I{i}" for i in range(1, 14)), *(f"C{i}" for i in range(1, 27))]
COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".lz4": "lz4"}
PARQUET = ".parquet"
_DELIMITERS = {".csv": ",", ".tsv": "\t", ".txt": "\t", ".tab": "\t"}
_MARKS = "*?["  # of a glob
_QUERY = re.compile(r"\?\w+=[^&/]*(?:&\w+=[^&/]*)*\Z")  # of a URI
_HIDDEN = re.compile(r"/[._]")


def pyarrow():
    """The module, with its parts. Raises ImportError that says how to install it."""
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.csv
        import pyarrow.fs
        import pyarrow.parquet
    except ImportError:
        raise ImportError('reading files needs pyarrow: pip install "deepfm_ops[data]"') from None
    return pyarrow


def suffix(path):
    """The last ending of a path, in small letters."""
    return pathlib.PurePosixPath(path).suffix.lower()


@dataclasses.dataclass(frozen=True)
class Files:
    """Files, in order; made by `files`.

    Attributes:
        paths: of the files.
        names: of the columns, or None: the first line of a text file has them.
        delimiter: of the columns of text files.
        system: pyarrow's file system.

    """

    paths: tuple
    names: tuple | None
    delimiter: str
    system: object

    @property
    def is_parquet(self):
        return _kind(self.paths[0]) == PARQUET

    def sizes(self):
        """Bytes of each file."""
        return [info.size for info in self.system.get_file_info(list(self.paths))]

    def stream(self, path):
        """A stream of the bytes of a file, decompressed."""
        return self.system.open_input_stream(path, compression=COMPRESSED.get(suffix(path)))

    def fingerprint(self):
        """A text that other files, in names, sizes or order, do not have."""
        pairs = zip(self.paths, self.sizes(), strict=True)
        return "; ".join(f"{os.path.basename(path)} {size}" for path, size in pairs)


def files(paths, *, names=None, delimiter=None, filesystem=None):
    r"""Files as a source, with what their names do not say.

    What `FeatureDictionary` takes as a source needs this function only for its keywords.

    Args:
        paths: a path, a glob, a folder (all its files, but what starts with a dot or "_"), or a list of these: .csv,
            .tsv, .txt or .parquet, and those compressed (.gz, .zst, .bz2, .lz4). Paths of other file systems as pyarrow
            names them, "s3://bucket/key", "gs://bucket/key", "hdfs://...", with options behind a question mark.
        names: of the columns of text files without a header. None: the first line has them, unless the columns that are
            asked for are numbers (0, 1, ...), which count columns, or the file has the 40 columns of Criteo's logs and
            `CRITEO`'s names are asked for.
        delimiter: one character; None: by the file's name, a comma for .csv, else a tab.
        filesystem: a pyarrow.fs.FileSystem (or one of fsspec's) in which the paths are; None: by the paths.

    Raises:
        FileNotFoundError: no such file, or a glob that finds none.
        ValueError: names of files that cannot be read, or files of several kinds.
        ImportError: pyarrow is not installed.

    """
    pa = pyarrow()
    given = [os.fspath(path) for path in ([paths] if isinstance(paths, str | os.PathLike) else paths)]
    if not given:
        raise FileNotFoundError("no paths")
    system, found = filesystem, []
    if system is not None and not isinstance(system, pa.fs.FileSystem):
        system = pa.fs.PyFileSystem(pa.fs.FSSpecHandler(system))
    for path in given:
        if filesystem is not None:
            here, name = system, _QUERY.sub("", path.partition("://")[2]) if "://" in path else path
        else:
            here, name = _located(pa, path)
        if system is not None and not here.equals(system):
            raise ValueError(f"{path} is in another file system than {given[0]}: read them apart")
        system = here
        found += _expanded(pa, system, name, path)
    kinds = {_kind(path) for path in found}
    if len(kinds) > 1:
        raise ValueError(f"files must be of one kind, got {sorted(kinds)}: {found[:3]}")
    kind = kinds.pop()
    if delimiter is None:
        delimiter = _DELIMITERS.get(kind, ",")
    if not isinstance(delimiter, str) or len(delimiter) != 1 or not delimiter.isascii() or delimiter in '"\r\n':
        raise ValueError(f"delimiter must be one character, no quote and no line break, got {delimiter!r}")
    return Files(tuple(found), None if names is None else tuple(names), delimiter, system)


def _located(pa, path):
    """(file system, path in it) of a path or a URI, with marks of a glob or without."""
    if "://" not in path:
        return pa.fs.LocalFileSystem(), path
    query = _QUERY.search(path)
    path, query = (path[: query.start()], query[0]) if query else (path, "")
    head = _before_marks(path)  # a glob is no URI: what comes before its first mark is one
    system, root = pa.fs.FileSystem.from_uri(head + query)
    return system, root + path[len(head) :]


def _before_marks(path):
    """The folders of a path before the first one with a mark of a glob; all of a path without marks."""
    first = min((path.index(mark) for mark in _MARKS if mark in path), default=None)
    return path if first is None else path[: max(0, path.rfind("/", 0, first))]


def _kind(path):
    """The ending of a path without that of its compression."""
    found = suffix(path)
    if found in COMPRESSED:
        found = suffix(path[: -len(found)])
    if found in (PARQUET, ".pq"):
        return PARQUET
    if found in _DELIMITERS:
        return found
    if found in (".svm", ".libsvm", ".ffm", ".libffm"):
        raise ValueError(f"{path}: libsvm and libffm rows have numbers for indices already: take data.PairFeatures")
    raise ValueError(f"{path}: what is in it cannot be told from its name; it must end in .csv, .tsv, .txt or .parquet")


def _expanded(pa, system, name, path):
    """The files that a path stands for."""
    info = system.get_file_info([name])[0]
    if info.type == pa.fs.FileType.NotFound and any(mark in name for mark in _MARKS):  # a name may have brackets
        if isinstance(system, pa.fs.LocalFileSystem):
            matches = sorted(glob.glob(name, recursive=True))
        else:
            folder = pa.fs.FileSelector(_before_marks(name), allow_not_found=True, recursive=True)
            infos, marks = system.get_file_info(folder), name.split("/")
            matches = sorted(info.path for info in infos if _matches(info.path.split("/"), marks))
        found = [file for info in system.get_file_info(matches) for file in _inside(pa, system, info)]
        if not found:
            raise FileNotFoundError(f"{path}: no file has such a name")
        return list(dict.fromkeys(found))  # "**" finds folders, and what is in them
    if info.type == pa.fs.FileType.NotFound:
        raise FileNotFoundError(f"{path}: no such file")
    found = _inside(pa, system, info)
    if not found:
        raise FileNotFoundError(f"{path} is a folder without files")
    return found


def _inside(pa, system, info):
    """The files of a folder, at any depth, without hidden ones; or the file itself."""
    if info.type == pa.fs.FileType.Unknown:
        raise ValueError(f"{info.path} is neither a file nor a folder")
    if info.type != pa.fs.FileType.Directory:
        return [info.path]
    infos = system.get_file_info(pa.fs.FileSelector(info.path, recursive=True))
    return sorted(i.path for i in infos if i.is_file and not _HIDDEN.search(i.path, len(info.path.rstrip("/"))))


def _matches(parts, marks):
    """Whether a path is one of a glob's, as `glob.glob` has it: a mark stands for nothing across folders, but **."""
    if not marks or not parts:
        return not parts and all(mark == "**" for mark in marks)
    if marks[0] == "**":
        return _matches(parts, marks[1:]) or _matches(parts[1:], marks)
    is_hidden = parts[0].startswith(".") and not marks[0].startswith(".")
    return not is_hidden and fnmatch.fnmatchcase(parts[0], marks[0]) and _matches(parts[1:], marks[1:])
