// SPDX-License-Identifier: Apache-2.0
// Several files on one simulated medium: a process that works on them may be killed, or the power
// of all of them may go, at any step.

import BlockIO
import Fakes
import SystemIO
import TestSupport

/// Files of a machine. Used from one thread.
final class Machine {
  /// Every file has room for so many bytes.
  static let room: UInt64 = 512 << 10
  /// How it ends.
  enum End: Sendable, CaseIterable {
    /// The process is killed: whatever it wrote is there.
    case kill
    /// The power goes: of what was not flushed any sector may be old, and a file may have the
    /// length that it had when it was flushed last. Where it has the length that a write behind
    /// its end gave it, it has those bytes too: file systems write the length after the data
    /// (ext4 in ordered mode, xfs).
    case powerCut
  }

  final class Files {
    var sizes: [UInt64]
    var durable: [UInt64]
    /// Bytes by which writes made files longer since they were flushed, on the medium.
    var appended: [[Range<UInt64>]]
    /// Writes, zeroes, lengths and flushes that may still happen.
    var fuse: Int?
    init(_ sizes: [UInt64]) {
      self.sizes = sizes
      durable = sizes
      appended = sizes.map { _ in [] }
    }
  }

  let names: [String]
  private let disk: SimulatedDisk
  private let files: Files

  init(_ names: [String], _ disk: SimulatedDisk? = nil, sizes: [UInt64]? = nil) {
    self.names = names
    self.disk = disk ?? SimulatedDisk("disk", size: Int(Self.room) * names.count)
    files = Files(sizes ?? names.map { _ in 0 })
  }

  /// Another machine with the same files.
  func copy() -> Machine {
    Machine(names, SimulatedDisk("disk", contents: disk.contents()), sizes: files.sizes)
  }

  /// Lets so many more steps happen; nil: all.
  func limit(_ steps: Int?) { files.fuse = steps }
  /// How many steps are left.
  var left: Int { files.fuse ?? 0 }

  /// What is found afterwards.
  func after(_ end: End, using random: inout SplitMix64) -> Machine {
    switch end {
    case .kill: return copy()
    case .powerCut:
      var sizes: [UInt64] = []
      for (now, durable) in zip(files.sizes, files.durable) {
        sizes.append(now > durable && random.chance(50) ? durable : now)
      }
      let found = disk.afterPowerCut(using: &random)
      guard files.appended.contains(where: { !$0.isEmpty }) else {
        return Machine(names, found, sizes: sizes)
      }
      let newest = disk.contents()
      var contents = found.contents()
      for (index, ranges) in files.appended.enumerated() where sizes[index] == files.sizes[index] {
        for range in ranges {
          let range = Int(range.lowerBound)..<Int(range.upperBound)
          contents.replaceSubrange(range, with: newest[range])
        }
      }
      return Machine(names, SimulatedDisk("disk", contents: contents), sizes: sizes)
    }
  }

  func file(_ name: String) -> MachineFile {
    let index = names.firstIndex(of: name) ?? names.count
    precondition(index < names.count, "a machine without \(name)")
    return MachineFile(name, index, disk, files)
  }
}

/// A file of a machine. One test, on one thread, has the whole machine.
final class MachineFile: ByteStore, @unchecked Sendable {
  let name: String
  let isWritable = true
  private let index: Int
  private let disk: SimulatedDisk
  private let files: Machine.Files
  private var start: UInt64 { UInt64(index) * Machine.room }

  init(_ name: String, _ index: Int, _ disk: SimulatedDisk, _ files: Machine.Files) {
    self.name = name
    self.index = index
    self.disk = disk
    self.files = files
  }

  var size: UInt64 { files.sizes[index] }
  func identity() -> StoreIdentity { StoreIdentity(size: size, modified: 0) }
  func allocatedBytes() -> UInt64 { size }

  private func step(_ operation: String) throws(IOError) {
    guard let fuse = files.fuse else { return }
    files.fuse = max(-1, fuse - 1)
    guard fuse > 0 else { throw IOError(5, operation, name) }
  }

  func read(_ buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws(IOError) {
    if files.fuse.map({ $0 < 0 }) ?? false { throw IOError(5, "read", name) }
    let here = Int(min(UInt64(buffer.count), size - min(size, offset)))
    let rest = UnsafeMutableRawBufferPointer(rebasing: buffer[here...])
    rest.initializeMemory(as: UInt8.self, repeating: 0)
    guard here > 0 else { return }
    try disk.read(UnsafeMutableRawBufferPointer(rebasing: buffer[..<here]), at: start + offset)
  }

  func write(_ buffer: UnsafeRawBufferPointer, at offset: UInt64) throws(IOError) {
    try step("write")
    guard offset <= Machine.room, UInt64(buffer.count) <= Machine.room - offset else {
      throw IOError(28, "write", name)
    }
    try disk.write(buffer, at: start + offset)
    let end = offset + UInt64(buffer.count)
    if end > size {
      files.appended[index].append((start + max(size, offset))..<(start + end))
      files.sizes[index] = end
    }
  }

  func zero(at offset: UInt64, count: UInt64) throws(IOError) {
    try step("zero")
    guard offset < size else { return }
    try disk.zero(at: start + offset, count: min(count, size - offset))
  }

  func resize(to size: UInt64) throws(IOError) {
    try step("resize")
    guard size <= Machine.room else { throw IOError(28, "resize", name) }
    // What is cut off is gone, should the file grow again.
    if size < self.size { try disk.zero(at: start + size, count: self.size - size) }
    files.sizes[index] = size
    files.durable[index] = min(files.durable[index], size)
  }

  func flush() throws(IOError) {
    try step("flush")
    try disk.flush()
    files.durable[index] = size
    files.appended[index] = []
  }
}
