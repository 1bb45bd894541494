// SPDX-License-Identifier: Apache-2.0
// Which format an image has, and whether it may name other files: the one place that decides
// whom to believe. The table is in docs/spec.md, and a test goes through its cells.
//
// A guest writes its disk as it likes, and could write the header of an image into it. So an
// image that nobody stated to be one may name no file, and what begins like a format that is
// not supported is never taken for a raw disk.

package import Posix

/// What is said of an image before its bytes are looked at.
package struct FormatStatement: Sendable, Equatable {
  /// Who said which format it is.
  package enum Source: Sendable, Equatable {
    /// Whoever runs the command or wrote the spec.
    case stated(ImageKind)
    /// The image above, which may name it, by this word.
    case named(String)
    /// Nobody.
    case nobody
  }

  /// Who said it.
  package var source: Source

  /// A statement by whoever runs the command, if there is one.
  package init(_ stated: ImageKind?) { source = stated.map { .stated($0) } ?? .nobody }

  /// A statement of a base: by whoever runs the command, else by the image above.
  package init(_ stated: ImageKind?, named: String?) {
    self.init(stated)
    if stated == nil, let named { source = .named(named) }
  }
}

/// What was decided of an image.
package struct FormatDecision: Sendable, Equatable {
  /// The format.
  package var kind: ImageKind
  /// Whether only the first bytes say so: the image may name no file, and the guess is
  /// written down nowhere.
  package var isGuessed: Bool

  /// A decision from its parts.
  package init(kind: ImageKind, isGuessed: Bool = false) {
    self.kind = kind
    self.isGuessed = isGuessed
  }

  /// Decides on an image.
  ///
  /// - Throws: `unsupported` for a format that is known by name or by its first bytes and not
  ///   read; `corrupt` for a damaged header; `io`.
  package static func decide(
    _ statement: FormatStatement, of store: any ByteStore
  ) throws(ImageError) -> FormatDecision {
    switch statement.source {
    case .stated(let kind): return FormatDecision(kind: kind)
    case .named(let name):
      // What only says where the bytes come from is raw.
      if name == "file" || name == "host_device" {
        return FormatDecision(kind: .raw)
      }
      guard let kind = ImageKind(rawValue: name) else {
        throw ImageError(
          .unsupported,
          "base \(store.name) is of format '\(name)', which is not read here: convert it")
      }
      return FormatDecision(kind: kind)
    case .nobody:
      let kind = try ImageKind.probe(store)
      // Nothing can be named by what is raw.
      return FormatDecision(kind: kind, isGuessed: kind != .raw)
    }
  }

  /// Throws `unsupported` when the image may not name a file.
  package func checkMayName(_ path: String, _ store: any ByteStore) throws(ImageError) {
    guard isGuessed else { return }
    throw ImageError(
      .unsupported,
      "\(store.name) begins like an image that names \(path), but nobody says that it is "
        + "one: give its format (\(kind.rawValue), or raw if it is a disk of its own) with -f, "
        + "or with base-format where it is a base")
  }
}

extension ImageKind {
  /// A format that is known by its bytes and not read.
  private struct Foreign {
    var name: String
    var offset: UInt64 = 0
    var bytes: [UInt8]
  }

  private static let foreign: [Foreign] = [
    Foreign(name: "vhdx", bytes: Array("vhdxfile".utf8)),
    Foreign(name: "vdi", offset: 64, bytes: [0x7F, 0x10, 0xDA, 0xBE]),
    Foreign(name: "qed", bytes: Array("QED\0".utf8)),
    Foreign(name: "parallels", bytes: Array("WithoutFreeSpace".utf8)),
    Foreign(name: "parallels", bytes: Array("WithouFreSpacExt".utf8)),
    Foreign(name: "luks", bytes: Array("LUKS".utf8) + [0xBA, 0xBE]),
    Foreign(name: "cloop", bytes: Array("#!/bin/sh\n#V2.0 Format".utf8)),
    Foreign(name: "vmdk (seSparse)", bytes: [0xBE, 0xBA, 0xFE, 0xCA, 0, 0, 0, 0]),
    Foreign(name: "xz", bytes: [0xFD, 0x37, 0x7A, 0x58, 0x5A, 0]),
    Foreign(name: "gz", bytes: [0x1F, 0x8B, 8]),
    Foreign(name: "zstd", bytes: [0x28, 0xB5, 0x2F, 0xFD]),
    Foreign(name: "lz4", bytes: [0x04, 0x22, 0x4D, 0x18]),
    Foreign(name: "bz2", bytes: Array("BZh".utf8)),
    Foreign(name: "7z", bytes: [0x37, 0x7A, 0xBC, 0xAF, 0x27, 0x1C]),
    Foreign(name: "zip", bytes: [0x50, 0x4B, 3, 4]),
    Foreign(name: "tar (OVA, XVA)", offset: 257, bytes: Array("ustar".utf8)),
    Foreign(name: "iso", offset: 32769, bytes: Array("CD001".utf8)),
  ]
  /// Where the last of those bytes ends.
  private static let foreignReach = 32774

  /// What a store's bytes say it is; `raw` for what begins like nothing that is known.
  ///
  /// - Throws: `unsupported` for a format that is known and not read, by its name; `corrupt`
  ///   for an image whose header is damaged; `io`.
  package static func probe(_ store: any ByteStore) throws(ImageError) -> ImageKind {
    let bytes = try io { () throws(IOError) in try store.read(at: 0, count: foreignReach) }
    if Qcow2Header.isMagic(bytes) { return .qcow2 }
    if QcowHeader.isMagic(bytes) { return .qcow }
    if VmdkLayout.isMagic(bytes) { return .vmdk }
    if DscowHeader.isMagic(bytes) { return .dscow }
    if try VhdHeader.footer(of: store) != nil { return .vhd }
    if let name = try foreignName(bytes, store) {
      throw ImageError(
        .unsupported,
        "\(store.name) is of format \(name), which is not read here: convert or unpack it first, "
          + "or, if its bytes are the disk, say that it is raw (-f raw, base-format=raw)")
    }
    return .raw
  }

  private static func foreignName(
    _ bytes: [UInt8], _ store: any ByteStore
  ) throws(ImageError) -> String? {
    for format in foreign where bytes[Int(format.offset)...].starts(with: format.bytes) {
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
