// SPDX-License-Identifier: Apache-2.0
// The kernel's own nbd driver as client. Runs where there is one: as root, with `modprobe
// nbd`; elsewhere these tests are skipped and the Xen lab does their work.

import BlockIO
import DiskFormats
import Glibc
import LinuxBlock
import Synchronization
import SystemIO
import Testing
import TestSupport
import WorkerLink

private func hasKernel() -> Bool {
  do throws(IOError) {
    return try NBDDevice.isAvailable() && geteuid() == 0
  } catch { return false }
}

@Suite("The kernel's nbd driver", .serialized, .enabled(if: hasKernel()))
struct KernelTests {
  @Test func aDiskByHandIsADevice() throws {
    let image = try TestImage(sectors: 4096, blockSize: 4096)
    let name = "dmu-test-\(getpid())"
    let path = "/dev/mapper/" + name
    let cowd = try CowdProcess(["-p", "dscow", name, image.store], folder: image.folder)
    let line = cowd.line()
    let messages = try cowd.messages()
    #expect(line?.hasSuffix(path) == true, "\(messages)")
    let second = try TestImage(sectors: 256, blockSize: 4096)
    let refused = try CowdProcess(["-p", "dscow", name, second.store], folder: second.folder)
    #expect(try refused.process.wait(milliseconds: 10_000) == .exited(1))
    #expect(try refused.messages().contains("\(path) is in use"))
    do {
      // Through the page cache, and not synced: the end of cowd writes it out.
      let device = try FileStore(path: path, writable: true)
      #expect(device.isBlockDevice && device.size == 4096 * 512)
      #expect(try device.read(at: 512, count: 512) == Stamp.sectors(1, TestImage.stamp(1)))
      try device.write(Stamp.sectors(3, 77), at: 1024)
    }
    try cowd.stop()
    #expect(access(path, F_OK) != 0 && lstatFails(path))
    try image.check()
    let again = try CowdProcess(["-p", "dscow", name, image.store], folder: image.folder)
    #expect(again.line() != nil)
    do {
      let device = try FileStore(path: path, writable: true)
      #expect(try device.read(at: 1024, count: 1536) == Stamp.sectors(3, 77))
      #expect(try device.read(at: 2560, count: 512) == Stamp.sectors(1, TestImage.stamp(5)))
    }
    // Killed, it leaves a link that the next one replaces.
    try again.kill9()
    #expect(!lstatFails(path))
    let third = try CowdProcess(["-p", "dscow", name, image.store], folder: image.folder)
    #expect(third.line() != nil)
    try third.stop()
  }

  /// Workers die under a load through the device; each next one gets a new socket, and the
  /// load sees neither an error nor a loss.
  @Test func theDeviceOutlivesItsWorkers() throws {
    var seeds = SeededRandom(announcedAs: "kernel, workers killed")
    var random = SplitMix64(seed: seeds.next())
    let image = try TestImage(sectors: 4096, blockSize: 4096)
    let daemon = try TestDaemon(image)
    let report = try daemon.startReady()
    var pair = try daemon.kernelSocket()
    let index = try NBDDevice.connect(
      NBDConfiguration(
        size: report.size, flags: report.flags, timeout: 2, deadConnectionTimeout: 60,
        identifier: "dmu-test"), socket: #require(pair.raw))
    _ = pair.take()
    #expect(try NBDDevice.status()[index] == true)
    let load = try DirectLoad(
      path: NBDDevice.path(index), sectors: image.sectors, seed: seeds.next())
    try load.start()
    for _ in 0..<5 {
      // Each new worker must be seen to work before it is killed.
      try load.awaitProgress()
      usleep(UInt32(random.below(60_000)))
      let process = daemon.worker.process
      try process.send(SIGKILL)
      #expect(try process.wait(milliseconds: 10_000) == .signalled(SIGKILL))
      try daemon.replaceWorker()
      _ = try daemon.startReady()
      pair = try daemon.kernelSocket()
      let socket = try #require(pair.raw)
      #expect(throws: IOError.self, "another identifier") {
        try NBDDevice.reconfigure(index, socket: socket, identifier: "else")
      }
      try reconnect(index, socket)
      _ = pair.take()
    }
    try load.awaitProgress()
    try load.stop()
    try load.verify()
    try NBDDevice.disconnect(index)
    // Whoever has it open still counts for the kernel.
    load.close()
    #expect(try NBDDevice.status()[index] != true)
    #expect(try daemon.report().0 == .detached)
    try daemon.link.send(.stop)
    #expect(try daemon.worker.process.wait(milliseconds: 10_000) == .exited(0))
    try image.check()
    #expect(throws: IOError.self) { try NBDDevice.disconnect(9999) }
  }

