// SPDX-License-Identifier: Apache-2.0
// The lock that lets one daemon run at a time.
//
// A daemon that is killed while a thread of it waits in the kernel, for a device that hangs, keeps
// its descriptors, and so every lock, until the device answers. It runs no instruction any more,
// and the next daemon is needed just then. So the file names its holder:
//
//   text    "PID START BYTE\n": the process, when it started, and the byte that it has locked
//   byte 0  locked by whoever reads and writes the text
//
// Who finds BYTE locked by a process that is ending takes the byte after it.

internal import BlockIO
import Glibc
internal import SystemIO

/// A lock that is held as long as this lives, or, after a kill, as long as the process can still do
/// anything.
final class DaemonLock: Sendable {
  private struct Holder {
    var pid: Int32
    var start: UInt64
    var byte: Int64

    init(_ pid: Int32, _ start: UInt64, _ byte: Int64) {
      self.pid = pid
      self.start = start
      self.byte = byte
    }

    init?(_ text: String) {
      let fields = text.split(whereSeparator: \.isWhitespace)
      guard fields.count == 3, let pid = Int32(fields[0]), let start = UInt64(fields[1]),
        let byte = Int64(fields[2]), (1..<1_000_000).contains(byte)
      else { return nil }
      self.init(pid, start, byte)
    }
  }

  private let file: FileStore

  /// Locks a file, which is made if it is missing. `place` is for the sentence. Throws EAGAIN when a
  /// daemon runs already. Blocks for three seconds then.
  init(_ path: String, _ place: String) throws(IOError) {
    let descriptor = try Descriptor(path: path, flags: O_RDWR | O_CREAT, mode: 0o600)
    file = try FileStore(descriptor, name: path)
    // A worker that is just being started by a daemon that was killed has the lock, too,
    // until it closes what is not its own.
    for attempt in 0... {
      do throws(IOError) {
        try take()
        return
      } catch {
        guard error.code == EAGAIN else { throw error }
        guard attempt < 30 else { throw IOError(EAGAIN, "start a second dmu-xend", place) }
        usleep(100_000)
      }
    }
  }

  private func take() throws(IOError) {
    try file.lockByte(0)
    var taken: Result<Void, IOError> = .success(())
    do throws(IOError) { try takeByte() } catch { taken = .failure(error) }
    try file.unlockByte(0)
    try taken.get()
  }

  private func takeByte() throws(IOError) {
    let before = Holder(
      String(decoding: try file.read(at: 0, count: Int(min(file.size, 100))), as: UTF8.self))
    var byte = before?.byte ?? 1
    do throws(IOError) { try file.lockByte(byte) } catch {
      guard error.code == EAGAIN, let before,
        try ProcessHandle.isEnding(before.pid, startTime: before.start)
      else { throw error }
      byte += 1
      try file.lockByte(byte)
    }
    let own = try ProcessHandle(pid: getpid())
    let text = Array("\(own.pid) \(own.startTime) \(byte)\n".utf8)
    try file.resize(to: UInt64(text.count))
    try file.write(text, at: 0)
  }

  /// Says that the lock is held up to this place.
  func keepUntilHere() {}
}
