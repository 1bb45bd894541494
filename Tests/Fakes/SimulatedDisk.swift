// SPDX-License-Identifier: Apache-2.0
// A disk with a volatile write cache, for tests of what a power cut leaves behind.
//
// A sector of 512 bytes is written whole or not at all; everything larger may tear. Until a
// flush every version that a sector has had since the last flush, and the one before, may be
// what the medium holds when the power goes. Two kinds of disks are drawn: one that chooses
// for each sector by itself, and one that keeps or loses each write as a whole, in any order.
// The first tears structures; the second lets a structure of many sectors survive alone,
// which finds what was written too early.

package import BlockIO
import Glibc
import Synchronization
package import SystemIO
package import TestSupport

/// A disk of fixed size whose power can be cut. Safe from any thread.
package final class SimulatedDisk: ByteStore {
  /// Bytes of a sector.
  package static let sectorSize = 512

  private struct State {
    /// What reads see.
    var current: [UInt8]
    /// What each sector held at the last flush and since, the newest left out, for sectors
    /// that were written since.
    var older: [Int: [Version]] = [:]
    /// Writes since the last flush.
    var writes = 0
    /// Writes, zeroes and flushes that may still happen before the power goes.
    var fuse: Int?
  }

  /// What a sector held before a write.
  private struct Version {
    /// The write that replaced it, counted from the last flush.
    let replacedBy: Int
    let bytes: [UInt8]
  }

  private let state: Mutex<State>
  /// What errors call it.
  package let name: String
  /// Length in bytes.
  package let size: UInt64
  /// Always.
  package let isWritable = true
  /// It is a disk.
  package let isFixedSize = true

  /// A disk of zeroes, rounded up to whole sectors.
  package convenience init(_ name: String = "disk", size: Int) {
    let sectors = (size + Self.sectorSize - 1) / Self.sectorSize
    self.init(name, contents: [UInt8](repeating: 0, count: sectors * Self.sectorSize))
  }

  /// A disk whose contents, whole sectors, are durable.
  package init(_ name: String = "disk", contents: [UInt8]) {
    precondition(contents.count % Self.sectorSize == 0)
    self.name = name
    self.size = UInt64(contents.count)
    state = Mutex(State(current: contents))
  }

  /// Lets `count` more writes, zeroes and flushes happen; the next one, and every call after
  /// it, throws EIO, and nothing reaches the disk any more. nil: no limit.
  package func cutPower(after count: Int?) {
    state.withLock { $0.fuse = count }
  }

  /// Whether the power has gone.
  package var isOff: Bool { state.withLock { $0.fuse.map { $0 < 0 } ?? false } }

  /// What reads see.
  package func contents() -> [UInt8] { state.withLock { $0.current } }

  /// The disk as it may be found after the power went: each sector that was written since
  /// the last flush holds one of its versions, by the generator's choice.
  package func afterPowerCut(using random: inout SplitMix64) -> SimulatedDisk {
    let (contents, older, writes) = state.withLock { ($0.current, $0.older, $0.writes) }
    // How likely the newest is kept: none, some, most or all are.
    let newest = [0, 25, 50, 75, 100][random.below(5)]
    let isTorn = random.chance(50)
    let kept = isTorn ? [] : (0..<writes).map { _ in random.chance(newest) }
    var left = contents
    for sector in older.keys.sorted() {
      guard let versions = older[sector] else { continue }
      let version: Version?
      if isTorn {
        version = random.chance(newest) ? nil : versions[random.below(versions.count)]
      } else {
        // What the last kept write left is what the next, a lost one, replaced.
        let last = versions.lastIndex { kept[$0.replacedBy] } ?? -1
        version = last + 1 < versions.count ? versions[last + 1] : nil
      }
      guard let version else { continue }
      let start = sector * Self.sectorSize
      left.withUnsafeMutableBytes { left in
        let place = UnsafeMutableRawBufferPointer(rebasing: left[start...])
        version.bytes.withUnsafeBytes { place.copyMemory(from: $0) }
      }
    }
    return SimulatedDisk(name, contents: left)
  }

  /// Size; no modification time, as for a device.
  package func identity() -> StoreIdentity { StoreIdentity(size: size, modified: 0) }

  /// All of it.
  package func allocatedBytes() -> UInt64 { size }

  /// Fills the buffer; past the end, with zeroes. Throws EIO when the power is off.
  package func read(_ buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws(IOError) {
    let isOn = state.withLock { state in
      guard state.fuse ?? 0 >= 0 else { return false }
      let start = Int(min(offset, size))
      let count = min(buffer.count, state.current.count - start)
      state.current.withUnsafeBytes {
        buffer.copyMemory(from: UnsafeRawBufferPointer(rebasing: $0[start..<(start + count)]))
      }
      let rest = UnsafeMutableRawBufferPointer(rebasing: buffer[count...])
      rest.initializeMemory(as: UInt8.self, repeating: 0)
      return true
    }
    guard isOn else { throw IOError(EIO, "read", name) }
  }

  /// Burns the fuse by one, then changes sectors; false when the power is off.
  private func change(
    at offset: UInt64, count: Int, _ body: (UnsafeMutableRawBufferPointer) -> Void
  ) -> Bool {
    state.withLock { state in
      guard Self.burn(&state) else { return false }
      guard count > 0 else { return true }
      let start = Int(offset)
      let sectors = (start / Self.sectorSize)...((start + count - 1) / Self.sectorSize)
      for sector in sectors {
        let version = Version(
          replacedBy: state.writes, bytes: Self.copy(sector, of: state.current))
        state.older[sector, default: []].append(version)
      }
      state.writes += 1
      state.current.withUnsafeMutableBytes {
        body(UnsafeMutableRawBufferPointer(rebasing: $0[start..<(start + count)]))
      }
      return true
    }
  }

  private static func copy(_ sector: Int, of contents: [UInt8]) -> [UInt8] {
    let start = sector * sectorSize
    return [UInt8](unsafeUninitializedCapacity: sectorSize) { copy, count in
      contents.withUnsafeBytes {
        UnsafeMutableRawBufferPointer(copy)
          .copyMemory(from: UnsafeRawBufferPointer(rebasing: $0[start..<(start + sectorSize)]))
      }
      count = sectorSize
    }
  }

  private static func burn(_ state: inout State) -> Bool {
    guard let fuse = state.fuse else { return true }
    state.fuse = max(-1, fuse - 1)
    return fuse > 0
  }

  /// Writes into the cache. Throws ENOSPC past the end, EIO when the power is off.
  package func write(_ buffer: UnsafeRawBufferPointer, at offset: UInt64) throws(IOError) {
    guard offset <= size, UInt64(buffer.count) <= size - offset else {
      throw IOError(ENOSPC, "write", name)
    }
    let isOn = change(at: offset, count: buffer.count) { $0.copyMemory(from: buffer) }
    guard isOn else { throw IOError(EIO, "write", name) }
  }

  /// Writes zeroes into the cache, up to the end. Throws EIO when the power is off.
  package func zero(at offset: UInt64, count: UInt64) throws(IOError) {
    let start = min(offset, size)
    let isOn = change(at: start, count: Int(min(count, size - start))) {
      _ = $0.initializeMemory(as: UInt8.self, repeating: 0)
    }
    guard isOn else { throw IOError(EIO, "zero", name) }
  }

  /// A disk keeps its length. Throws ENOSPC for a greater one.
  package func resize(to size: UInt64) throws(IOError) {
    guard size <= self.size else { throw IOError(ENOSPC, "resize", name) }
  }

  /// Makes everything written so far durable. Throws EIO when the power is off.
  package func flush() throws(IOError) {
    let isOn = state.withLock { state in
      guard Self.burn(&state) else { return false }
      state.older.removeAll(keepingCapacity: true)
      state.writes = 0
      return true
    }
    guard isOn else { throw IOError(EIO, "flush", name) }
  }
}
