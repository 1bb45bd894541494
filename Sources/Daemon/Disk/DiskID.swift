// SPDX-License-Identifier: Apache-2.0
// Which disk: one that a domain sees as a vbd, or one that an admin has given a name.
//
// A disk keeps the identity of the vbd for which it was started, also when that vbd has gone and
// another domain uses the disk (Reconciler+Join). The same numbers may come again meanwhile: the disk
// that is started for them has a life number more.
//
// Invariant: the text of a vbd begins with a digit, a name with a letter. So the text of a disk
// (of its directory, its device, its worker) is that of no other disk.

/// A virtual block device of a domain: the domain and its number there, as in backend/vbd/D/V.
package struct VBD: Hashable, Comparable, Sendable, CustomStringConvertible {
  /// The domain that the device belongs to.
  package let domain: Int
  /// Its number in the domain: 51712 is xvda.
  package let device: Int

  /// A device by its numbers.
  package init(domain: Int, device: Int) {
    self.domain = domain
    self.device = device
  }

  /// "5-51712"; nil for any other text.
  package init?(_ text: some StringProtocol) {
    let parts = text.split(separator: "-", omittingEmptySubsequences: false)
    guard parts.count == 2, let domain = VBD.number(parts[0]), let device = VBD.number(parts[1])
    else { return nil }
    self.init(domain: domain, device: device)
  }

  /// From a xenstore path that holds "backend/vbd/D/V", whatever comes before and after.
  package init?(path: some StringProtocol) {
    let parts = path.split(separator: "/")
    guard
      let vbd = parts.indices.first(where: {
        parts[$0] == "vbd" && $0 > parts.startIndex && parts[$0 - 1] == "backend"
      }), vbd + 2 < parts.endIndex, let domain = VBD.number(parts[vbd + 1]),
      let device = VBD.number(parts[vbd + 2])
    else { return nil }
    self.init(domain: domain, device: device)
  }

  /// A plain decimal number as xenstore has it, no sign and no leading zero.
  private static func number(_ text: some StringProtocol) -> Int? {
    guard let number = UInt32(text), String(number) == text else { return nil }
    return Int(number)
  }

  /// "backend/vbd/5/51712", below this domain's own path.
  package var backendPath: String { "backend/vbd/\(domain)/\(device)" }

  /// "5-51712".
  package var description: String { "\(domain)-\(device)" }

  /// The name that the number stands for: "xvda", "xvdb3", "hda1", "sda"; the number itself
  /// when it is none of these. Source: Xen's docs/man/xen-vbd-interface.7.
  package var vdev: String {
    func letters(_ index: Int) -> String {
      index < 26 ? letter(index) : letters(index / 26 - 1) + letter(index % 26)
    }
    func letter(_ index: Int) -> String {
      String(UnicodeScalar(UInt8(ascii: "a") + UInt8(index)))
    }
    func named(_ prefix: String, _ disk: Int, _ partition: Int) -> String {
      prefix + letters(disk) + (partition == 0 ? "" : String(partition))
    }
    if device >= 1 << 28 {
      return named("xvd", (device >> 8) & 0xFFFFF, device & 0xFF)
    }
    switch device >> 8 {
    case 202: return named("xvd", (device & 0xFF) >> 4, device & 0xF)
    case 8: return named("sd", (device & 0xFF) >> 4, device & 0xF)
    case 3: return named("hd", (device & 0xFF) >> 6, device & 0x3F)
    case 22: return named("hd", 2 + ((device & 0xFF) >> 6), device & 0x3F)
    default: return String(device)
    }
  }

  /// By domain, then by number.
  package static func < (one: VBD, other: VBD) -> Bool {
    (one.domain, one.device) < (other.domain, other.device)
  }
}

