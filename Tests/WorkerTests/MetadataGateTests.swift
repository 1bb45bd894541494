// SPDX-License-Identifier: Apache-2.0
// That the loop's thread never waits for an image's metadata, for every kind of image.

import BlockIO
import DiskFormats
import Fakes
import Glibc
import Synchronization
import SystemIO
import Target
import Testing
import TestSupport
import WorkerLink

@testable import Worker

/// A file that takes its time, and counts who does something to it on the thread that must not.
private final class WatchedStore: ByteStore {
  /// How often something was done on the thread that is watched, and on others.
  struct Counts {
    var watched: UInt?
    var there = 0
    var elsewhere = 0
  }

  let file: FileStore
  let counts: Mutex<Counts>

  init(_ file: FileStore) {
    self.file = file
    counts = Mutex(Counts())
  }

  /// From now on nothing may be done on this thread.
  func watch() { counts.withLock { $0.watched = UInt(pthread_self()) } }

  private func act() {
    let isWatched = counts.withLock { counts -> Bool in
      guard let watched = counts.watched else { return true }
      let isThere = watched == UInt(pthread_self())
      if isThere { counts.there += 1 } else { counts.elsewhere += 1 }
      return isThere
    }
    if !isWatched { usleep(500) }
  }

  var name: String { file.name }
  var size: UInt64 { file.size }
  var isWritable: Bool { file.isWritable }
  func identity() throws(IOError) -> StoreIdentity { try file.identity() }
  func allocatedBytes() throws(IOError) -> UInt64 { try file.allocatedBytes() }

  func read(_ buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws(IOError) {
    act()
    try file.read(buffer, at: offset)
  }
  func write(_ buffer: UnsafeRawBufferPointer, at offset: UInt64) throws(IOError) {
    act()
    try file.write(buffer, at: offset)
  }
  func zero(at offset: UInt64, count: UInt64) throws(IOError) {
    act()
    try file.zero(at: offset, count: count)
  }
  func resize(to size: UInt64) throws(IOError) {
    act()
    try file.resize(to: size)
  }
  func flush() throws(IOError) {
    act()
    try file.flush()
  }
}

/// A guest on a disk in this process: every request is waited for, by turns of the loop.
private final class Guest: RequestOwner {
  private let disk: Disk
  private var owner: Int32 = 0
  private var results: [UInt64: Int32] = [:]
  private var lastTag: UInt64 = 0
  private var buffers: [UInt64: UnsafeMutableRawBufferPointer] = [:]

  init(_ disk: Disk) {
    self.disk = disk
    owner = disk.target.enroll(self)
  }

  func completed(tag: UInt64, code: Int32) { results[tag] = code }

  /// Begins a write of a stamp, or another request without bytes.
  func begin(_ operation: TargetRequest.Operation, _ sectors: Range<Int>, stamp: UInt64 = 0) {
    lastTag += 1
    let buffer = UnsafeMutableRawBufferPointer.allocate(
      byteCount: sectors.count * 512, alignment: 512)
    Stamp.fill(buffer, stamp)
    buffers[lastTag] = buffer
    let request = TargetRequest(
      operation, offset: UInt64(sectors.lowerBound * 512), count: UInt64(sectors.count * 512),
      buffer: operation == .write || operation == .read ? buffer.baseAddress : nil, tag: lastTag)
    if let code = disk.target.submit(request, owner: owner) { results[lastTag] = code }
  }

