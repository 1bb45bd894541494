// SPDX-License-Identifier: Apache-2.0
// Where the daemon touches the device-mapper: a seam with a real implementation and a
// stand-in for tests, as the nbd driver's.

import Glibc
package import LinuxBlock
package import SystemIO
internal import WorkerLink

/// What a device of the target `userspace` has to be made with.
package struct MappedWish: Sendable {
  /// The disk, which names the device.
  package var disk: DiskID
  /// Length in bytes.
  package var size: UInt64
  /// Bytes of a block.
  package var blockSize: UInt32
  /// What it stands on, in the order of their numbers; the descriptors are lent.
  package var backings: [ServedDevice.Backing]
  /// Whether the guest may only read.
  package var readOnly: Bool
}

/// What the kernel counts of a device since it was made.
package struct MappedCounters: Sendable, Equatable {
  /// Read requests.
  package var reads: UInt64 = 0
  /// Write requests.
  package var writes: UInt64 = 0
  /// Discards; writes of zeroes are among the writes.
  package var discards: UInt64 = 0
  /// Flushes that the worker was asked about: the module counts no others.
  package var flushes: UInt64 = 0
  /// Bytes that reads asked for.
  package var bytesRead: UInt64 = 0
  /// Bytes that writes brought.
  package var bytesWritten: UInt64 = 0
  /// Milliseconds of all reads together.
  package var reading: UInt64 = 0
  /// The same of writes.
  package var writing: UInt64 = 0
  /// The same of discards.
  package var discarding: UInt64 = 0
  /// Placements that are not durable yet.
  package var uncommitted: UInt64 = 0

  /// Nothing yet.
  package init() {}
}

/// Makes block devices of the target `userspace`, which a worker serves by their nodes. All
/// calls block. Those of the device-mapper itself are made one at a time and never from a
/// thread that a worker waits for.
package protocol DeviceMapping: Sendable {
  /// Whether the kernel has the target. Loads its module if that is installed.
  func isAvailable() throws(DeviceMapperError) -> Bool
  /// Makes a device: suspended, its node there for a worker. What is left of a start that came
  /// to nothing goes first. Throws EBUSY when the name is taken.
  func make(_ wish: MappedWish) throws(DeviceMapperError) -> DeviceNode
  /// Opens a device's node for a worker. Throws EBUSY while another has it.
  func openNode(_ disk: DiskID) throws(IOError) -> Descriptor
  /// Brings a device into use. Unless `probed`, udev is told not to look into it.
  func start(_ disk: DiskID, probed: Bool) throws(DeviceMapperError)
  /// What there is under the disk's name.
  func state(
    _ disk: DiskID, over backings: [ServedDevice.Backing]
  ) throws(DeviceMapperError) -> ServedDevice.State
  /// Whether a device in use, made earlier and perhaps by an earlier daemon, is there and ours.
  func isAttached(_ disk: DiskID, _ node: DeviceNode) throws(DeviceMapperError) -> Bool
  /// How many have the device open; 0 when it is not there.
  func users(_ disk: DiskID) throws(DeviceMapperError) -> Int
  /// Lets flushes succeed again after one that failed, and forgets the I/O errors counted so
  /// far.
  func clear(_ disk: DiskID) throws(DeviceMapperError)
  /// Writes out what was written to a device and commits it. Waits for the worker, for ever if
  /// there is none; `failFaults` ends the wait with an error.
  func flush(_ node: DeviceNode) throws(IOError)
  /// Fails every request that waits for a worker. Without a table in use there is none.
  func failFaults(_ disk: DiskID) throws(DeviceMapperError)
  /// Removes a device. One that is not there is no error. Throws EBUSY while somebody has it
  /// open; `deferred`: then it goes with the last close.
  func remove(_ disk: DiskID, deferred: Bool) throws(DeviceMapperError)
  /// Takes its files from a device that somebody has open: every request fails from now on, and the
  /// device goes with the last close. False, and nothing has changed, while requests are under way
  /// or, unless `losing`, it holds writes that are in no image.
  func retire(
    _ disk: DiskID, _ node: DeviceNode, losing: Bool
  ) throws(DeviceMapperError) -> Bool
  /// Has all requests to a device wait, without waiting for those under way.
  func hold(_ disk: DiskID) throws(DeviceMapperError)
  /// Lets requests go on. A device that is not held is no error.
  func letGo(_ disk: DiskID) throws(DeviceMapperError)
  /// What the kernel counts of a device.
  func counters(_ disk: DiskID, _ node: DeviceNode) throws(DeviceMapperError) -> MappedCounters
  /// How long requests took since this was asked first, or since `stopLatencies`: the kernel
  /// begins to measure then.
  func latencies(_ disk: DiskID) throws(DeviceMapperError) -> LatencyHistogram
  /// Ends the measuring; none is no error.
  func stopLatencies(_ disk: DiskID) throws(DeviceMapperError)
  /// Removes the marks of loop devices that are no more (LoopMarks).
  func sweepMarks() throws(IOError)
  /// Every device that a daemon like this one has made.
  func devices() throws(DeviceMapperError) -> [DiskID: DeviceNode]
}

