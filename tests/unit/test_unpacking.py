"""Hostile archives are refused in one sentence, and nothing is written outside of the folder."""

from __future__ import annotations

import gzip
import io
import os
import shutil
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from model_store_scripts import unpacking
from model_store_scripts.unpacking import CHUNK_BYTES, MIN_BOUND, unpack
from runners.contracts.errors import ConfigError, IncompleteModel, UnsafeModel

Write = Callable[[Path], object]
ZEROS = bytes(CHUNK_BYTES)
FAST = 1
"""The compression level at which zeros are quick to write, and still small."""


def zipped(*names: str, content: bytes = b"{}") -> Write:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=FAST) as packed:
            for name in names:
                packed.writestr(name, content)

    return write


def absolute(make: Callable[..., Write]) -> Write:
    """A member whose name is the absolute path of a file in the archive's folder."""
    return lambda path: make(str(path.parent / "up.json"))(path)


def zipped_as(member_type: int, name: str = "config.json") -> Write:
    """A member of another type than a file, as `zip --symlinks` writes them."""

    def write(path: Path) -> None:
        info = zipfile.ZipInfo(name)
        info.external_attr = (member_type | 0o777) << 16
        with zipfile.ZipFile(path, "w") as packed:
            packed.writestr(info, "/etc/passwd")

    return write


def tarred(*names: str, content: bytes = b"{}") -> Write:
    return tarred_members(*(tarfile.TarInfo(name) for name in names), content=content)


def tarred_as(member_type: bytes, name: str = "config.json", **fields: object) -> Write:
    info = tarfile.TarInfo(name)
    info.type = member_type
    info.linkname = "/etc/passwd"
    for field, value in fields.items():
        setattr(info, field, value)
    return tarred_members(info, content=b"")


def tarred_members(*members: tarfile.TarInfo, content: bytes) -> Write:
    def write(path: Path) -> None:
        with tarfile.open(path, "w:gz", compresslevel=FAST) as packed:
            for info in members:
                info.size = len(content)
                packed.addfile(info, io.BytesIO(content))

    return write


def cut(write: Write, by: int) -> Write:
    """Without its last bytes, or with only the first ones."""

    def shorter(path: Path) -> None:
        write(path)
        content = path.read_bytes()
        path.write_bytes(content[:by])

    return shorter


def encrypted(path: Path) -> None:
    """As `zip --encrypt` marks it; the flag stands in both of a member's headers."""
    zipped("config.json")(path)
    content = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + offset] |= 1
    path.write_bytes(content)


def nul_in_name(path: Path) -> None:
    """zipfile cuts the name there, and would take it for another."""
    zipped("config.jsonX.so")(path)
    path.write_bytes(path.read_bytes().replace(b"config.jsonX.so", b"config.json\0.so"))


def many_members(path: Path) -> None:
    """30,000 empty files; zipfile itself would take seconds to write them."""
    local, directory, count = bytearray(), bytearray(), 30_000
    for number in range(count):
        name = b"%d" % number
        plain = struct.pack("<5H3L2H", 20, 0, 0, 0, 0, 0, 0, 0, len(name), 0)
        directory += b"PK\x01\x02" + struct.pack("<H", 20) + plain
        directory += struct.pack("<3H2L", 0, 0, 0, 0, len(local)) + name
        local += b"PK\x03\x04" + plain + name
    size, start = len(directory), len(local)
    big = struct.pack("<QHHLLQQQQ", 44, 45, 45, 0, 0, count, count, size, start)
    end = b"PK\x06\x06" + big + b"PK\x06\x07" + struct.pack("<LQL", 0, start + size, 1)
    end += b"PK\x05\x06" + struct.pack("<4H2LH", 0, 0, 65535, 65535, size, start, 0)
    path.write_bytes(local + directory + end)


