// SPDX-License-Identifier: Apache-2.0
// Which processes have a file or device open: for sentences, and before anything is taken away.

import Glibc
internal import SystemIO

/// Looks into /proc. What cannot be read (a process that ends, another user's) is skipped: the
/// answer is a hint for people, or one reason among others to leave something alone.
enum FileUsers {
  /// "qemu-img (process 77)" for each process that has the file open, this one left out; at
  /// most `limit`. Blocks.
  static func programs(of identity: FileIdentity, limit: Int = 4) -> [String] {
    var found: [String] = []
    for pid in processes() where pid != getpid() {
      guard descriptors(of: pid).contains(where: { isFile($0, identity) }) else { continue }
      found.append("\(name(of: pid)) (process \(pid))")
      if found.count >= limit { break }
    }
    return found
  }

  /// Every process id.
  static func processes() -> [Int32] {
    names(in: "/proc").compactMap { Int32($0) }.sorted()
  }

  /// Paths below /proc of the descriptors of a process.
  static func descriptors(of pid: Int32) -> [String] {
    names(in: "/proc/\(pid)/fd").map { "/proc/\(pid)/fd/\($0)" }
  }

  /// What a link names; nil when it cannot be read.
  static func link(_ path: String) -> String? {
    do throws(IOError) { return try Folder.target(of: path) } catch { return nil }
  }

  /// Whether a path leads to a file or device, as far as that can be told without waiting.
  static func isFile(_ path: String, _ identity: FileIdentity) -> Bool {
    do throws(IOError) { return FileIdentity(try CachedStatus(path: path)) == identity } catch {
      return false
    }
  }

  /// The first line of a small file of the kernel's; nil when it cannot be read: what it tells of
  /// comes and goes.
  static func line(_ path: String) -> String? {
    do throws(IOError) {
      return try TextFile.readRepairing(path).split(separator: "\n").first.map { String($0) }
    } catch { return nil }
  }

  private static func name(of pid: Int32) -> String {
    do throws(IOError) {
      return ForeignText.shown(try TextFile.read("/proc/\(pid)/comm").trimmingNewline, limit: 32)
    } catch { return "a program" }
  }

  /// Names in a folder of a file system of the kernel's, where what stands comes and goes: none in one
  /// that cannot be read.
  static func names(in path: String) -> [String] {
    do throws(IOError) { return try Folder.names(path) } catch { return [] }
  }
}
