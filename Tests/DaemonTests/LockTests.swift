// SPDX-License-Identifier: Apache-2.0
// The lock that lets one daemon run: against a daemon that lives, one that is gone, and one that
// can do nothing any more but keeps its descriptors.

import BlockIO
import Glibc
import SystemIO
import Testing
import TestSupport

@testable import Daemon

@Suite struct LockTests {
  @Test("A second daemon is refused while the first lives, and comes after it")
  func second() throws {
    let folder = try TemporaryFolder()
    let path = folder.file("lock")
    do {
      let first = try DaemonLock(path, "here")
      let refusal = try #require(throws: IOError.self) { _ = try DaemonLock(path, "here") }
      #expect(refusal.code == EAGAIN)
      #expect(refusal.description.contains("start a second dmu-xend"))
      first.keepUntilHere()
    }
    let next = try DaemonLock(path, "here")
    #expect(try SmallFile.read(path).hasSuffix(" 1\n"))
    next.keepUntilHere()
  }

  @Test("A process that is ending and keeps the lock gives way; a live one and a stranger do not")
  func ending() throws {
    let folder = try TemporaryFolder()
    let path = folder.file("lock")
    // A process that has ended and is not collected, whose descriptors another still has.
    let child = try Command("/bin/true").start()
    while !child.hasEnded { usleep(1000) }
    #expect(try ProcessHandle.isEnding(child.pid, startTime: child.startTime))
    #expect(try !ProcessHandle.isEnding(child.pid, startTime: child.startTime + 1))
    let own = try ProcessHandle(pid: getpid())
    #expect(try !ProcessHandle.isEnding(own.pid, startTime: own.startTime))
    let file = try Descriptor(path: path, flags: O_RDWR | O_CREAT, mode: 0o600)
    let held = try FileStore(file, name: path)
    try held.lockByte(1)

    for holder in ["\(own.pid) \(own.startTime) 1", "\(child.pid) \(child.startTime + 1) 1", "x"] {
      try held.resize(to: 0)
      try held.write(Array((holder + "\n").utf8), at: 0)
      #expect(throws: IOError.self, "\(holder)") { _ = try DaemonLock(path, "here") }
    }
    try held.resize(to: 0)
    try held.write(Array("\(child.pid) \(child.startTime) 1\n".utf8), at: 0)
    let lock = try DaemonLock(path, "here")
    #expect(try SmallFile.read(path) == "\(own.pid) \(own.startTime) 2\n")
    #expect(throws: IOError.self) { _ = try DaemonLock(path, "here") }
    lock.keepUntilHere()
    _ = try child.reap()
  }
}
