#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Prints length and SHA-256 of the disk in an image, as a library that is not QEMU reads it.

    disk.py READER IMAGE [BASE]     READER: vhdi vmdk qcow (libyal), vhd vmdk-d qcow2 (dissect)
    disk.py write-stream RAW IMAGE  a stream-optimized VMDK, by python3-vmdkstream
"""

import hashlib
import pathlib
import sys

PIECE = 1 << 20


def libyal(module, path, base):
    library = __import__(module)
    if module == "pyvmdk":
        disk = library.handle()
        disk.open(path)
        disk.open_extent_data_files()
    else:
        disk = library.file()
        disk.open(path)
    if base:
        parent = library.file()
        parent.open(base)
        disk.set_parent(parent)
    return disk, disk.get_media_size()


class Sectors:
    """A disk that is read by sectors: dissect's own read looks past an odd end."""

    def __init__(self, disk):
        self.disk, self.at = disk, 0

    def seek(self, offset):
        self.at = offset

    def read(self, count):
        data = self.disk.read_sectors(self.at // 512, count // 512)
        self.at += len(data)
        return data


def dissect(reader, path):
    if reader == "vhd":
        from dissect.hypervisor.disk.vhd import VHD

        disk = VHD(open(path, "rb"))
    elif reader == "vmdk-d":
        from dissect.hypervisor.disk.vmdk import VMDK

        disk = VMDK(pathlib.Path(path))
        return Sectors(disk), disk.size
    else:
        from dissect.hypervisor.disk.qcow2 import QCow2

        disk = QCow2(pathlib.Path(path))
        disk = disk.open() if hasattr(disk, "open") else disk
    return disk, disk.size


def digest(disk, size):
    total = hashlib.sha256()
    disk.seek(0)
    left = size
    while left > 0:
        data = disk.read(min(PIECE, left))
        if not data:
            raise EOFError(f"{left} bytes are missing")
        total.update(data)
        left -= len(data)
    return total.hexdigest()


def write_stream(source, target):
    import VMDKstream

    VMDKstream.convert_to_stream(source, target)


def main():
    if sys.argv[1] == "write-stream":
        return write_stream(sys.argv[2], sys.argv[3])
    reader, path = sys.argv[1:3]
    base = sys.argv[3] if len(sys.argv) > 3 else None
    if reader in ("vhdi", "vmdk", "qcow"):
        disk, size = libyal("py" + reader, path, base)
    else:
        disk, size = dissect(reader, path)
    print(size, digest(disk, size))


if __name__ == "__main__":
    sys.exit(main())
