// SPDX-License-Identifier: Apache-2.0
// What an admin wants of a named disk. It is to a named disk what the toolstack's entry in xenstore
// is to a vbd: the daemon serves the disk for as long as the wish stands and is active.
//
// It is kept as RUN/named/NAME.wish, text of lines KEY=VALUE, values percent-encoded, replaced
// whole:
//
//   1. `attach` serves the disk, writes the file, and only then tells of the device.
//   2. `detach` removes the file before anything is taken down, and only while nobody uses the
//      device.
//   3. `deactivate` writes the file anew, as inactive, as `detach` removes it; `activate` writes it
//      as active, as `attach` does.
//
// A crash before the file is written as active, or after it was removed or written as inactive,
// leaves a disk that the next daemon finds by its record and takes down.

import Glibc
internal import SystemIO

/// What is wanted of a named disk.
package struct NamedWish: Sendable, Equatable {
  /// The spec, beginning "dmu:".
  package var params: String
  /// Whether it is only read.
  package var readOnly: Bool
  /// The virtual machine that the disk belongs to; nil: none was named.
  package var owner: OwnerID?
  /// Whether udev may look for file systems and volumes on the device.
  package var isProbed: Bool
  /// Since when the disk is only kept by its name, without device, worker and lock; Unix time. nil:
  /// it is active.
  package var inactiveSince: Int64?

  /// A wish from its parts.
  package init(
    params: String, readOnly: Bool = false, owner: OwnerID? = nil, isProbed: Bool = false
  ) {
    self.params = params
    self.readOnly = readOnly
    self.owner = owner
    self.isProbed = isProbed
  }

  /// Whether the disk is to be served.
  var isActive: Bool { inactiveSince == nil }

  /// The same as xenstore's entries say it; nil: nothing is wanted now.
  var wanted: WantedDisk? {
    isActive ? WantedDisk(params: params, readOnly: readOnly, going: false) : nil
  }

  /// Whether it is of the same disk, active or not.
  func isOfSameDisk(as other: NamedWish) -> Bool {
    var (one, other) = (self, other)
    (one.inactiveSince, other.inactiveSince) = (nil, nil)
    return one == other
  }

  var text: String {
    var fields = [
      "params=" + PercentCode.encode(params), "readonly=" + (readOnly ? "1" : "0"),
      "probe=" + (isProbed ? "1" : "0"),
    ]
    if let owner { fields.append("owner=\(owner)") }
    if let inactiveSince { fields.append("inactive=\(inactiveSince)") }
    return fields.map { $0 + "\n" }.joined()
  }

  /// Reads such a text; nil when it is not one.
  init?(_ text: String) {
    guard let fields = DiskRecord.fields(text), let params = fields["params"] else { return nil }
    self.init(
      params: params, readOnly: fields["readonly"] == "1",
      owner: fields["owner"].flatMap { OwnerID($0) }, isProbed: fields["probe"] == "1")
    inactiveSince = fields["inactive"].flatMap { Int64($0) }
  }
}

/// The UUID of a virtual machine, in lower case.
package struct OwnerID: Sendable, Hashable, CustomStringConvertible {
  /// "8c7e6ac0-4b2b-4b5c-9f6e-0a4c4d1f2e3b".
  package let description: String

  /// Reads a UUID; nil for any other text.
  package init?(_ text: some StringProtocol) {
    let parts = text.split(separator: "-", omittingEmptySubsequences: false)
    guard parts.map(\.utf8.count) == [8, 4, 4, 4, 12],
      parts.allSatisfy({ $0.utf8.allSatisfy { OwnerID.isHex($0) } })
    else { return nil }
    description = text.lowercased()
  }

  private static func isHex(_ byte: UInt8) -> Bool {
    (UInt8(ascii: "0")...UInt8(ascii: "9")).contains(byte)
      || (UInt8(ascii: "a")...UInt8(ascii: "f")).contains(byte | 0x20)
  }
}

/// The wishes in writing. All calls block.
struct NamedWishes: Sendable {
  let folder: String

  private static let suffix = ".wish"

  private func path(_ name: DiskName) -> String { "\(folder)/\(name)\(Self.suffix)" }

  /// Makes the folder.
  func prepare() throws(IOError) {
    guard mkdir(folder, 0o700) == 0 || errno == EEXIST else { throw IOError.last("make", folder) }
  }

  /// All of them; a file that makes no sense is passed over, and named.
  func load() throws(IOError) -> (wishes: [DiskName: NamedWish], strange: [String]) {
    var wishes: [DiskName: NamedWish] = [:]
    var strange: [String] = []
    for entry in try Folder.names(folder) where entry.hasSuffix(Self.suffix) {
      if let name = DiskName(entry.dropLast(Self.suffix.count)), let wish = try read(name) {
        wishes[name] = wish
      } else {
        strange.append("\(folder)/\(entry)")
      }
    }
    return (wishes, strange)
  }

  /// nil for a file that makes no sense.
  private func read(_ name: DiskName) throws(IOError) -> NamedWish? {
    do throws(IOError) { return NamedWish(try TextFile.read(path(name))) } catch {
      guard error.code == EILSEQ || error.code == EFBIG else { throw error }
      return nil
    }
  }

  func save(_ name: DiskName, _ wish: NamedWish) throws(IOError) {
    try prepare()
    try TextFile.replace(path(name), with: wish.text)
  }

  func remove(_ name: DiskName) throws(IOError) {
    let path = path(name)
    guard unlink(path) == 0 || errno == ENOENT else { throw IOError.last("remove", path) }
  }
}
