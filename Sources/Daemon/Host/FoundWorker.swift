// SPDX-License-Identifier: Apache-2.0
// Workers that run although no record names them: the run directory was lost or changed. A
// worker is known by its program, by the path that its link was bound to, which the kernel
// remembers whatever became of the file, and by the store that it has open.

internal import BlockIO
import Glibc
internal import SystemIO

/// A worker that was found among the processes.
struct FoundWorker: WorkerAtLarge {
  /// The process, of which more is known than of any.
  private let handle: ProcessHandle
  var process: any HostProcess { handle }
  /// The disk that its link was made for.
  let disk: DiskID
  /// Where its link was bound. Nobody may be reached there any more.
  let link: String

  /// Every supervised worker. Blocks.
  static func all() throws(IOError) -> [FoundWorker] {
    let links = try boundPaths()
    var found: [FoundWorker] = []
    for pid in FileUsers.processes() where isWorker(pid) {
      for descriptor in FileUsers.descriptors(of: pid) {
        guard let target = FileUsers.link(descriptor), target.hasPrefix("socket:["),
          let link = links[String(target.dropFirst(8).dropLast())],
          let disk = Self.disk(ofLink: link)
        else { continue }
        do throws(IOError) {
          found.append(FoundWorker(handle: try ProcessHandle(pid: pid), disk: disk, link: link))
        } catch {
          // It has just ended.
          guard error.code == ESRCH || error.code == ENOENT else { throw error }
        }
        break
      }
    }
    return found
  }

  /// The disk of a link: RUN/disks/DISK/link. Others recover a log, and have no disk.
  private static func disk(ofLink link: String) -> DiskID? {
    let parts = link.split(separator: "/").suffix(3)
    guard parts.count == 3, parts.first == "disks", parts.last == "link" else { return nil }
    return DiskID(parts[parts.startIndex + 1])
  }

  /// Whether it has a file or device open.
  func has(_ identity: FileIdentity) -> Bool {
    FileUsers.descriptors(of: process.pid).contains { FileUsers.isFile($0, identity) }
  }

  /// Opens its pending log by its descriptor, whether or not the file still has its name; nil
  /// when it has none.
  func openLog() throws(IOError) -> FileStore? {
    for path in FileUsers.descriptors(of: process.pid) {
      guard var target = FileUsers.link(path) else { continue }
      if target.hasSuffix(" (deleted)") { target = String(target.dropLast(" (deleted)".count)) }
      let parts = target.split(separator: "/")
      guard parts.last == "pending" || parts.dropLast().last == "pending" else { continue }
      // Only the daemon makes such files, and gives no worker another one than its own.
      let status = try CachedStatus(path: path)
      guard status.owner == geteuid(), status.mode == S_IFREG | 0o600 else { continue }
      return try FileStore(Descriptor(path: path, flags: O_RDWR), name: target)
    }
    return nil
  }

  /// Has it finish what is under way and commit; kills it when that takes longer. False when it
  /// lives on. Blocks.
  func end(within limit: Duration) throws(IOError) -> Bool {
    for signal in [SIGTERM, SIGKILL] {
      try process.send(signal)
      let end = ContinuousClock.now + (signal == SIGTERM ? limit : .seconds(5))
      while ContinuousClock.now < end {
        if process.hasEnded { return true }
        usleep(20_000)
      }
    }
    return process.hasEnded
  }

  static func isWorker(_ pid: Int32) -> Bool {
    do throws(IOError) {
      let words = try TextFile.readRepairing("/proc/\(pid)/cmdline").split(separator: "\0")
      return words.contains("--supervised")
    } catch { return false }
  }

  /// The paths of bound Unix sockets by their inodes. Source: proc(5), /proc/net/unix.
  static func boundPaths() throws(IOError) -> [String: String] {
    var paths: [String: String] = [:]
    for line in try TextFile.readRepairing("/proc/net/unix").split(separator: "\n") {
      let fields = line.split(separator: " ", maxSplits: 7, omittingEmptySubsequences: true)
      if fields.count == 8 { paths[String(fields[6])] = String(fields[7]) }
    }
    return paths
  }
}
