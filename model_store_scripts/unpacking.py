"""Unpacking of untrusted zip and tar.gz archives.

A file is written only where there was none, below one folder, from a member that is a regular file
with a plain name; its size is checked against a bound before a byte of it is written. The caller
owns the folder and deletes it in any case.
"""

from __future__ import annotations

import gzip
import shutil
import stat
import tarfile
import unicodedata
import zipfile
from pathlib import Path, PurePosixPath
from typing import IO, Any

from model_store_scripts.safety import refuse_unsafe_path
from runners.contracts.errors import ConfigError, IncompleteModel, UnsafeModel, reraise_as

MAX_MEMBERS = 10_000
"""As many as a model folder may have files."""
MAX_RATIO = 20
"""Weights hardly compress, and the text of a tokenizer at most tenfold."""
MIN_BOUND = 64 * 1024 * 1024
"""The size in bytes that every archive may unpack to, however small it is."""
CHUNK_BYTES = 1024 * 1024

GZIP = b"\x1f\x8b"
ZIP = b"PK"

ENCRYPTED = 0x1 | 0x40 | 0x2000
"""Flags of a zip member (APPNOTE.TXT, 4.4.4): encrypted, strongly, the directory encrypted too."""


def is_archive(path: Path) -> bool:
    """Whether a file starts as a zip or gzip file does; it may be truncated."""
    return _starts_with(path, GZIP) or _starts_with(path, ZIP)


def unpack(archive: Path, target: Path, *, name: str, max_bytes: int | None = None) -> None:
    """Unpack a zip or a tar.gz into `target`, a folder that must not exist yet.

    `name` is what messages call the archive. `max_bytes` is the maximum unpacked size; by default
    `MAX_RATIO` times the archive's size, at least `MIN_BOUND`. The disk's free space is a bound in
    any case.

    Raises: UnsafeModel (a member that would be written elsewhere, is not a regular file or occurs
    twice; encrypted; too many members, too large), IncompleteModel (damaged, truncated),
    ConfigError (no room).
    """
    target.mkdir()
    bound = max(MIN_BOUND, MAX_RATIO * archive.stat().st_size) if max_bytes is None else max_bytes
    budget = _Budget(name, bound, shutil.disk_usage(target).free)
    with reraise_as(IncompleteModel, f"{name} is truncated or damaged"):
        try:
            if _starts_with(archive, GZIP):
                _untar(archive, target, budget)
            else:
                _unzip(archive, target, budget)
        except gzip.BadGzipFile:
            raise
        except OSError as error:
            raise ConfigError(f"{name} cannot be unpacked: {error.strerror or error}") from None


class _Budget:
    """The bytes and the names that an archive may still take."""

    def __init__(self, name: str, bound: int, free: int) -> None:
        self.name = name
        self.bound = bound
        self._free = free
        self._bytes = 0
        self._members = 0
        self._claims: dict[str, tuple[PurePosixPath, bool]] = {}

    def claim(self, member: str, size: int, *, folder: bool) -> PurePosixPath:
        """Reserve a member's path and size, before anything of it is written.

        Raises: UnsafeModel, ConfigError.
        """
        self._members += 1
        if self._members > MAX_MEMBERS:
            raise UnsafeModel(f"{self.name} has more than {MAX_MEMBERS:,} members: no model has")
        refuse_unsafe_path(member, container=self.name)
        path = PurePosixPath(member)
        if not path.parts and not folder:
            raise UnsafeModel(f"{self.name} has a file without a name")
        for parent in path.parents:
            self._claim_path(parent, folder=True)
        self._claim_path(path, folder=folder)
        self._bytes += size
        self.refuse_beyond_bound(self._bytes)
        if self._bytes > self._free:
            raise ConfigError(
                f"{self.name} unpacks to more than the {self._free:,} bytes that the disk has free"
            )
        return path

    def refuse_beyond_bound(self, count: int) -> None:
        """Raises: UnsafeModel if the archive may not unpack to so many bytes."""
        if count > self.bound:
            raise UnsafeModel(
                f"{self.name} unpacks to more than {self.bound:,} bytes, which is too much for an "
                "archive of its size; if the model is that large, allow it with --max-unpacked-size"
            )

    def _claim_path(self, path: PurePosixPath, *, folder: bool) -> None:
        # Some file systems ignore differences in case or in the encoding of accents.
        key = unicodedata.normalize("NFC", unicodedata.normalize("NFC", str(path)).casefold())
        previous = self._claims.setdefault(key, (path, folder))
        is_first = previous[0] is path
        if not (is_first or (folder and previous == (path, True))):
            reason = "" if previous[0] == path else f": some file systems take it for {previous[0]}"
            raise UnsafeModel(f"{self.name} has {path} twice{reason}")


