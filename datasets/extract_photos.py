"""Take the photographs that photos.tsv lists out of Debian packages, and split them.

Writes OUT/train, OUT/validation, OUT/test and OUT/ATTRIBUTION.tsv. Standard library and Pillow.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from PIL import Image, ImageOps

CATALOG = Path(__file__).with_name("photos.tsv")
SHARES = {"test": 0.1, "validation": 0.1}  # of the photographs; the others are for training
NEAR = 6  # of 64 bits: photographs whose hashes differ by at most this many are near duplicates
_COMPRESSED, _DIRECTORY, _ZSTD = 1, 2, 4  # flags of a node in a Qt resource file


class Photo(NamedTuple):
    """A photograph in a Debian package.

    Attributes:
        package: name of the package.
        path: inside the package, or inside one of its Qt resource files; it begins with a slash.
        license, author: as the package states them.
    """

    package: str
    path: str
    license: str
    author: str

    @property
    def name(self) -> str:
        """The file name that it gets: unique, and without folders."""
        return "-".join([self.package, *PurePosixPath(self.path).parts[1:][-3:]])


def read_catalog(path: Path = CATALOG) -> list[Photo]:
    """Return the photographs of a catalog, a table with tabs and a header."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        next(rows)
        return [Photo(*row) for row in rows]


def package_files(deb: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (path, contents) of the files in a Debian package, and of those in its .rcc files.

    Raises:
        subprocess.CalledProcessError: dpkg-deb cannot read the package.
    """
    command = ["dpkg-deb", "--fsys-tarfile", str(deb)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        with tarfile.open(fileobj=process.stdout, mode="r|") as tar:
            for member in tar:
                file = tar.extractfile(member) if member.isreg() else None
                if file is None:
                    continue
                data = file.read()
                if member.name.endswith(".rcc"):
                    yield from read_rcc(data)
                else:
                    yield member.name.removeprefix("."), data
        process.stdout.read()  # to its end, so that dpkg-deb does not fail
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


def read_rcc(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield (path, contents) of the files in a Qt resource file (versions 1 to 3), big-endian.

    The header is "qres", version, and where tree, data and names begin. A node of the tree has 14
    bytes (22 from version 2 on): where its name is, flags, and for a folder the number and the
    index of its children, for a file where its data is. Names are UTF-16 after length and hash.

    Raises:
        ValueError: it is not such a file, or a file in it is compressed with zstd.
    """
    magic, version, tree, contents, names = struct.unpack_from(">4s4I", data)
    if magic != b"qres" or not 1 <= version <= 3:
        raise ValueError(f"got magic {magic!r} and version {version}; expected qres, 1 to 3")
    waiting = [(0, "")]
    while waiting:
        index, parent = waiting.pop()
        node = tree + index * (14 if version == 1 else 22)
        name, flags = struct.unpack_from(">IH", data, node)
        path = ""
        if index:
            (units,) = struct.unpack_from(">H", data, names + name)
            text = names + name + 6
            path = f"{parent}/{data[text : text + 2 * units].decode('utf-16-be')}"
        if flags & _DIRECTORY:
            number, first = struct.unpack_from(">II", data, node + 6)
            if first <= index:
                raise ValueError(f"{path}: its children come before it")
            waiting += [(child, path) for child in reversed(range(first, first + number))]
            continue
        (offset,) = struct.unpack_from(">I", data, node + 10)
        (size,) = struct.unpack_from(">I", data, contents + offset)
        start = contents + offset + 4
        body = data[start : start + size]
        if flags & _ZSTD:
            raise ValueError(f"{path} is compressed with zstd; expected zlib or none")
        yield path, zlib.decompress(body[4:]) if flags & _COMPRESSED else body


def look_of(image: Image.Image) -> int:
    """Return 64 bits that near duplicates share: where gray values rise from left to right.

    The mirrored image has the same bits.
    """
    hashes = []
    for view in (image, ImageOps.mirror(image)):
        gray = view.convert("L").resize((9, 8), Image.Resampling.BOX).tobytes()
        bits = [gray[9 * y + x] < gray[9 * y + x + 1] for y in range(8) for x in range(8)]
        hashes.append(sum(bit << n for n, bit in enumerate(bits)))
    return min(hashes)


def groups_of(looks: dict[str, int]) -> dict[str, str]:
    """Map each name to the first name among its near duplicates, so that they stay together."""
    first: dict[str, str] = {}
    names = sorted(looks)
    for number, name in enumerate(names):
        near = [o for o in names[:number] if (looks[o] ^ looks[name]).bit_count() <= NEAR]
        first[name] = first[near[0]] if near else name
    return first


def split_of(name: str) -> str:
    """Return the split of a photograph; it depends on the name alone."""
    place = int.from_bytes(hashlib.sha256(f"photos\0{name}".encode()).digest()[:8], "big") / 2**64
    for split, share in SHARES.items():
        if place < share:
            return split
        place -= share
    return "train"


def extract(debs: Path, out: Path, catalog: list[Photo]) -> tuple[int, list[Photo]]:
    """Write the photographs of a catalog that lie in the packages of a folder, and their credits.

    Returns:
        How many were written, and those that the packages do not hold.
    """
    wanted = {(photo.package, photo.path): photo for photo in catalog}
    found: dict[str, tuple[Photo, bytes]] = {}
    for deb in sorted(debs.glob("*.deb")):
        package = deb.name.split("_")[0]
        for path, data in package_files(deb):
            if photo := wanted.get((package, path)):
                found[photo.name] = photo, data
    looks = {name: look_of(Image.open(io.BytesIO(data))) for name, (_, data) in found.items()}
    first = groups_of(looks)
    lines = ["file\tpackage\tpath\tauthor\tlicense"]
    for name, (photo, data) in sorted(found.items()):
        file = Path(split_of(first[name])) / name
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        (out / file).write_bytes(data)
        lines.append("\t".join([str(file), photo.package, photo.path, photo.author, photo.license]))
    if found:
        (out / "ATTRIBUTION.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(found), [photo for photo in catalog if photo.name not in found]


def main() -> None:
    """Read the options and extract."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("debs", type=Path, help="folder of the downloaded packages")
    parser.add_argument("out", type=Path, help="folder to write")
    arguments = parser.parse_args()
    number, missing = extract(arguments.debs, arguments.out, read_catalog())
    packages = sorted({photo.package for photo in missing})
    if missing:
        print(f"{len(missing)} photographs are not in the packages: {', '.join(packages)}")
    if not number:
        sys.exit("no photograph was found")
    print(f"{number} photographs in {arguments.out}; authors and licenses in ATTRIBUTION.tsv there")


if __name__ == "__main__":
    main()
