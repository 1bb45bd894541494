// SPDX-License-Identifier: Apache-2.0
// What is remembered of a source that a hook has attached, or may have, across a restart of the
// daemon: RUN/sources/N, text of lines KEY=VALUE, values percent-encoded, replaced whole.
//
// Invariants:
// - It is written before a hook is first asked to attach, and removed after `detach` has succeeded:
//   whatever a hook may have attached, the next daemon knows of.
// - A path stands in it only while the source is attached there.

import Glibc
internal import SystemIO

/// A source in writing.
struct SourceRecord: Sendable, Equatable {
  let source: Source
  /// Whether it may be written to.
  var isWritable: Bool
  /// What its hook has printed; nil: the hook was asked to attach or detach it, and nobody knows
  /// what came of it.
  var attached: AttachedSource?
  /// The disk for which it was attached last.
  var disk: DiskID

  init(_ source: Source, isWritable: Bool, attached: AttachedSource? = nil, disk: DiskID) {
    self.source = source
    self.isWritable = isWritable
    self.attached = attached
    self.disk = disk
  }

  var text: String {
    var fields = [
      "source=" + PercentCode.encode("\(source)"), "writable=" + (isWritable ? "1" : "0"),
      "disk=\(disk)",
    ]
    if let attached {
      fields.append("path=" + PercentCode.encode(attached.path))
      fields.append("shared=" + (attached.isShared ? "1" : "0"))
    }
    return fields.map { $0 + "\n" }.joined()
  }

  /// Reads such a text; nil when it is not one.
  init?(_ text: String) {
    guard let fields = DiskRecord.fields(text),
      let source = fields["source"].flatMap({ Source($0) }),
      let disk = fields["disk"].flatMap({ DiskID($0) })
    else { return nil }
    self.init(source, isWritable: fields["writable"] == "1", disk: disk)
    guard let path = fields["path"] else { return }
    do throws(AttachedSource.Senseless) { attached = try AttachedSource(path) } catch { return nil }
    attached?.isShared = fields["shared"] == "1"
  }
}

/// The records, each by its number. All calls block.
struct SourceRecords: Sendable {
  let folder: String

  private func path(_ number: UInt64) -> String { "\(folder)/\(number)" }

  /// All of them; a file that makes no sense is passed over, and named.
  func load() throws(IOError) -> (records: [UInt64: SourceRecord], strange: [String]) {
    var records: [UInt64: SourceRecord] = [:]
    var strange: [String] = []
    for name in try Folder.names(folder) {
      guard let number = UInt64(name) else { continue }
      do throws(IOError) { records[number] = SourceRecord(try TextFile.read(path(number))) } catch {
        guard error.code == EILSEQ || error.code == EFBIG else { throw error }
      }
      if records[number] == nil { strange.append(path(number)) }
    }
    return (records, strange)
  }

  func save(_ number: UInt64, _ record: SourceRecord) throws(IOError) {
    try TextFile.replace(path(number), with: record.text)
  }

  func remove(_ number: UInt64) throws(IOError) {
    let path = path(number)
    guard unlink(path) == 0 || errno == ENOENT else { throw IOError.last("remove", path) }
  }
}
