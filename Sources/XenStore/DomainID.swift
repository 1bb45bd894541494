// SPDX-License-Identifier: Apache-2.0

/// The number that Xen knows a domain by; 0 is the control domain.
///
/// Ids of running domains lie below 0x7FF0; the numbers above have meanings of their own.
/// Source: xen/include/public/xen.h, DOMID_FIRST_RESERVED.
package struct DomainID: RawRepresentable, Hashable, Sendable {
  /// The id as Xen passes it, a 16-bit number.
  package let rawValue: UInt16

  /// Wraps a number that is known to be a domain id.
  package init(rawValue: UInt16) {
    self.rawValue = rawValue
  }

  /// Reads an id as it stands in a xenstore path: decimal digits, nothing else, below 0x7FF0.
  package init?(_ text: some StringProtocol) {
    guard text.utf8.allSatisfy({ (0x30...0x39).contains($0) }),
      let number = UInt16(text), number < 0x7FF0
    else { return nil }
    self.init(rawValue: number)
  }
}

extension DomainID: Comparable {
  /// Orders ids by number.
  package static func < (left: DomainID, right: DomainID) -> Bool {
    left.rawValue < right.rawValue
  }
}

extension DomainID: ExpressibleByIntegerLiteral {
  /// Wraps a literal.
  package init(integerLiteral value: UInt16) {
    self.init(rawValue: value)
  }
}

extension DomainID: CustomStringConvertible {
  /// The number in decimal.
  package var description: String { String(rawValue) }
}