  /// The kernel may not yet have noticed that the old socket is dead.
  private func reconnect(_ index: UInt32, _ socket: Int32) throws {
    for attempt in 0... {
      do throws(IOError) {
        return try NBDDevice.reconfigure(index, socket: socket, identifier: "dmu-test")
      } catch {
        guard error.code == ENOSPC, attempt < 100 else { throw error }
        usleep(10_000)
      }
    }
  }

  private func lstatFails(_ path: String) -> Bool {
    var status = stat()
    return lstat(path, &status) != 0
  }
}

extension TestDaemon {
  /// Gives the worker a socket; the other end is for the kernel.
  func kernelSocket() throws -> PassedDescriptor {
    let pair = try UnixSocket.pair(.stream)
    try link.send(.attach, lending: [.nbd: pair.second.raw])
    return PassedDescriptor(pair.first)
  }
}

/// Writes past the page cache, and a model of what they left.
private final class DirectLoad: @unchecked Sendable {
  // Everything but `stopping` belongs to one thread at a time: the writer's from `start` on,
  // the test's again after `stop`.
  private let stopping = Atomic(false)
  private var thread = pthread_t()
  private var failure: (any Error)?
  private let progress = Atomic<UInt64>(0)
  private var writes: UInt64 = 0
  private var device: Descriptor?
  private var stamps: [UInt64]
  private var random: SplitMix64
  private let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: 65536, alignment: 4096)

  init(path: String, sectors: Int, seed: UInt64) throws {
    let direct: Int32 = 0o40000
    device = try Descriptor(path: path, flags: O_RDWR | direct)
    stamps = (0..<sectors).map { TestImage.stamp($0) }
    random = SplitMix64(seed: seed)
  }

  deinit { buffer.deallocate() }

  /// Writes on a thread of its own: it waits, now and then, for what the test does.
  func start() throws {
    let me = Unmanaged.passRetained(self).toOpaque()
    let code = pthread_create(
      &thread, nil,
      { me in
        guard let me else { return nil }
        let load = Unmanaged<DirectLoad>.fromOpaque(me).takeRetainedValue()
        do {
          while !load.stopping.load(ordering: .relaxed) { try load.step() }
        } catch { load.failure = error }
        return nil
      }, me)
    guard code == 0 else { throw IOError(code, "start", "a thread") }
  }

  func stop() throws {
    stopping.store(true, ordering: .relaxed)
    pthread_join(thread, nil)
    if let failure { throw failure }
  }

  func close() { device = nil }

  /// Waits until ten more writes have come to their end.
  func awaitProgress() throws {
    let start = progress.load(ordering: .relaxed)
    for _ in 0..<3000 where progress.load(ordering: .relaxed) < start + 10 { usleep(10_000) }
    guard progress.load(ordering: .relaxed) >= start + 10 else {
      throw IOError(ETIMEDOUT, "write to", "the device")
    }
  }

  private func step() throws {
    let start = random.below(stamps.count)
    let end = min(stamps.count, start + 1 + random.below(32))
    writes += 1
    let bytes = UnsafeMutableRawBufferPointer(rebasing: buffer[..<((end - start) * 512)])
    Stamp.fill(bytes, writes)
    let device = device?.raw ?? -1
    guard pwrite(device, bytes.baseAddress, bytes.count, off_t(start * 512)) == bytes.count
    else { throw IOError.last("write", "the device") }
    for sector in start..<end { stamps[sector] = writes }
    progress.store(writes, ordering: .relaxed)
    if random.chance(5), fsync(device) != 0 { throw IOError.last("flush", "the device") }
  }

  func verify() throws {
    let device = device?.raw ?? -1
    for start in stride(from: 0, to: stamps.count, by: 128) {
      let count = min(128, stamps.count - start)
      guard pread(device, buffer.baseAddress, count * 512, off_t(start * 512)) == count * 512
      else { throw IOError.last("read", "the device") }
      for index in 0..<count {
        let found = Stamp.read(UnsafeRawBufferPointer(buffer), at: index * 512)
        #expect(found == stamps[start + index], "sector \(start + index)")
      }
    }
  }
}