  /// Waits for all that was begun. Throws an errno that is not 0.
  func settle() throws {
    while results.count < buffers.count { try disk.turn(timeout: 100) }
    for buffer in buffers.values { buffer.deallocate() }
    defer {
      results = [:]
      buffers = [:]
    }
    for code in results.values where code != 0 { throw IOError(code, "do", "a request") }
  }
}

@Suite("Metadata and the loop", .enabled(if: hasQemu), .serialized) struct MetadataGateTests {
  /// First writes everywhere, part of blocks and whole, discards and flushes, while the loop's thread
  /// is watched; then what is left, by the format and by QEMU.
  @Test(arguments: MadeStore.allCases) func theLoopNeverTouchesAFile(_ kind: MadeStore) throws {
    var random = SeededRandom(announcedAs: "metadata of \(kind)")
    let image = try TestImage(sectors: 32768, blockSize: 65536, create: false)
    // Of subclusters a first write carries the others along.
    let path = try kind.make(image, cluster: 4096)
    let stores = Mutex<[WatchedStore]>([])
    let open = { (path: String, writable: Bool) throws(ImageError) -> any ByteStore in
      do throws(IOError) {
        let store = WatchedStore(try FileStore(path: path, writable: writable))
        stores.withLock { $0.append(store) }
        return store
      } catch { throw ImageError(error) }
    }
    let opened = try OpenImage(
      try FormatName(named: kind.format), store: try open(path, true), ImageRequest()
    ) { file throws(ImageError) in try open(file.path, file.writable) }
    let loop = try EventLoop()
    let disk = try Disk(
      opened, pending: nil, loop: loop, log: Log(level: .error, journal: false))
    var model = image.model()
    for store in stores.withLock({ $0 }) { store.watch() }
    let guest = Guest(disk)
    for round in 1...40 {
      for item in 1...4 {
        let first = Int(random.next() % UInt64(image.sectors - 200))
        let range = first..<first + 1 + Int(random.next() % 160)
        let stamp = UInt64(round * 8 + item)
        // Each is by itself where it touches another's sectors.
        let operation: TargetRequest.Operation = random.next() % 8 == 0 ? .zero : .write
        guest.begin(operation, range, stamp: stamp)
        let write = model.begin(range, stamp: operation == .zero ? 0 : stamp)
        if item % 2 == 0 { try guest.settle() }
        model.end(write)
      }
      if round % 5 == 0 { guest.begin(.flush, 0..<0) }
      try guest.settle()
    }
    #expect(try disk.finish() == 0)
    var elsewhere = 0
    for store in stores.withLock({ $0 }) {
      let counts = store.counts.withLock { $0 }
      #expect(counts.there == 0, "\(store.name)")
      elsewhere += counts.elsewhere
    }
    #expect(elsewhere > 0, "nothing was watched")
    try compare(kind, path, image, model)
  }

  private func compare(
    _ kind: MadeStore, _ path: String, _ image: TestImage, _ model: NaiveDisk
  ) throws {
    // With the stores as they are: QEMU does not know a dscow.
    let disk = try Chain(
      try FileStore(path: path, writable: false), kind: try FormatName(named: kind.format).kind,
      above: [MemoryStore("nothing")]
    ) { request throws(ImageError) in
      do throws(IOError) {
        return try FileStore(path: image.folder.file(request.path.fileName), writable: false)
      } catch { throw ImageError(error) }
    }.flat()
    if kind.judged == "qcow2" || kind.judged == "vmdk" {
      try kind.qemu("check", "-f", kind.judged ?? "raw", path)
    }
    let bytes =
      try kind.judged == nil
      ? disk.read(at: 0, count: image.sectors * 512) : kind.contents(path, image)
    bytes.withUnsafeBytes { bytes in
      for sector in 0..<image.sectors {
        let stamp = Stamp.read(bytes, at: sector * 512)
        guard let stamp, model.latest(sector: sector).contains(stamp) else {
          Issue.record("sector \(sector) reads as \(String(describing: stamp))")
          return
        }
      }
    }
  }

  /// The program itself: every pread64 and pwrite64 takes 50 ms more, and a read of what is mapped and
  /// cached, by another connection, hardly notices the first writes that go on. The loop's thread, the
  /// first, makes neither of these calls: it reads with preadv2 and does not wait, or not at all, and
  /// writes only where writes are quick.
  @Test(
    .enabled(if: access("/usr/bin/strace", X_OK) == 0, "strace makes files slow"),
    arguments: [MadeStore.overlay, .dscow, .vhd, .qcow, .vmdk])
  func readsDoNotWaitForFirstWrites(_ kind: MadeStore) throws {
    let image = try TestImage(sectors: 32768, blockSize: 65536, create: false)
    let path = try kind.make(image)
    let socket = image.folder.file("nbd")
    let cowd = try CowdProcess(
      ["-p", kind.format, "--nbd", "unix:\(socket)", path],
      injecting: "pread64,pwrite64:delay_enter=50000", folder: image.folder)
    try cowd.expectReady()
    let writer = try TestNBDClient(path: socket)
    let reader = try TestNBDClient(path: socket)
    // What is read: mapped by a write, and cached.
    try reader.run(.write, offset: 0, length: 4096, data: Stamp.sectors(8, 7))
    try reader.run(.read, offset: 0, length: 4096)
    var underWay = 0
    var written = 0
    var next: UInt64 = 1
    var times: [Int64] = []
    let start = Self.now()
    let end = start + 5_000_000
    while Self.now() < end {
      while underWay < 4 {
        // Each the first one of its block.
        let offset = next % 250 * 65536 + 512 * (next / 250)
        _ = writer.submit(.write, offset: offset, length: 512, data: Stamp.sectors(1, next))
        next += 1
        underWay += 1
      }
      let done = try writer.turn(milliseconds: 0)
      #expect(done.allSatisfy { $0.error == 0 })
      underWay -= done.count
      written += done.count
      let asked = Self.now()
      try reader.run(.read, offset: 0, length: 4096)
      times.append(Self.now() - asked)
    }
    try cowd.kill9()
    let waits = try Self.calls(image.folder.file("calls"), of: cowd.process.pid, from: start)
    #expect(waits == [], "on the loop's thread")
    times.sort()
    let typical = times[times.count * 9 / 10]
    print(
      "metadata: \(kind): \(written) first writes, \(times.count) reads, 9 of 10 in \(typical) us,"
        + " all in \(times.last ?? 0) us")
    #expect(written > 4, "nothing was written meanwhile")
    // A tenth of what is added to each call.
    #expect(typical < 5000, "\(kind)")
  }

  /// What strace has told of a thread's pread64 and pwrite64 since a moment, once it has told all.
  private static func calls(_ path: String, of thread: pid_t, from: Int64) throws -> [String] {
    var lines: [Substring] = []
    for _ in 0..<100 {
      let file = try FileStore(path: path, writable: false)
      let text = String(decoding: try file.read(at: 0, count: Int(file.size)), as: UTF8.self)
      lines = text.split(separator: "\n")
      if lines.contains(where: { $0.hasPrefix("\(thread) ") && $0.contains("+++ killed") }) {
        break
      }
      usleep(100_000)
    }
    try #require(lines.contains { $0.contains(" pread64(") }, "nothing was told")
    return lines.compactMap { line in
      let words = line.split(separator: " ", maxSplits: 2)
      guard words.count == 3, pid_t(words[0]) == thread, let time = Double(words[1]),
        Int64(time * 1_000_000) > from,
        words[2].hasPrefix("pread64(") || words[2].hasPrefix("pwrite64(")
      else { return nil }
      return String(line)
    }
  }

  /// Microseconds since 1970.
  private static func now() -> Int64 {
    var time = timespec()
    clock_gettime(CLOCK_REALTIME, &time)
    return Int64(time.tv_sec) * 1_000_000 + Int64(time.tv_nsec) / 1000
  }
}

extension String {
  fileprivate var fileName: String { split(separator: "/").last.map(String.init) ?? self }
}
