// SPDX-License-Identifier: Apache-2.0
// The formats that this daemon's workers know, and their options. The daemon never reads
// an image: it knows a format by name only.

package import WorkerLink

/// A format by name, with the options that a spec may give it.
package struct KnownFormat: Sendable, Hashable {
  /// Its name in a spec.
  package let name: String
  /// Its options: name and meaning.
  package let options: [(name: String, meaning: String)]
  /// Bytes of a block that a store may be created with; nil: stores of this format are not
  /// created here.
  package let blockSizes: ClosedRange<UInt32>?

  private static let baseFormat = (
    name: "base-format",
    meaning: "the base's format, whatever the store says of it (default: what the store says)"
  )

  private static let create = (
    name: "create",
    meaning: "whether a store that does not exist is created when the domain boots, yes or no"
      + " (default: yes below store.create-in)"
  )

  private static let baseDirectory = (
    name: "base-directory",
    meaning: "the directory below which bases have to lie that images name (default: those of"
      + " base.directories)"
  )

  private static let transport = (
    name: "transport",
    meaning: "the way to the kernel: auto, dm or nbd (default: what the configuration says)"
  )

  /// All of them.
  package static let all: [KnownFormat] = [
    KnownFormat(
      name: "dscow",
      options: [
        (
          "block-size",
          "size of a block of a store that is created, 4K to 4M, a power of two"
        ),
        baseFormat, baseDirectory, create,
        ("force", "yes: use the store although its base has changed (default: no)"),
        transport,
      ], blockSizes: 4096...4_194_304),
    KnownFormat(
      name: "qcow2",
      options: [
        (
          "block-size",
          "size of a cluster of a store that is created, 512 to 2M, a power of two"
        ), baseFormat, baseDirectory, create, transport,
      ], blockSizes: 512...2_097_152),
    KnownFormat(name: "qcow", options: [baseFormat, baseDirectory, transport], blockSizes: nil),
    KnownFormat(name: "vhd", options: [baseFormat, baseDirectory, transport], blockSizes: nil),
    KnownFormat(name: "vpc", options: [baseFormat, baseDirectory, transport], blockSizes: nil),
    KnownFormat(name: "vmdk", options: [baseFormat, baseDirectory, transport], blockSizes: nil),
    KnownFormat(name: "raw", options: [transport], blockSizes: nil),
  ]

  /// The format of that name.
  package static func named(_ name: String) -> KnownFormat? { all.first { $0.name == name } }

  /// Formats are equal by name.
  package static func == (one: KnownFormat, other: KnownFormat) -> Bool { one.name == other.name }

  /// Hashes the name.
  package func hash(into hasher: inout Hasher) { hasher.combine(name) }
}

/// The options of a spec, understood.
package struct FormatOptions: Sendable, Hashable {
  /// Bytes of a block of a store that is created; nil: the format's own choice.
  package var blockSize: UInt32?
  /// Whether to use a store although its base has changed.
  package var force = false
  /// Whether a store that does not exist is created; nil: as the configuration says of its
  /// place.
  package var create: Bool?
  /// Name of the base's format; nil: what the store says.
  package var baseFormat: String?
  /// The directory below which bases have to lie that images name; nil: as the configuration says.
  package var baseDirectory: String?
  /// By which way the kernel shall reach the disk; nil: what the configuration says.
  package var transport: Transport?

  /// Understands the options of a spec. Throws: unknown format, unknown option, bad value.
  package init(_ spec: Spec) throws(DiskFailure) {
    guard let format = KnownFormat.named(spec.format) else {
      throw .formatUnknown(spec.format)
    }
    for option in spec.options {
      guard format.options.contains(where: { $0.name == option.name }) else {
        throw .optionUnknown(option.name, format)
      }
      switch option.name {
      case "block-size":
        let sizes: ClosedRange<UInt32> = format.blockSizes ?? 0...0
        guard let size = ByteCount.parse(option.value), let small = UInt32(exactly: size),
          sizes.contains(small), small.nonzeroBitCount == 1
        else {
          let (least, most) = (UInt64(sizes.lowerBound), UInt64(sizes.upperBound))
          throw .optionBad(
            option.name, option.value,
            wanted: "a power of two from \(ByteCount.short(least)) to \(ByteCount.short(most))")
        }
        blockSize = small
      case "base-format":
        guard let base = KnownFormat.named(option.value) else {
          throw .optionBad(
            option.name, option.value,
            wanted: "one of " + KnownFormat.all.map(\.name).joined(separator: ", "))
        }
        baseFormat = base.name
      case "base-directory":
        guard option.value.hasPrefix("/") else {
          throw .optionBad(option.name, option.value, wanted: "an absolute path")
        }
        baseDirectory = option.value
      case "force": force = try FormatOptions.flag(option)
      case "create": create = try FormatOptions.flag(option)
      case "transport":
        guard let value = Transport(rawValue: option.value) else {
          throw .optionBad(option.name, option.value, wanted: "auto, dm or nbd")
        }
        transport = value
      default: throw .optionUnknown(option.name, format)
      }
    }
  }
}

extension FormatOptions {
  private static func flag(_ option: Spec.Option) throws(DiskFailure) -> Bool {
    guard let value = ["yes": true, "no": false][option.value] else {
      throw .optionBad(option.name, option.value, wanted: "yes or no")
    }
    return value
  }
}

/// Numbers of bytes as people write them.
package enum ByteCount {
  /// "4096", "64K", "1M", "2G", "1T": powers of 1024. Nil for anything else.
  package static func parse(_ text: String) -> UInt64? {
    let units: [Character: UInt64] = [
      "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40,
    ]
    guard let last = text.last else { return nil }
    let unit = units[Character(last.uppercased())]
    let digits = unit == nil ? text[...] : text.dropLast()
    guard !digits.isEmpty, digits.allSatisfy({ $0.isASCII && $0.isNumber }),
      let number = UInt64(digits)
    else { return nil }
    let (product, overflow) = number.multipliedReportingOverflow(by: unit ?? 1)
    return overflow ? nil : product
  }

  /// "512", "4K", "1.5G": three or four digits and the unit.
  package static func short(_ bytes: UInt64) -> String {
    let units = ["", "K", "M", "G", "T", "P", "E"]
    var value = Double(bytes)
    var unit = 0
    while value >= 1024 && unit < units.count - 1 {
      value /= 1024
      unit += 1
    }
    if unit == 0 { return String(bytes) }
    let tenths = Int((value * 10).rounded())
    return value < 100 && tenths % 10 != 0
      ? "\(tenths / 10).\(tenths % 10)\(units[unit])" : "\(Int(value.rounded()))\(units[unit])"
  }
}