/// The kernel's device-mapper.
package struct KernelMapper: DeviceMapping {
  /// The mapper.
  package init() {}

  static let prefix = "dmu-"

  private func served(_ disk: DiskID) -> ServedDevice {
    ServedDevice(name: KernelMapper.prefix + "\(disk)", owner: "dmu-xend")
  }

  private func node(_ number: DeviceNumber, _ device: MappedDevice) -> DeviceNode {
    DeviceNode(
      kind: .dm, index: number.minor, path: device.path, major: number.major,
      minor: number.minor)
  }

  /// Asks the kernel for the target's version.
  package func isAvailable() throws(DeviceMapperError) -> Bool { try ServedDevice.isAvailable() }

  /// Makes dmu-DISK.
  package func make(_ wish: MappedWish) throws(DeviceMapperError) -> DeviceNode {
    let served = served(wish.disk)
    if try served.state(over: wish.backings) == .unfinished { try served.device.remove() }
    let number = try served.make(
      size: wish.size, blockSize: wish.blockSize, wish.backings, readOnly: wish.readOnly)
    return node(number, served.device)
  }

  /// Opens /dev/dmu/dmu-DISK.
  package func openNode(_ disk: DiskID) throws(IOError) -> Descriptor {
    try Descriptor(path: "/dev/dmu/" + served(disk).device.name, flags: O_RDWR)
  }

  /// Resumes it for the first time.
  package func start(_ disk: DiskID, probed: Bool) throws(DeviceMapperError) {
    try served(disk).start(probed: probed)
  }

  /// Compares name, identifier and table.
  package func state(
    _ disk: DiskID, over backings: [ServedDevice.Backing]
  ) throws(DeviceMapperError) -> ServedDevice.State { try served(disk).state(over: backings) }

  /// Compares name, identifier and number.
  package func isAttached(
    _ disk: DiskID, _ node: DeviceNode
  ) throws(DeviceMapperError) -> Bool {
    let served = served(disk)
    guard DeviceMapper.isAvailable, let found = try served.device.information() else {
      return false
    }
    guard found.hasLiveTable, self.node(found.number, served.device) == node,
      try served.device.uuid() == served.identifier
    else { return false }
    // Not one that was retired.
    return try served.device.table().allSatisfy { $0.target == ServedDevice.target }
  }

  /// Has the device's page cache written, and the device flushed.
  package func flush(_ node: DeviceNode) throws(IOError) { try node.writeOut() }

  /// Tells the target.
  package func failFaults(_ disk: DiskID) throws(DeviceMapperError) {
    let device = served(disk).device
    guard try device.information()?.hasLiveTable == true else { return }
    _ = try device.message("fail_faults")
  }

  /// The device-mapper's count.
  package func users(_ disk: DiskID) throws(DeviceMapperError) -> Int {
    Int(try served(disk).device.information()?.openCount ?? 0)
  }

  /// Tells the target.
  package func clear(_ disk: DiskID) throws(DeviceMapperError) {
    _ = try served(disk).device.message("clear_error")
  }

  /// Removes it, and with it the loop devices that were made for it.
  package func remove(_ disk: DiskID, deferred: Bool) throws(DeviceMapperError) {
    do throws(DeviceMapperError) {
      try served(disk).device.remove(deferred: deferred)
    } catch {
      guard error.code == ENXIO else { throw error }
    }
  }

  /// Suspends the device, which ends what is under way, looks once more, and gives it a table of
  /// errors.
  package func retire(
    _ disk: DiskID, _ node: DeviceNode, losing: Bool
  ) throws(DeviceMapperError) -> Bool {
    let device = served(disk).device
    // A suspend waits for what is under way, however long that takes.
    let path = "/sys/block/dm-\(node.index)/inflight"
    do throws(IOError) {
      let numbers = try TextFile.read(path).split(whereSeparator: \.isWhitespace)
      guard numbers.allSatisfy({ $0 == "0" }) else { return false }
    } catch { throw DeviceMapperError(error.code, "read", path) }
    guard let line = try device.table().first else { return false }
    let table: Table
    do throws(TableError) { table = try Table(length: line.length, .error) } catch {
      throw DeviceMapperError(EINVAL, "retire", device.name, explanation: "\(error)")
    }
    try device.suspend()
    let mayGo: Bool
    do throws(DeviceMapperError) {
      mayGo = losing ? true : try counters(disk, node).uncommitted == 0
      if mayGo { try device.load(table) }
    } catch {
      try device.resume(probed: false)
      throw error
    }
    // With a table loaded, that one comes into use.
    try device.resume(probed: false)
    guard mayGo else { return false }
    try remove(disk, deferred: true)
    return true
  }

  /// Suspends it without a flush.
  package func hold(_ disk: DiskID) throws(DeviceMapperError) {
    try served(disk).device.suspend(flush: false, freeze: false)
  }

  /// Resumes it.
  package func letGo(_ disk: DiskID) throws(DeviceMapperError) {
    let device = served(disk).device
    guard try device.information()?.isSuspended == true else { return }
    try device.resume(probed: false)
  }

  /// Reads the target's status and the device's own counters.
  package func counters(
    _ disk: DiskID, _ node: DeviceNode
  ) throws(DeviceMapperError) -> MappedCounters {
    var counters = MappedCounters()
    // NAME MAJOR:MINOR WORKER EXTENTS UNCOMMITTED WAITING HEALTH
    let words = try served(disk).device.status(flush: false).first?.words.split(separator: " ")
    if let words, words.count > 4, let count = UInt64(words[4]) { counters.uncommitted = count }
    let path = "/sys/block/dm-\(node.index)/stat"
    do throws(IOError) {
      let numbers = try TextFile.read(path).split { $0 == " " || $0 == "\n" }.map { UInt64($0) }
      func number(_ index: Int) -> UInt64 {
        numbers.indices.contains(index) ? numbers[index] ?? 0 : 0
      }
      // Source: Documentation/block/stat.rst. A bio-based device counts no flushes.
      (counters.reads, counters.writes, counters.discards) = (number(0), number(4), number(11))
      (counters.bytesRead, counters.bytesWritten) = (number(2) &* 512, number(6) &* 512)
      (counters.reading, counters.writing) = (number(3), number(7))
      counters.discarding = number(14)
    } catch { throw DeviceMapperError(error.code, "read", path) }
    let module = try served(disk).device.message("stats") ?? ""
    for word in module.split(whereSeparator: \.isWhitespace) where word.hasPrefix("flushes=") {
      counters.flushes = UInt64(word.dropFirst("flushes=".count)) ?? 0
    }
    return counters
  }

  /// The device-mapper's own statistics.
  package func latencies(_ disk: DiskID) throws(DeviceMapperError) -> LatencyHistogram {
    try served(disk).device.latencies()
  }

  /// Deletes them.
  package func stopLatencies(_ disk: DiskID) throws(DeviceMapperError) {
    try served(disk).device.stopLatencies()
  }

  /// Those of this host.
  package func sweepMarks() throws(IOError) { try LoopMarks.host.sweep() }

  /// Every device with our name and identifier.
  package func devices() throws(DeviceMapperError) -> [DiskID: DeviceNode] {
    guard DeviceMapper.isAvailable else { return [:] }
    var found: [DiskID: DeviceNode] = [:]
    for (device, number) in try DeviceMapper.devices()
    where device.name.hasPrefix(KernelMapper.prefix) {
      guard let disk = DiskID(device.name.dropFirst(KernelMapper.prefix.count)) else { continue }
      let served = served(disk)
      do throws(DeviceMapperError) {
        if try device.uuid() == served.identifier { found[disk] = node(number, device) }
      } catch {
        guard error.code == ENXIO else { throw error }
      }
    }
    return found
  }
}