def bomb_of_zeros(path: Path) -> None:
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=FAST) as packed,
        packed.open("model.safetensors", "w") as member,
    ):
        for _ in range(MIN_BOUND // CHUNK_BYTES + 1):
            member.write(ZEROS)


def bomb_that_lies(path: Path) -> None:
    """The directory declares ten bytes, and the member has more."""
    zipped("model.safetensors", content=ZEROS)(path)
    content = bytearray(path.read_bytes())
    struct.pack_into("<L", content, content.index(b"PK\x01\x02") + 24, 10)
    path.write_bytes(content)


def tar_bomb(path: Path) -> None:
    """As small as possible: a header, and zeros compressed by gzip."""
    info = tarfile.TarInfo("model.safetensors")
    info.size = 2 * MIN_BOUND
    with gzip.open(path, "wb", FAST) as packed:
        packed.write(info.tobuf())
        for _ in range(info.size // CHUNK_BYTES):
            packed.write(ZEROS)


def tar_with_a_huge_header(path: Path) -> None:
    """Extended headers are read into memory whole."""
    info = tarfile.TarInfo("PaxHeader")
    info.type = tarfile.XHDTYPE
    info.size = 16 * CHUNK_BYTES
    with gzip.open(path, "wb", FAST) as packed:
        packed.write(info.tobuf())
        for _ in range(16):
            packed.write(ZEROS)


def tar_with_endless_padding(path: Path) -> None:
    tarred("config.json")(path)
    content = gzip.decompress(path.read_bytes())
    with gzip.open(path, "wb", FAST) as packed:
        packed.write(content)
        for _ in range(2 * MIN_BOUND // CHUNK_BYTES + 1):
            packed.write(ZEROS)


def tar_with_a_damaged_header(path: Path) -> None:
    """tarfile takes it for the end of the archive, and would skip the other files."""
    tarred("a.json", "b.json", "c.json")(path)
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[2 * 512 + 148] ^= 1  # in the checksum of the second member's header
    path.write_bytes(gzip.compress(bytes(content)))


def sparse(path: Path) -> None:
    """A file whose header claims more bytes than the archive has."""
    info = tarfile.TarInfo("model.safetensors")
    info.pax_headers = {"GNU.sparse.map": "0,2", "GNU.sparse.size": str(1 << 40)}
    with tarfile.open(path, "w:gz", format=tarfile.PAX_FORMAT) as packed:
        info.size = 2
        packed.addfile(info, io.BytesIO(b"{}"))


def without_a_name(path: Path) -> None:
    """The headers declare the one letter of its name as an extra field."""
    zipped("x")(path)
    content = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 26), (b"PK\x01\x02", 28)):
        struct.pack_into("<2H", content, content.index(signature) + offset, 0, 1)
    path.write_bytes(content)


def sparse_with_a_map(path: Path) -> None:
    """The newer form, whose map precedes the content and is read with the header."""
    info = tarfile.TarInfo("model.safetensors")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
    info.pax_headers |= {"GNU.sparse.name": info.name, "GNU.sparse.realsize": "1"}
    tarred_members(info, content=b"1\n0\n1\n")(path)


def chained(member_type: bytes, content: bytes) -> Write:
    """5,000 extended headers, each of which describes the next."""

    def write(path: Path) -> None:
        info = tarfile.TarInfo("x")
        info.type, info.size = member_type, len(content)
        with gzip.open(path, "wb", FAST) as packed:
            packed.write((info.tobuf() + content.ljust(512, b"\0")) * 5000)
            packed.write(tarfile.TarInfo("config.json").tobuf() + bytes(1024))

    return write


HOSTILE: dict[str, tuple[Write, type[ConfigError], str]] = {
    "absolute path": (absolute(zipped), UnsafeModel, "not a file name a model can have"),
    "upwards": (zipped("ok.json", "../up.json"), UnsafeModel, "not a file name a model can have"),
    "upwards inside": (zipped("a/../../up.json"), UnsafeModel, "not a file name"),
    "backslashes": (zipped("..\\up.json"), UnsafeModel, "not a file name"),
    "a name cut by a zero byte": (nul_in_name, UnsafeModel, "not a file name"),
    "control characters": (zipped("\x1b[2Jup.json"), UnsafeModel, "not a file name"),
    "many folders": (zipped("a/" * 1500 + "x"), UnsafeModel, "not a file name"),
    "a long name": (zipped("a/" * 30_000 + "x"), UnsafeModel, "...' is not a file name"),
    "no name": (without_a_name, UnsafeModel, "has a file without a name"),
    "a folder's name": (zipped("."), UnsafeModel, "has a file without a name"),
    "symlink": (zipped_as(stat.S_IFLNK), UnsafeModel, "is a link: zip without -y"),
    "device": (zipped_as(stat.S_IFCHR), UnsafeModel, "is a device or a pipe"),
    "fifo": (zipped_as(stat.S_IFIFO), UnsafeModel, "is a device or a pipe"),
    "equal but for case": (
        zipped("A.json", "a.json"), UnsafeModel,
        "has a.json twice: some file systems take it for A.json",
    ),
    "equal but for accents": (zipped("\u00e9.json", "e\u0301.json"), UnsafeModel, "twice: some"),
    "folders equal but for case": (zipped("A/x.json", "a/y.json"), UnsafeModel, "has a twice"),
    "file and folder": (zipped("a", "a/b.json"), UnsafeModel, "has a twice"),
    "many members": (many_members, UnsafeModel, "more than 10,000 members"),
    "encrypted": (encrypted, UnsafeModel, "is encrypted"),
    "bomb": (bomb_of_zeros, UnsafeModel, "unpacks to more than 67,108,864 bytes"),
    "bomb that lies": (bomb_that_lies, IncompleteModel, "is truncated or damaged"),
    "cut off": (
        cut(zipped("a.json", content=os.urandom(999)), -30), IncompleteModel, "is truncated"
    ),
    "tar: absolute path": (absolute(tarred), UnsafeModel, "not a file name"),
    "tar: upwards": (tarred("ok.json", "../up.json"), UnsafeModel, "not a file name"),
    "tar: a long name": (tarred("a/" * 60_000 + "x"), UnsafeModel, "...' is not a file name"),
    "tar: headers about headers": (chained(tarfile.XGLTYPE, b"9 a=bcde\n"), IncompleteModel, "rec"),
    "tar: names of names": (chained(tarfile.GNUTYPE_LONGNAME, b"a"), IncompleteModel, "recursion"),
    "tar: symlink": (tarred_as(tarfile.SYMTYPE), UnsafeModel, "is a link or a device"),
    "tar: hardlink": (tarred_as(tarfile.LNKTYPE), UnsafeModel, "is a link or a device"),
    "tar: device": (tarred_as(tarfile.CHRTYPE), UnsafeModel, "is a link or a device"),
    "tar: fifo": (tarred_as(tarfile.FIFOTYPE), UnsafeModel, "is a link or a device"),
    "tar: duplicate": (tarred("a.json", "a.json"), UnsafeModel, "has a.json twice"),
    "tar: equal but for case": (tarred("A.json", "a.json"), UnsafeModel, "has a.json twice: some"),
    "tar: bomb": (tar_bomb, UnsafeModel, "unpacks to more than 67,108,864 bytes"),
    "tar: bomb in a header": (tar_with_a_huge_header, UnsafeModel, "has a header of 16,777,216"),
    "tar: bomb in the padding": (tar_with_endless_padding, UnsafeModel, "unpacks to more than"),
    "tar: sparse, newer": (sparse_with_a_map, IncompleteModel, "a sparse file, which no model has"),
    "tar: sparse": (sparse, UnsafeModel, "is a link or a device, not a regular file"),
    "tar: cut off": (
        cut(tarred("a.json", content=os.urandom(9999)), -5000), IncompleteModel, "is truncated"
    ),
    "tar: cut off at its end": (cut(tarred("a.json"), -9), IncompleteModel, "is truncated"),
    "tar: damaged": (tar_with_a_damaged_header, IncompleteModel, "is truncated or damaged"),
    "not an archive": (
        lambda path: path.write_bytes(b"\x1f\x8bx"), IncompleteModel, "is truncated"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_refused(case: str, tmp_path: Path) -> None:
    write, error_class, message = HOSTILE[case]
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "x.mar")
    (tmp_path / "in" / "up.json").write_text("mine")
    with pytest.raises(ConfigError) as caught:
        unpack(tmp_path / "in" / "x.mar", tmp_path / "in" / "target", name="x.mar")
    assert type(caught.value) is error_class
    assert message in str(caught.value)
    assert str(caught.value).startswith("x.mar")
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"in"}
    assert {path.name for path in (tmp_path / "in").iterdir()} == {"x.mar", "up.json", "target"}
    assert (tmp_path / "in" / "up.json").read_text() == "mine"
    written = [path for path in (tmp_path / "in" / "target").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in written) <= MIN_BOUND
    assert not any(path.is_symlink() for path in (tmp_path / "in" / "target").rglob("*"))


def test_a_tar_of_many_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacking, "MAX_MEMBERS", 30)
    tarred(*map(str, range(31)))(tmp_path / "x.mar")
    with pytest.raises(UnsafeModel, match="more than 30 members"):
        unpack(tmp_path / "x.mar", tmp_path / "target", name="x.mar")


