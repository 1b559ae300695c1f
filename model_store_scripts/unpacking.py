"""Unpacking zip and tar.gz archives that nobody vouches for.

A file is written only where nothing was yet, below one folder, from a member that is a plain file
with a plain name; what it weighs is held against a bound before a byte of it is written. Whoever
calls owns the folder and removes it, however this ends.
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
"""Weights hardly compress, and the text of a tokenizer tenfold at most."""
SMALL = 64 * 1024 * 1024
"""What any archive may unpack to, in bytes, however small it is."""
CHUNK = 1024 * 1024

GZIP = b"\x1f\x8b"
ZIP = b"PK"

ENCRYPTED = 0x1 | 0x40 | 0x2000
"""Of a zip member's flags (APPNOTE.TXT, 4.4.4): encrypted, strongly, and its directory too."""


def is_archive(path: Path) -> bool:
    """Whether a file is a zip or a gzip, whole or not, by how it begins."""
    return _begins(path, GZIP) or _begins(path, ZIP)


def unpack(archive: Path, target: Path, *, name: str, max_bytes: int | None = None) -> None:
    """Unpack a zip or a tar.gz into `target`, a folder that is not there yet.

    `name` is what messages call the archive. `max_bytes`: to how much it may unpack. Default:
    `MAX_RATIO` times its own size, at least `SMALL`. The disk's free room bounds it in any case.

    Raises: UnsafeModel (a member that would land elsewhere, is no plain file or is there twice;
    encrypted; too many, too large), IncompleteModel (damaged, cut off), ConfigError (no room).
    """
    target.mkdir()
    bound = max(SMALL, MAX_RATIO * archive.stat().st_size) if max_bytes is None else max_bytes
    room = _Room(name, bound, shutil.disk_usage(target).free)
    with reraise_as(IncompleteModel, f"{name} is cut off or damaged"):
        try:
            if _begins(archive, GZIP):
                _untar(archive, target, room)
            else:
                _unzip(archive, target, room)
        except gzip.BadGzipFile:
            raise
        except OSError as error:
            raise ConfigError(f"{name} can not be unpacked: {error.strerror or error}") from None


class _Room:
    """What an archive may still unpack to, in bytes and in names."""

    def __init__(self, name: str, bound: int, free: int) -> None:
        self.name = name
        self.bound = bound
        self._free = free
        self._bytes = 0
        self._members = 0
        self._taken: dict[str, tuple[PurePosixPath, bool]] = {}

    def take(self, member: str, size: int, *, folder: bool) -> PurePosixPath:
        """Claim a member's place and its size, before anything of it is written.

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
            self._claim(parent, folder=True)
        self._claim(path, folder=folder)
        self._bytes += size
        self.refuse_beyond_bound(self._bytes)
        if self._bytes > self._free:
            raise ConfigError(
                f"{self.name} unpacks to more than the {self._free:,} bytes the disk has room for"
            )
        return path

    def refuse_beyond_bound(self, count: int) -> None:
        """Raises: UnsafeModel if the archive may not unpack to so many bytes."""
        if count > self.bound:
            raise UnsafeModel(
                f"{self.name} unpacks to more than {self.bound:,} bytes, which is too much for an "
                "archive of its size; if it really is that large, allow it: --max-unpacked-size"
            )

    def _claim(self, path: PurePosixPath, *, folder: bool) -> None:
        # To some file systems names are equal that differ in case or in how accents are written.
        key = unicodedata.normalize("NFC", unicodedata.normalize("NFC", str(path)).casefold())
        before = self._taken.setdefault(key, (path, folder))
        first = before[0] is path
        if not (first or (folder and before == (path, True))):
            equal = (
                "" if before[0] == path else f", as {before[0]} which some disks take for the same"
            )
            raise UnsafeModel(f"{self.name} has {path} twice{equal}")


def _begins(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic


def _unzip(archive: Path, target: Path, room: _Room) -> None:
    with zipfile.ZipFile(archive) as packed:
        # All are looked at before the first is written. `filename` ends at a NUL, this does not.
        members = [(info, _take_zipped(info, room)) for info in packed.infolist()]
        for info, path in members:
            if info.is_dir():
                (target / path).mkdir(parents=True, exist_ok=True)
            else:
                with packed.open(info) as source:
                    _write(source, target / path)


def _take_zipped(info: zipfile.ZipInfo, room: _Room) -> PurePosixPath:
    member = info.orig_filename
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind == stat.S_IFLNK:
        raise UnsafeModel(f"{room.name}: {member!r} is a link: zip without -y")
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise UnsafeModel(f"{room.name}: {member!r} is a device or a pipe, not a plain file")
    if info.flag_bits & ENCRYPTED:
        raise UnsafeModel(f"{room.name} is encrypted: {member!r} can not be read")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise UnsafeModel(f"{room.name}: {member!r} is neither stored nor deflated")
    return room.take(member, info.file_size, folder=member.endswith("/"))


def _untar(archive: Path, target: Path, room: _Room) -> None:
    with gzip.open(archive) as plain:
        stream = _BoundedStream(plain, room)
        with tarfile.open(fileobj=stream, mode="r:", tarinfo=_Member) as tar:  # type: ignore[call-overload]
            for member in tar:
                path = _take_tarred(member, room)
                if member.isdir():
                    (target / path).mkdir(parents=True, exist_ok=True)
                elif (source := tar.extractfile(member)) is not None:
                    with source:
                        _write(source, target / path)
            # tarfile takes a damaged header for the end.
            stream.seek(tar.offset)
            end = stream.read(tarfile.BLOCKSIZE)
            while rest := stream.read(CHUNK):
                end += rest.strip(b"\0")[:1]
        if len(end) < tarfile.BLOCKSIZE or end.strip(b"\0"):
            raise EOFError("what follows the last file is not the end of an archive")


class _Member(tarfile.TarInfo):
    def _proc_gnusparse_10(self, *_: Any) -> None:
        # tarfile would read the map of a sparse file, however long, before anyone sees the member.
        raise tarfile.ReadError("a sparse file, which no model has")


def _take_tarred(member: tarfile.TarInfo, room: _Room) -> PurePosixPath:
    plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse()
    if not (plain or member.isdir()):
        raise UnsafeModel(f"{room.name}: {member.name!r} is a link or a device, not a plain file")
    if member.size < 0:
        raise EOFError(f"{member.name!r} has no size")
    return room.take(member.name, member.size, folder=member.isdir())


class _BoundedStream:
    """A decompressed stream that no header makes longer, or read in larger pieces, than it may."""

    def __init__(self, plain: gzip.GzipFile, room: _Room) -> None:
        self._plain = plain
        self._room = room

    def read(self, size: int = -1) -> bytes:
        """Read a piece. Raises: UnsafeModel."""
        if not 0 <= size <= CHUNK:
            raise UnsafeModel(f"{self._room.name} has a header of {size:,} bytes: no archive has")
        data = self._plain.read(size)
        # Headers and padding come on top of what the members weigh.
        self._room.refuse_beyond_bound(self._plain.tell() - SMALL)
        return data

    def seek(self, position: int) -> int:
        """Go on to a position."""
        return self._plain.seek(position)

    def tell(self) -> int:
        """The position."""
        return self._plain.tell()


def _write(source: IO[bytes], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        shutil.copyfileobj(source, file, CHUNK)
