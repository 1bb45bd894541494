// SPDX-License-Identifier: Apache-2.0
// The executor of production. The page cache is tried first, on the loop's own thread, as
// most reads are at hand and most writes only copy; whatever has to wait goes to the pool.
//
// Where the kernel cannot promise not to wait for a buffered write (ext4, block devices) the
// writes are timed, each on whatever thread it is made. As long as the last one was quick the next
// is made at once; after a slow one, and at first, they go to the pool, until one of those is quick
// again and some time has passed. So a slow medium keeps the loop waiting for one write, when it
// becomes slow, and not once for each time that somebody tries.

internal import CLinux
import Glibc
package import SystemIO

/// Backing I/O over byte stores: inline where nothing is waited for, else on a pool.
package final class PoolExecutor: IOExecutor {
  private struct Device {
    let store: any ByteStore
    /// -1: not a file, so everything goes to the pool.
    let raw: Int32
    let isWritable: Bool
    /// A device, or a file that cannot change under us: its end is known.
    let fixedSize: UInt64?
    var readsAtOnce: Bool
    var writesAtOnce: Bool
    /// The last write that was timed was quick.
    var isQuick = false
    /// After a slow write on the loop: nobody tries before.
    var slowUntil: Int64 = 0
  }

  /// A piece of a write that takes longer has waited for something, in nanoseconds.
  private static let slow: Int64 = 3_000_000
  /// How long writes go to the pool after that, in nanoseconds.
  private static let pause: Int64 = 50_000_000
  /// Longer writes always go to the pool, so that receiving goes on meanwhile.
  private let inlineLimit: Int
  /// Files are written in pieces of at most so many bytes, on their boundaries. The page
  /// cache remembers a piece as one folio, and ext4 walks a folio's blocks for every small
  /// write into it: after writes of 1 MiB in one piece, 4 KiB cost twice as much.
  fileprivate static let piece = 64 << 10

  /// Told of each operation's end.
  package var completion: ((UInt32, Int32) -> Void)?
  /// How many devices there are.
  package var deviceCount: Int { devices.count }

  private let pool: ThreadPool
  private var devices: [Device]
  private var idle: [StoreJob] = []
  /// Devices beside the first that are written to: a flush is of all of them.
  private let others: [any ByteStore]

  /// Devices in the order of their numbers. `inlineLimit`: longer writes, in bytes, always go
  /// to the pool.
  package init(pool: ThreadPool, devices stores: [any ByteStore], inlineLimit: Int = 4 << 20) {
    self.pool = pool
    self.inlineLimit = inlineLimit
    others = stores.dropFirst().filter(\.isWritable)
    devices = stores.map { store in
      let file = store.file
      return Device(
        store: store, raw: file?.raw ?? -1, isWritable: store.isWritable,
        fixedSize: store.isWritable ? nil : store.size,
        readsAtOnce: file != nil, writesAtOnce: file != nil)
    }
  }

  /// Whether a device may be written.
  package func isWritable(_ device: UInt16) -> Bool {
    devices[Int(device)].isWritable
  }

  /// The name of its store.
  package func name(_ device: UInt16) -> String { devices[Int(device)].store.name }

  /// The end of a device that cannot grow.
  package func end(_ device: UInt16) -> UInt64 {
    devices[Int(device)].fixedSize ?? UInt64.max
  }

  /// Tries the page cache.
  package func attempt(_ io: BackingIO) -> Int {
    let index = Int(io.device)
    guard devices[index].raw >= 0, let buffer = io.buffer else { return -Int(EAGAIN) }
    switch io.operation {
    case .read: return read(index, buffer, io.count, off_t(io.offset))
    case .write: return write(index, buffer, io.count, off_t(io.offset))
    case .punch, .zero, .flush: return -Int(EAGAIN)
    }
  }

  private func read(
    _ index: Int, _ buffer: UnsafeMutableRawPointer, _ count: Int, _ offset: off_t
  ) -> Int {
    guard devices[index].readsAtOnce else { return -Int(EAGAIN) }
    let done = dmu_pread_nowait(devices[index].raw, buffer, count, offset)
    if done > 0 { return done }
    if done == 0 {
      // The end of the device, past which everything is zero.
      memset(buffer, 0, count)
      return count
    }
    if errno == EOPNOTSUPP { devices[index].readsAtOnce = false }
    // Any other errno is found again, and told, by the thread that does it at leisure.
    return -Int(EAGAIN)
  }

  private func write(
    _ index: Int, _ buffer: UnsafeMutableRawPointer, _ count: Int, _ offset: off_t
  ) -> Int {
    guard count <= inlineLimit else { return -Int(EAGAIN) }
    if devices[index].writesAtOnce {
      let done = dmu_pwrite_nowait(devices[index].raw, buffer, count, offset)
      if done > 0 { return done }
      guard errno == EOPNOTSUPP else { return -Int(EAGAIN) }
      devices[index].writesAtOnce = false
    }
    guard devices[index].isQuick else { return -Int(EAGAIN) }
    let before = PoolExecutor.now()
    let piece = min(count, PoolExecutor.piece - Int(offset) & (PoolExecutor.piece - 1))
    let done = pwrite(devices[index].raw, buffer, piece, offset)
    guard done > 0 else { return -Int(EAGAIN) }
    let after = PoolExecutor.now()
    if after - before > PoolExecutor.slow {
      devices[index].isQuick = false
      devices[index].slowUntil = after + PoolExecutor.pause
    }
    return done
  }

  fileprivate static func now() -> Int64 {
    var time = timespec()
    clock_gettime(CLOCK_MONOTONIC, &time)
    return Int64(time.tv_sec) * 1_000_000_000 + Int64(time.tv_nsec)
  }

  /// Hands an operation to the pool.
  package func start(_ io: BackingIO) {
    let job = idle.popLast() ?? StoreJob(self)
    job.io = io
    job.store = devices[Int(io.device)].store
    if io.operation == .flush { job.others = others }
    pool.submit(job)
  }

  fileprivate func ended(_ job: StoreJob) {
    let token = job.io.token
    if job.io.operation == .write, job.code == 0 {
      let index = Int(job.io.device)
      let isQuick = job.longest <= PoolExecutor.slow
      if !isQuick || PoolExecutor.now() >= devices[index].slowUntil {
        devices[index].isQuick = isQuick
      }
    }
    idle.append(job)
    completion?(token, job.code)
  }

  /// Runs a commit on the pool.
  package func run(
    _ work: @escaping @Sendable () -> CommitFailure?, then: @escaping (CommitFailure?) -> Void
  ) {
    pool.run(work, then: then)
  }

  /// Asks the file where its holes are.
  package func hole(
    _ device: UInt16, at offset: UInt64, limit: UInt64
  ) -> (isHole: Bool, count: UInt64) {
    let device = devices[Int(device)]
    let size = device.fixedSize ?? device.store.size
    if offset >= size { return (true, limit) }
    let file = device.store.file
    guard let file, !file.isBlockDevice else { return (false, min(limit, size - offset)) }
    let data = dmu_seek_data(device.raw, off_t(offset))
    if data < 0 {
      // ENXIO: nothing but a hole up to the end. Anything else: call it data.
      return errno == ENXIO ? (true, limit) : (false, min(limit, size - offset))
    }
    if UInt64(data) > offset { return (true, min(limit, UInt64(data) - offset)) }
    let end = dmu_seek_hole(device.raw, off_t(offset))
    guard end > off_t(offset) else { return (false, min(limit, size - offset)) }
    return (false, min(limit, UInt64(end) - offset))
  }
}

