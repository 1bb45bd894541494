// SPDX-License-Identifier: Apache-2.0
// Which of a format's devices the kernel knows, and by which numbers. The kernel has up to 15,
// each a file or a device; a format may have more, and some that are neither (compressed
// clusters, a base that is itself an image), which are read through user space.

package import BlockIO
package import DiskModel

/// The devices of a format beside those of the kernel.
package struct KernelDevices: Sendable {
  /// What the kernel knows of a format's device.
  package enum Part: Sendable, Equatable {
    /// All of it, under this number; but for one sector, where its file ends within one.
    case whole(UInt16, torn: UInt64? = nil)
    /// It is several in a row, each beginning at a multiple of 1 << bits bytes: their numbers,
    /// nil for one that the kernel does not know.
    case joined([UInt16?], bits: UInt64)
    /// Nothing.
    case nothing
  }

  /// Something that the kernel has a number for.
  package struct Known: Sendable {
    let store: any ByteStore
    let isDirect: Bool

    /// A file or device. `isDirect`: the kernel passes the page cache by.
    package init(_ store: any ByteStore, isDirect: Bool) {
      self.store = store
      self.isDirect = isDirect
    }
  }

  /// What the kernel knows, by its numbers.
  let known: [Known]
  private let stores: [any ByteStore]
  private let parts: [Part]
  private let blockSectors: UInt64

  /// The devices of a format, each with what the kernel knows of it, for blocks of so many
  /// bytes.
  package init(
    _ devices: [(store: any ByteStore, part: Part)], known: [Known], blockSize: UInt32
  ) {
    self.known = known
    stores = devices.map(\.store)
    parts = devices.map(\.part)
    blockSectors = UInt64(blockSize) / 512
  }

  /// A place of the format in the kernel's numbers, and for how many of so many blocks from it
  /// on that is true; nil when those have to be read through user space.
  package func translate(_ place: Place, blocks: UInt64) -> (place: Place?, count: UInt64) {
    guard case .device(let number, let sector) = place else { return (.zero, blocks) }
    guard Int(number) < parts.count else { return (nil, blocks) }
    switch parts[Int(number)] {
    case .nothing: return (nil, blocks)
    case .whole(let number, let torn):
      guard let torn, torn >= sector, torn - sector < blocks * blockSectors else {
        return (.device(number, sector: sector), blocks)
      }
      let before = (torn - sector) / blockSectors
      return before == 0 ? (nil, 1) : (.device(number, sector: sector), before)
    case .joined(let numbers, let bits):
      let sectors: UInt64 = 1 << (bits - 9)
      let index = sector / sectors
      guard index < UInt64(numbers.count), let number = numbers[Int(index)] else {
        return (nil, blocks)
      }
      let within = sector % sectors
      let left = (sectors - within) / blockSectors
      return (.device(number, sector: within), min(blocks, max(1, left)))
    }
  }

  /// A place of the kernel in the format's numbers; nil for a device that is none of the
  /// format's.
  package func restore(_ place: Place) -> Place? {
    guard case .device(let number, let sector) = place else { return place }
    for (index, part) in parts.enumerated() {
      switch part {
      case .whole(number, _): return .device(UInt16(index), sector: sector)
      case .joined(let numbers, let bits):
        guard let position = numbers.firstIndex(of: number) else { continue }
        let start = UInt64(position) << (bits - 9)
        return .device(UInt16(index), sector: start + sector)
      default: continue
      }
    }
    return nil
  }

  /// The store of a format's device; nil when there is none.
  func store(_ number: UInt16) -> (any ByteStore)? {
    Int(number) < stores.count ? stores[Int(number)] : nil
  }
}