/// The name of a disk that `dmu-xen attach` has made: /dev/dmu/NAME is its device.
package struct DiskName: Hashable, Comparable, Sendable, CustomStringConvertible {
  /// The longest name. A device of the device-mapper has room for 127 bytes with its prefix, the
  /// path of a worker's link for 107 with the run directory.
  package static let longest = 63
  /// The module's own nodes in /dev/dmu begin like this, for all devices of dmu-xend.
  static let reserved = "dmu-"
  /// What a name has to be, in words.
  package static let rule =
    "a name begins with a letter and has at most \(longest) letters, digits and characters of"
    + " '+-._'; it does not begin with '\(reserved)'"

  /// The name.
  package let description: String

  /// A name from its text; nil when it breaks the rule.
  package init?(_ text: some StringProtocol) {
    guard (1...DiskName.longest).contains(text.utf8.count), !text.hasPrefix(DiskName.reserved),
      let first = text.utf8.first, DiskName.isLetter(first),
      text.utf8.allSatisfy({ DiskName.isLetter($0) || DiskName.others.contains($0) })
    else { return nil }
    description = String(text)
  }

  /// From the path of a disk's device, "/dev/dmu/NAME"; nil for any other.
  package init?(path: some StringProtocol) {
    guard path.hasPrefix(DiskName.folder) else { return nil }
    self.init(path.dropFirst(DiskName.folder.count))
  }

  /// Where the devices of named disks are.
  private static let folder = "/dev/dmu/"
  private static let others = Set("0123456789+-._".utf8)

  private static func isLetter(_ byte: UInt8) -> Bool {
    (UInt8(ascii: "a")...UInt8(ascii: "z")).contains(byte | 0x20)
  }

  /// By their bytes.
  package static func < (one: DiskName, other: DiskName) -> Bool {
    one.description < other.description
  }
}

/// Names one disk.
package enum DiskID: Hashable, Comparable, Sendable, CustomStringConvertible {
  /// The toolstack wants it for a domain: xenstore says so.
  case vbd(VBD)
  /// The same, while a disk that was started for an earlier vbd of these numbers lives on. From 1 on.
  case again(VBD, Int)
  /// An admin wants it: the daemon has it in writing (NamedWish).
  case named(DiskName)

  /// A disk of a domain, by its numbers.
  package init(domain: Int, device: Int) {
    self = .vbd(VBD(domain: domain, device: device))
  }

  /// "5-51712", "5-51712+1" or a name: as in messages to the worker and as the disk's directory is
  /// called.
  package init?(_ text: some StringProtocol) {
    let parts = text.split(separator: "+", omittingEmptySubsequences: false)
    if let vbd = VBD(text) {
      self = .vbd(vbd)
    } else if parts.count == 2, let vbd = VBD(parts[0]), let life = Int(parts[1]), life > 0,
      String(life) == parts[1]
    {
      self = .again(vbd, life)
    } else if let name = DiskName(text) {
      self = .named(name)
    } else {
      return nil
    }
  }

  /// The vbd, if it is one.
  package var vbd: VBD? {
    switch self {
    case .vbd(let vbd), .again(let vbd, _): vbd
    case .named: nil
    }
  }

  /// The name, if it has one.
  package var name: DiskName? {
    guard case .named(let name) = self else { return nil }
    return name
  }

  /// "5-51712", "5-51712+1", or the name.
  package var description: String {
    switch self {
    case .vbd(let vbd): "\(vbd)"
    case .again(let vbd, let life): "\(vbd)+\(life)"
    case .named(let name): "\(name)"
    }
  }

  /// For sentences: "domain 5 (xvda)", "the named disk web".
  var words: String {
    switch self {
    case .vbd(let vbd), .again(let vbd, _): "domain \(vbd.domain) (\(vbd.vdev))"
    case .named(let name): "the named disk \(name)"
    }
  }

  /// What dmu-xen's commands call it: "5", "web".
  var target: String {
    switch self {
    case .vbd(let vbd), .again(let vbd, _): "\(vbd.domain)"
    case .named(let name): "\(name)"
    }
  }

  /// Domains' disks first.
  package static func < (one: DiskID, other: DiskID) -> Bool {
    switch (one, other) {
    case (.named(let one), .named(let other)): one < other
    case (.named, _): false
    case (_, .named): true
    case (.vbd(let one), .vbd(let other)): one < other
    case (.vbd(let one), .again(let other, _)): one <= other
    case (.again(let one, _), .vbd(let other)): one < other
    case (.again(let one, let life), .again(let other, let otherLife)):
      (one, life) < (other, otherLife)
    }
  }
}