/// One operation on its way through the pool; used again and again.
private final class StoreJob: PoolJob {
  unowned let executor: PoolExecutor
  var io = BackingIO(.flush, device: 0)
  var store: (any ByteStore)?
  var others: [any ByteStore] = []
  var code: Int32 = 0
  /// Of a write: how long the slowest piece took, in nanoseconds.
  var longest: Int64 = 0

  init(_ executor: PoolExecutor) {
    self.executor = executor
  }

  override func perform() {
    guard let store else { return }
    code = 0
    do throws(IOError) {
      switch io.operation {
      case .read:
        try store.read(
          UnsafeMutableRawBufferPointer(start: io.buffer, count: io.count), at: io.offset)
      case .write: try write(store)
      case .punch: try store.zero(at: io.offset, count: UInt64(io.count))
      case .zero: try zero(store)
      case .flush:
        try store.flush()
        for other in others { try other.flush() }
      }
    } catch {
      code = error.code
    }
  }

  private func write(_ store: any ByteStore) throws(IOError) {
    let bytes = UnsafeRawBufferPointer(start: io.buffer, count: io.count)
    var done = 0
    longest = 0
    while done < io.count {
      let before = PoolExecutor.now()
      let offset = io.offset + UInt64(done)
      let boundary = PoolExecutor.piece - Int(offset) & (PoolExecutor.piece - 1)
      let end = min(io.count, done + boundary)
      try store.write(UnsafeRawBufferPointer(rebasing: bytes[done..<end]), at: offset)
      longest = max(longest, PoolExecutor.now() - before)
      done = end
    }
  }

  private func zero(_ store: any ByteStore) throws(IOError) {
    if let file = store.file {
      if dmu_zero_range(file.raw, Int64(io.offset), Int64(io.count)) == 0 { return }
      // EINVAL: a device zeroes whole blocks of its own only.
      guard errno == EOPNOTSUPP || errno == ENODEV || errno == EINVAL else {
        throw IOError.last("zero", store.name)
      }
    }
    let zeroes = [UInt8](repeating: 0, count: min(io.count, 1 << 16))
    var done = 0
    while done < io.count {
      let piece = min(io.count - done, zeroes.count)
      try store.write(Array(zeroes[..<piece]), at: io.offset + UInt64(done))
      done += piece
    }
  }

  override func finished() {
    store = nil
    others = []
    executor.ended(self)
  }
}
