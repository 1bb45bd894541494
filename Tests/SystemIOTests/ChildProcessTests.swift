// SPDX-License-Identifier: Apache-2.0
import Glibc
import SystemIO
import Testing
import TestSupport

@Suite("Processes") struct ChildProcessTests {
  @Test func descriptorsLandWhereTheyAreWanted() throws {
    let folder = try TemporaryFolder()
    let three = try Descriptor(path: folder.file("3"), flags: O_RDWR | O_CREAT, mode: 0o600)
    let four = try Descriptor(path: folder.file("4"), flags: O_RDWR | O_CREAT, mode: 0o600)
    let out = try Descriptor(path: folder.file("out"), flags: O_RDWR | O_CREAT, mode: 0o600)
    var command = Command(
      "/bin/sh", ["-c", "echo three >&3; echo four >&4; ls /proc/$$/fd; echo $X"],
      environment: ["X=yes", "PATH=/bin:/usr/bin"])
    // Crossed on purpose: each is where the other shall go, if the numbers are low enough.
    command.descriptors = [1: out.raw, 3: three.raw, 4: four.raw]
    let child = try command.start()
    #expect(try child.wait(milliseconds: 10_000) == .exited(0))
    #expect(child.hasEnded)
    #expect(try text(three) == "three\n")
    #expect(try text(four) == "four\n")
    // Nothing else was inherited: 0 to 4, and what the shell itself opens from 10 on.
    let numbers = try text(out).split(separator: "\n")
    #expect(numbers.last == "yes")
    #expect(numbers.dropLast().compactMap { Int($0) }.allSatisfy { $0 <= 4 || $0 == 10 })
  }

  @Test func crossedDescriptorsDoNotOverwriteEachOther() throws {
    let folder = try TemporaryFolder()
    let first = try Descriptor(path: folder.file("a"), flags: O_RDWR | O_CREAT, mode: 0o600)
    let second = try Descriptor(path: folder.file("b"), flags: O_RDWR | O_CREAT, mode: 0o600)
    let (one, two) = (first.raw, second.raw)
    var command = Command("/bin/bash", ["-c", "echo to-\(one) >&\(one); echo to-\(two) >&\(two)"])
    command.descriptors = [one: two, two: one]
    #expect(try command.start().wait(milliseconds: 10_000) == .exited(0))
    #expect(try text(second) == "to-\(one)\n")
    #expect(try text(first) == "to-\(two)\n")
  }

  @Test func aSessionOfItsOwn() throws {
    var command = Command("/bin/sleep", ["60"])
    command.newSession = true
    let child = try command.start()
    #expect(getsid(child.pid) == child.pid)
    #expect(!child.hasEnded)
    #expect(try child.reap() == nil)
    let again = try ProcessHandle(pid: child.pid, startTime: child.startTime)
    try again.send(SIGKILL)
    #expect(try child.wait(milliseconds: 10_000) == .signalled(SIGKILL))
    #expect(again.hasEnded)
    try again.send(SIGKILL)
  }

  @Test func anotherProcessWithThePidIsNotTaken() throws {
    let me = try ProcessHandle(pid: getpid())
    #expect(throws: IOError(ESRCH, "open", "process \(getpid())")) {
      _ = try ProcessHandle(pid: getpid(), startTime: me.startTime + 1)
    }
  }

  @Test func aProgramThatIsNotThereIsNamed() {
    #expect(throws: IOError(ENOENT, "start", "/no/such/program")) {
      _ = try Command("/no/such/program").start()
    }
  }

  private func text(_ file: borrowing Descriptor) throws -> String {
    var buffer = [UInt8](repeating: 0, count: 4096)
    let count = pread(file.raw, &buffer, buffer.count, 0)
    guard count >= 0 else { throw IOError.last("read") }
    return String(decoding: buffer[..<count], as: UTF8.self)
  }
}
