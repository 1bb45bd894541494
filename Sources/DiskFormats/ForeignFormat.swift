// SPDX-License-Identifier: Apache-2.0
// Formats that are known by their bytes and not read: what begins like one of them is never
// taken for a raw disk unless somebody says that it is.

import BlockIO
import SystemIO

/// A format that is known by its bytes and not read.
struct ForeignFormat {
  private var name: String
  private var offset: UInt64 = 0
  private var bytes: [UInt8]

  private static let all: [ForeignFormat] = [
    ForeignFormat(name: "vhdx", bytes: Array("vhdxfile".utf8)),
    ForeignFormat(name: "vdi", offset: 64, bytes: [0x7F, 0x10, 0xDA, 0xBE]),
    ForeignFormat(name: "qed", bytes: Array("QED\0".utf8)),
    ForeignFormat(name: "parallels", bytes: Array("WithoutFreeSpace".utf8)),
    ForeignFormat(name: "parallels", bytes: Array("WithouFreSpacExt".utf8)),
    ForeignFormat(name: "luks", bytes: Array("LUKS".utf8) + [0xBA, 0xBE]),
    ForeignFormat(name: "cloop", bytes: Array("#!/bin/sh\n#V2.0 Format".utf8)),
    ForeignFormat(name: "vmdk (seSparse)", bytes: [0xBE, 0xBA, 0xFE, 0xCA, 0, 0, 0, 0]),
    ForeignFormat(name: "xz", bytes: [0xFD, 0x37, 0x7A, 0x58, 0x5A, 0]),
    ForeignFormat(name: "gz", bytes: [0x1F, 0x8B, 8]),
    ForeignFormat(name: "zstd", bytes: [0x28, 0xB5, 0x2F, 0xFD]),
    ForeignFormat(name: "lz4", bytes: [0x04, 0x22, 0x4D, 0x18]),
    ForeignFormat(name: "bz2", bytes: Array("BZh".utf8)),
    ForeignFormat(name: "7z", bytes: [0x37, 0x7A, 0xBC, 0xAF, 0x27, 0x1C]),
    ForeignFormat(name: "zip", bytes: [0x50, 0x4B, 3, 4]),
    ForeignFormat(name: "tar (OVA, XVA)", offset: 257, bytes: Array("ustar".utf8)),
    ForeignFormat(name: "iso", offset: 32769, bytes: Array("CD001".utf8)),
  ]
  /// So many bytes of a store are looked at: where the last of those ends.
  static let reach = 32774

  /// The name of the format that a store's first bytes, `reach` of them, or its end are of.
  static func name(
    of bytes: [UInt8], _ store: any ByteStore
  ) throws(ImageError) -> String? {
    for format in all where bytes[Int(format.offset)...].starts(with: format.bytes) {
      // Three letters and a digit begin many a text: the first block's mark is asked for, too.
      guard format.name != "bz2" || isBzip(bytes) else { continue }
      return format.name
    }
    guard store.size >= 512 else { return nil }
    let end = store.size - 512
    let last = try io { () throws(IOError) in try store.read(at: end, count: 12) }
    // A disk image of macOS ends in a block of 512 bytes, version 4.
    return last == Array("koly".utf8) + [0, 0, 0, 4, 0, 0, 2, 0] ? "dmg" : nil
  }

  private static func isBzip(_ bytes: [UInt8]) -> Bool {
    let marks: [[UInt8]] = [
      [0x31, 0x41, 0x59, 0x26, 0x53, 0x59], [0x17, 0x72, 0x45, 0x38, 0x50, 0x90],
    ]
    return (0x31...0x39).contains(bytes[3]) && marks.contains { bytes[4...].starts(with: $0) }
  }
}
