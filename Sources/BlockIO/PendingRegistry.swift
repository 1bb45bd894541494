// SPDX-License-Identifier: Apache-2.0
// The registry of pending logs: one file for each store that a disk writes to through a
// worker, and beside it a text that says whose it is. dmu-xend keeps it; tools look into it
// before they write to a store.
//
//   RUN/pending/KEY         the log (layout: Target/PendingLog.swift)
//   RUN/pending/KEY.info    lines KEY=VALUE; values are percent-encoded
//   RUN/pending/KEY.of      for another file that the disk writes to, which its store names: the
//                           store's KEY
//
// KEY names the store by what does not change with its path: "f-DEVICE-INODE" for a file,
// "b-DEVICE" for a block device, numbers in hexadecimal.
//
// Invariants:
// - A log is made, taken over and removed only by the holder of the store's lock. Whoever has
//   the lock and finds a log that is needed knows that nobody serves the store.
// - The folder may be searched by everybody and listed by root only, so that a tool that is not
//   root learns that there is a log, and nothing else.

import Glibc
package import SystemIO

/// Where the pending logs of stores are kept.
package struct PendingRegistry: Sendable, Hashable {
  /// The run directory of a daemon that was not told otherwise.
  package static let usualRunDirectory = "/run/dmu-xen"
  /// The environment variable that names another run directory to tools.
  package static let variable = "DMU_XEN_RUN"

  /// The folder of the logs.
  package let directory: String

  /// The registry of a run directory.
  package init(runDirectory: String) { directory = runDirectory + "/pending" }

  /// The registry that tools look into.
  package static var ofTools: PendingRegistry {
    let given = getenv(variable).map { String(cString: $0) } ?? ""
    return PendingRegistry(runDirectory: given.isEmpty ? usualRunDirectory : given)
  }

  /// The name of a store's log. Throws the errno of fstat(2).
  package static func key(of store: FileStore) throws(IOError) -> String {
    var status = stat()
    guard fstat(store.raw, &status) == 0 else { throw IOError.last("examine", store.name) }
    func hex(_ number: UInt64) -> String { String(number, radix: 16) }
    if status.st_mode & S_IFMT == S_IFBLK { return "b-" + hex(UInt64(status.st_rdev)) }
    return "f-" + hex(UInt64(status.st_dev)) + "-" + hex(UInt64(status.st_ino))
  }

  /// Path of a log.
  package func log(_ key: String) -> String { directory + "/" + key }

  /// Path of the text beside a log.
  package func info(_ key: String) -> String { log(key) + ".info" }

  /// Path of the mark of a file that a store names.
  package func mark(_ key: String) -> String { log(key) + ".of" }

  /// Why a file may not be written to by a tool that has just locked it: the pending log of its
  /// disk is needed, or the device of its disk is still there. nil: it may. `own`: the log that
  /// the caller itself goes on from. Throws the errno of a system call; a folder that is not there
  /// holds nothing.
  package func hindrance(_ store: FileStore, own: String? = nil) throws(IOError) -> String? {
    var key = try Self.key(of: store)
    if let other = try text(mark(key))?.split(separator: "\n").first { key = String(other) }
    guard key != own, let held = try held(key) else { return nil }
    return "store \(store.name) has writes of a disk that are not in it yet (\(held)):"
      + " run 'dmu-xen recover \(store.name)' first, or, to lose them,"
      + " 'dmu-xen discard-pending \(store.name)'"
  }

  /// What the registry holds of a store, in words; nil: nothing that is needed.
  private func held(_ key: String) throws(IOError) -> String? {
    let path = log(key)
    do throws(IOError) {
      let summary = try PendingSummary(FileStore(path: path, writable: false))
      if summary.isNeeded { return summary.words }
    } catch {
      switch error.code {
      case ENOENT, ENOTDIR: return nil
      // Somebody else's log: that it is there is all that may be known.
      case EACCES: return access(path, F_OK) == 0 ? "its log is \(path)" : nil
      default: throw error
      }
    }
    guard let device = try field("device", of: key), access(device, F_OK) == 0 else { return nil }
    return "its device \(device) is there"
  }

  /// A field of the text beside a log, as it stands; nil when it has none.
  private func field(_ name: String, of key: String) throws(IOError) -> String? {
    let line = try text(info(key))?.split(separator: "\n").first { $0.hasPrefix(name + "=") }
    return line.map { String($0.dropFirst(name.count + 1)) }
  }

  /// A small file; nil when it is not there, or not to be read by this user.
  private func text(_ path: String) throws(IOError) -> String? {
    let file: Descriptor
    do throws(IOError) { file = try Descriptor(path: path, flags: O_RDONLY) } catch {
      if error.code == ENOENT || error.code == ENOTDIR || error.code == EACCES { return nil }
      throw error
    }
    var buffer = [UInt8](repeating: 0, count: 65536)
    let count = Glibc.read(file.raw, &buffer, buffer.count)
    guard count >= 0 else { throw IOError.last("read", path) }
    return String(decoding: buffer[..<count], as: UTF8.self)
  }
}

extension PendingSummary {
  /// What a log holds, for people: "12 placements, a failed flush".
  package var words: String {
    var parts: [String] = []
    if uncommitted > 0 { parts.append("\(uncommitted) placement\(uncommitted == 1 ? "" : "s")") }
    if flushFailed != 0 {
      parts.append("a flush that failed: \(String(cString: strerror(flushFailed)))")
    } else if isFlushing {
      parts.append("a flush without a known result")
    }
    return parts.isEmpty ? "nothing" : parts.joined(separator: ", ")
  }
}