def _starts_with(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic


def _unzip(archive: Path, target: Path, budget: _Budget) -> None:
    with zipfile.ZipFile(archive) as packed:
        # All members are checked before the first is written.
        members = [(info, _claim_zip_member(info, budget)) for info in packed.infolist()]
        for info, path in members:
            if info.is_dir():
                (target / path).mkdir(parents=True, exist_ok=True)
            else:
                with packed.open(info) as source:
                    _write(source, target / path)


def _claim_zip_member(info: zipfile.ZipInfo, budget: _Budget) -> PurePosixPath:
    member = info.orig_filename  # `filename` ends at a NUL
    file_type = stat.S_IFMT(info.external_attr >> 16)
    if file_type == stat.S_IFLNK:
        raise UnsafeModel(f"{budget.name}: {member!r} is a link: zip without -y")
    if file_type not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise UnsafeModel(f"{budget.name}: {member!r} is a device or a pipe, not a regular file")
    if info.flag_bits & ENCRYPTED:
        raise UnsafeModel(f"{budget.name} is encrypted: {member!r} cannot be read")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise UnsafeModel(f"{budget.name}: {member!r} is neither stored nor deflated")
    return budget.claim(member, info.file_size, folder=member.endswith("/"))


def _untar(archive: Path, target: Path, budget: _Budget) -> None:
    with gzip.open(archive) as decompressed:
        stream = _BoundedStream(decompressed, budget)
        with tarfile.open(fileobj=stream, mode="r:", tarinfo=_Member) as tar:  # type: ignore[call-overload]
            for member in tar:
                path = _claim_tar_member(member, budget)
                if member.isdir():
                    (target / path).mkdir(parents=True, exist_ok=True)
                elif (source := tar.extractfile(member)) is not None:
                    with source:
                        _write(source, target / path)
            # tarfile takes a damaged header for the end of the archive.
            stream.seek(tar.offset)
            end = stream.read(tarfile.BLOCKSIZE)
            while rest := stream.read(CHUNK_BYTES):
                end += rest.strip(b"\0")[:1]
        if len(end) < tarfile.BLOCKSIZE or end.strip(b"\0"):
            raise EOFError("what follows the last file is not the end of an archive")


class _Member(tarfile.TarInfo):
    def _proc_gnusparse_10(self, *_: Any) -> None:
        # tarfile would read the map of a sparse file, of any length, before the member is checked.
        raise tarfile.ReadError("a sparse file, which no model has")


def _claim_tar_member(member: tarfile.TarInfo, budget: _Budget) -> PurePosixPath:
    is_regular = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse()
    if not (is_regular or member.isdir()):
        raise UnsafeModel(
            f"{budget.name}: {member.name!r} is a link or a device, not a regular file"
        )
    if member.size < 0:
        raise EOFError(f"{member.name!r} has no size")
    return budget.claim(member.name, member.size, folder=member.isdir())


class _BoundedStream:
    """A decompressed stream with a bound on its length and on the size of a read.

    tarfile reads headers whole, however long they claim to be.
    """

    def __init__(self, decompressed: gzip.GzipFile, budget: _Budget) -> None:
        self._decompressed = decompressed
        self._budget = budget

    def read(self, size: int = -1) -> bytes:
        """Read up to `size` bytes. Raises: UnsafeModel."""
        if not 0 <= size <= CHUNK_BYTES:
            raise UnsafeModel(f"{self._budget.name} has a header of {size:,} bytes: no archive has")
        data = self._decompressed.read(size)
        # Headers and padding add to the size of the members.
        self._budget.refuse_beyond_bound(self._decompressed.tell() - MIN_BOUND)
        return data

    def seek(self, position: int) -> int:
        """Skip to a position."""
        return self._decompressed.seek(position)

    def tell(self) -> int:
        """The position."""
        return self._decompressed.tell()


def _write(source: IO[bytes], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        shutil.copyfileobj(source, file, CHUNK_BYTES)
