// SPDX-License-Identifier: Apache-2.0
// Devices of the device-mapper that are none: for tests, with workers that are played. A
// device is a file in a folder, so that it outlives the daemon as the kernel's do; the node
// that a worker is given is one end of a pair of sockets, whose other end is kept here.

import Glibc
package import LinuxBlock
import Synchronization
package import SystemIO

/// Keeps what the device-mapper would. The files say SUSPENDED or LIVE, and what the device
/// stands on. Files beside them play what a kernel may do: DISK.open, somebody has the device
/// open; DISK.uncommitted, so many placements are not durable; DISK.measured, the kernel measures
/// latencies, and has counted what the file says; flush-hangs, a flush does not end
/// as long as it is there; flush-fails, one fails.
package final class StandInMapper: DeviceMapping {
  private let folder: String
  private let isThere: Bool
  /// The kernel's ends of the nodes that were opened last.
  private let ends = Mutex<[DiskID: PassedDescriptor]>([:])

  /// A mapper with its devices in a folder, which has to be there; without one it is as if the
  /// module were not installed.
  package init(folder: String?) {
    isThere = folder != nil
    self.folder = folder ?? ""
  }

  /// Whether there is a folder.
  package func isAvailable() throws(DeviceMapperError) -> Bool { isThere }

  /// Writes the device's file.
  package func make(_ wish: MappedWish) throws(DeviceMapperError) -> DeviceNode {
    guard access(path(wish.disk), F_OK) != 0 else {
      throw DeviceMapperError(EBUSY, "create", "\(wish.disk)")
    }
    try write(wish.disk, "SUSPENDED " + Self.names(wish.backings))
    return node(wish.disk)
  }

  /// Makes a pair of sockets, unless a worker has the last one.
  package func openNode(_ disk: DiskID) throws(IOError) -> Descriptor {
    let pair = try UnixSocket.pair(.stream)
    let first = try pair.first.duplicate()
    let kept = PassedDescriptor(try pair.second.duplicate())
    let isFree = ends.withLock { ends in
      guard ends[disk].map({ Self.hasEnded($0) }) ?? true else { return false }
      ends[disk] = kept
      return true
    }
    guard isFree else { throw IOError(EBUSY, "open", "the stand-in's node of \(disk)") }
    return first
  }

  private static func hasEnded(_ end: PassedDescriptor) -> Bool {
    guard let raw = end.raw else { return true }
    var wait = pollfd(fd: raw, events: Int16(POLLIN), revents: 0)
    return poll(&wait, 1, 0) > 0
  }

  /// Marks it as live.
  package func start(_ disk: DiskID, probed: Bool) throws(DeviceMapperError) {
    try write(disk, try text(disk).replacing("SUSPENDED", with: "LIVE"))
  }

  /// Compares the file.
  package func state(
    _ disk: DiskID, over backings: [ServedDevice.Backing]
  ) throws(DeviceMapperError) -> ServedDevice.State {
    guard access(path(disk), F_OK) == 0 else { return .absent }
    let words = try text(disk).split(separator: " ", maxSplits: 1)
    guard words.first == "LIVE" else { return .unfinished }
    return words.last.map { $0 == Self.names(backings) } == true
      ? .ours : .foreign("the stand-in of \(disk) stands on other files")
  }

  /// Whether its file is there, and says that it is in use.
  package func isAttached(
    _ disk: DiskID, _ node: DeviceNode
  ) throws(DeviceMapperError) -> Bool {
    guard access(path(disk), F_OK) == 0, self.node(disk) == node else { return false }
    return try text(disk).hasPrefix("LIVE")
  }

  /// Waits for a worker, then leaves a mark that the device was flushed.
  package func flush(_ node: DeviceNode) throws(IOError) {
    let disk = DiskID(node.path.split(separator: "-", maxSplits: 2).last ?? "")
    while access(folder + "/flush-hangs", F_OK) == 0 || disk.map({ isWithoutWorker($0) }) ?? false {
      usleep(20_000)
    }
    guard access(folder + "/flush-fails", F_OK) != 0 else {
      throw IOError(EIO, "write out", node.path)
    }
    if let disk, unlink(path(disk) + ".uncommitted") != 0, errno != ENOENT {
      throw IOError.last("remove", path(disk))
    }
    try TextFile.replace(folder + "/flushed", with: node.path)
  }

  private func isWithoutWorker(_ disk: DiskID) -> Bool {
    guard access(path(disk), F_OK) == 0 else { return false }
    return ends.withLock { $0[disk].map { Self.hasEnded($0) } ?? false }
  }

  /// Whether the mark is there.
  package func users(_ disk: DiskID) throws(DeviceMapperError) -> Int {
    access(path(disk) + ".open", F_OK) == 0 ? 1 : 0
  }

  /// Leaves a mark.
  package func clear(_ disk: DiskID) throws(DeviceMapperError) {
    do throws(IOError) { try TextFile.replace(folder + "/cleared", with: "\(disk)") } catch {
      throw DeviceMapperError(error.code, "write", error.subject)
    }
  }

  /// Nobody waits.
  package func failFaults(_ disk: DiskID) throws(DeviceMapperError) {}

  /// Removes the file and ends the worker's socket.
  package func remove(_ disk: DiskID, deferred: Bool) throws(DeviceMapperError) {
    guard try users(disk) == 0 else { throw DeviceMapperError(EBUSY, "remove", "\(disk)") }
    guard unlink(path(disk)) == 0 || errno == ENOENT else {
      throw DeviceMapperError(errno, "remove", "\(disk)")
    }
    try stopLatencies(disk)
    ends.withLock { $0[disk] = nil }
  }

  /// Marks it as one of errors.
  package func retire(
    _ disk: DiskID, _ node: DeviceNode, losing: Bool
  ) throws(DeviceMapperError) -> Bool {
    let held = try counters(disk, node).uncommitted
    guard losing || held == 0 else { return false }
    try write(disk, "ERROR")
    ends.withLock { $0[disk] = nil }
    return true
  }

  /// Leaves a mark, DISK.held.
  package func hold(_ disk: DiskID) throws(DeviceMapperError) {
    do throws(IOError) { try TextFile.replace(path(disk) + ".held", with: "") } catch {
      throw DeviceMapperError(error.code, "write", error.subject)
    }
  }

  /// Removes the mark.
  package func letGo(_ disk: DiskID) throws(DeviceMapperError) {
    guard unlink(path(disk) + ".held") == 0 || errno == ENOENT else {
      throw DeviceMapperError(errno, "remove the mark of", "\(disk)")
    }
  }

  /// Counts what the mark says.
  package func counters(
    _ disk: DiskID, _ node: DeviceNode
  ) throws(DeviceMapperError) -> MappedCounters {
    var counters = MappedCounters()
    do throws(IOError) {
      counters.uncommitted = UInt64(try TextFile.read(path(disk) + ".uncommitted")) ?? 0
    } catch {
      guard error.code == ENOENT else {
        throw DeviceMapperError(error.code, "read", error.subject)
      }
    }
    return counters
  }

  /// What the mark says, which is made when it is missing.
  package func latencies(_ disk: DiskID) throws(DeviceMapperError) -> LatencyHistogram {
    let mark = path(disk) + ".measured"
    do throws(IOError) {
      guard access(mark, F_OK) == 0 else {
        try TextFile.replace(mark, with: "")
        return LatencyHistogram()
      }
      return MappedDevice.latencies(in: try TextFile.read(mark)) ?? LatencyHistogram()
    } catch { throw DeviceMapperError(error.code, error.operation, error.subject) }
  }

  /// Removes the mark.
  package func stopLatencies(_ disk: DiskID) throws(DeviceMapperError) {
    guard unlink(path(disk) + ".measured") == 0 || errno == ENOENT else {
      throw DeviceMapperError(errno, "remove the mark of", "\(disk)")
    }
  }

  /// It makes none.
  package func sweepMarks() throws(IOError) {}

  /// Every file.
  package func devices() throws(DeviceMapperError) -> [DiskID: DeviceNode] {
    guard isThere else { return [:] }
    do throws(IOError) {
      var found: [DiskID: DeviceNode] = [:]
      // Marks have names of their own, which may be those of disks.
      for disk in try DiskDirectory.named(in: folder) {
        let word = try TextFile.read(path(disk)).split(separator: " ").first
        if ["SUSPENDED", "LIVE", "ERROR"].contains(word) { found[disk] = node(disk) }
      }
      return found
    } catch { throw DeviceMapperError(error.code, error.operation, error.subject) }
  }

  private func path(_ disk: DiskID) -> String { "\(folder)/\(disk)" }

  private func node(_ disk: DiskID) -> DeviceNode {
    let minor =
      disk.vbd.map { UInt32($0.domain) }
      ?? "\(disk)".utf8.reduce(1000) { ($0 &* 31 &+ UInt32($1)) % 100_003 }
    return DeviceNode(
      kind: .dm, index: minor, path: "/stand-in/dmu-\(disk)", major: 253, minor: minor)
  }

  private static func names(_ backings: [ServedDevice.Backing]) -> String {
    backings.map { ($0.readOnly ? "ro:" : "") + $0.name }.joined(separator: " ")
  }

  private func text(_ disk: DiskID) throws(DeviceMapperError) -> String {
    do throws(IOError) { return try TextFile.read(path(disk)) } catch {
      throw DeviceMapperError(error.code, "read", error.subject)
    }
  }

  private func write(_ disk: DiskID, _ text: String) throws(DeviceMapperError) {
    do throws(IOError) { try TextFile.replace(path(disk), with: text) } catch {
      throw DeviceMapperError(error.code, "write", error.subject)
    }
  }
}