def test_a_duplicate_in_a_zip(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.mar", "w") as packed:
        packed.writestr("config.json", "{}")
        with pytest.warns(UserWarning, match="Duplicate name"):
            packed.writestr("config.json", '{"other": 1}')
    with pytest.raises(UnsafeModel, match=r"x\.mar has config\.json twice$"):
        unpack(tmp_path / "x.mar", tmp_path / "target", name="x.mar")


@pytest.mark.parametrize("write", [zipped, tarred])
def test_a_large_model_is_allowed_by_name(write: Callable[..., Write], tmp_path: Path) -> None:
    """A model may compress well; the free space of the disk is still a bound."""
    archive = tmp_path / "x.mar"
    write("a/model.safetensors", content=bytes(MIN_BOUND + 1))(archive)
    with pytest.raises(
        UnsafeModel, match="if the model is that large, allow it with --max-unpacked"
    ):
        unpack(archive, tmp_path / "refused", name="x.mar")
    unpack(archive, tmp_path / "target", name="x.mar", max_bytes=MIN_BOUND + 1)
    assert (tmp_path / "target" / "a" / "model.safetensors").stat().st_size == MIN_BOUND + 1
    with pytest.raises(UnsafeModel, match=f"unpacks to more than {MIN_BOUND:,} bytes"):
        unpack(archive, tmp_path / "again", name="x.mar", max_bytes=MIN_BOUND)


@pytest.mark.parametrize("write", [zipped, tarred])
def test_a_full_disk_is_seen_before_a_byte_is_written(
    write: Callable[..., Write], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("a.json", content=bytes(2000))(tmp_path / "x.mar")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(ConfigError, match="than the 1,000 bytes that the disk has free"):
        unpack(tmp_path / "x.mar", tmp_path / "target", name="x.mar")
    assert not any((tmp_path / "target").iterdir())


def test_a_sound_archive_is_unpacked_completely(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep" / "er").mkdir(parents=True)
    files = {
        "config.json": b"{}",
        "deep/er/weights": os.urandom(3 * unpacking.CHUNK_BYTES),
        "empty": b"",
    }
    for name, content in files.items():
        (source / name).write_bytes(content)
    formats = ("zip", "gztar")
    archives = [shutil.make_archive(str(tmp_path / "x"), name, source) for name in formats]
    for number, archive in enumerate(archives):
        target = tmp_path / str(number)
        unpack(Path(archive), target, name="x")
        names = {p.relative_to(target).as_posix() for p in target.rglob("*") if p.is_file()}
        assert {name: (target / name).read_bytes() for name in names} == files
