// SPDX-License-Identifier: Apache-2.0
// Which disk: the domain that sees it and its number there, as in backend/vbd/D/V.

/// Names one virtual disk of one domain.
package struct DiskID: Hashable, Comparable, Sendable, CustomStringConvertible {
  /// The domain that the disk belongs to.
  package let domain: Int
  /// Its number in the domain: 51712 is xvda.
  package let device: Int

  /// A disk by its numbers.
  package init(domain: Int, device: Int) {
    self.domain = domain
    self.device = device
  }

  /// "5-51712": the name in messages to the worker and of the disk's directory.
  package init?(_ name: some StringProtocol) {
    let parts = name.split(separator: "-", omittingEmptySubsequences: false)
    guard parts.count == 2, let domain = DiskID.number(parts[0]),
      let device = DiskID.number(parts[1])
    else { return nil }
    self.init(domain: domain, device: device)
  }

  /// From a xenstore path that holds "backend/vbd/D/V", whatever comes before and after.
  package init?(path: some StringProtocol) {
    let parts = path.split(separator: "/")
    guard
      let vbd = parts.indices.first(where: {
        parts[$0] == "vbd" && $0 > parts.startIndex && parts[$0 - 1] == "backend"
      }), vbd + 2 < parts.endIndex, let domain = DiskID.number(parts[vbd + 1]),
      let device = DiskID.number(parts[vbd + 2])
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
  package static func < (one: DiskID, other: DiskID) -> Bool {
    (one.domain, one.device) < (other.domain, other.device)
  }
}
