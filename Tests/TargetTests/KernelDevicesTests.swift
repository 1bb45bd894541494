// SPDX-License-Identifier: Apache-2.0
// Which of a format's devices the kernel knows. That the kernel takes what comes of it is the
// kernel lab's to show (its scenario `formats`): there is no kernel here.

import DiskModel
import DMU
import Fakes
import Testing
import TestSupport

@testable import Target

@Suite struct KernelDevicesTests {
  private let devices: KernelDevices

  init() {
    let stores = (0..<6).map { MemoryStore("device \($0)") }
    devices = KernelDevices(
      [
        (stores[0], .joined([0, 1, nil], bits: 41)), (stores[1], .nothing),
        (stores[2], .whole(2)), (stores[3], .whole(3, torn: 100)),
      ],
      known: stores[2...].map { KernelDevices.Known($0, isDirect: false) }, blockSize: 4096)
  }

  /// A place of the format and so many blocks become a place of the kernel and so many.
  private func expect(
    _ place: Place, _ blocks: UInt64, _ wanted: Place?, _ count: UInt64,
    at location: SourceLocation = #_sourceLocation
  ) {
    let found = devices.translate(place, blocks: blocks)
    #expect(found.place == wanted, sourceLocation: location)
    #expect(found.count == count, sourceLocation: location)
  }

  @Test func placesGetTheKernelsNumbers() {
    expect(.device(2, sector: 80), 7, .device(2, sector: 80), 7)
    expect(.zero, 9, .zero, 9)
    // What is no device of the kernel, or none at all, is read through user space.
    expect(.device(1, sector: 8), 3, nil, 3)
    expect(.device(9, sector: 8), 3, nil, 3)
  }

  @Test func aSectorThatIsThereInPartIsNotTheKernels() {
    expect(.device(3, sector: 0), 50, .device(3, sector: 0), 12)
    expect(.device(3, sector: 96), 38, nil, 1)
    expect(.device(3, sector: 95), 1, nil, 1)
    expect(.device(3, sector: 92), 1, .device(3, sector: 92), 1)
    expect(.device(3, sector: 104), 5, .device(3, sector: 104), 5)
  }

  @Test func joinedFilesAreTheirOwnDevices() {
    let start: UInt64 = 1 << 32
    expect(.device(0, sector: 24), 5, .device(0, sector: 24), 5)
    expect(.device(0, sector: start + 24), 5, .device(1, sector: 24), 5)
    expect(.device(0, sector: 2 * start + 24), 5, nil, 5)
    expect(.device(0, sector: 3 * start), 5, nil, 5)
    // A run ends with its file.
    expect(.device(0, sector: start - 16), 5, .device(0, sector: start - 16), 2)
  }

  @Test func theKernelsNumbersLeadBack() {
    #expect(devices.restore(.device(0, sector: 8)) == .device(0, sector: 8))
    #expect(devices.restore(.device(1, sector: 8)) == .device(0, sector: 1 << 32 + 8))
    #expect(devices.restore(.device(2, sector: 8)) == .device(2, sector: 8))
    #expect(devices.restore(.zero) == .zero)
    #expect(devices.restore(.device(7, sector: 8)) == nil)
  }

  /// What is read for a request covers it, lies in the block, and fits into one answer.
  @Test func whatIsReadCoversWhatIsWanted() {
    var random = SplitMix64(seed: 5)
    for _ in 0..<10000 {
      let blockSize: UInt64 = 512 << UInt64(random.below(14))
      let start = blockSize * UInt64(random.below(1000))
      let isLast = random.chance(4)
      let length = isLast ? 512 * UInt64(1 + random.below(Int(blockSize / 512))) : blockSize
      // The kernel cuts a read at each MiB of a block.
      let unit = min(blockSize, 1 << 20)
      let first = 512 * UInt64(random.below(Int(length / 512)))
      let most = min(length, (first / unit + 1) * unit) - first
      let count = 512 * UInt64(1 + random.below(Int(most / 512)))
      let request = Message.Request(sector: (start + first) / 512, count: UInt32(count / 512))
      let part = KernelTarget.part(of: request, start: start, length: length)
      #expect(part.offset <= first && first + count <= part.offset + part.count)
      #expect(part.offset + part.count <= length && part.count <= UInt64(DMU.Answer.mostData))
      #expect(part.offset % 512 == 0 && part.count % 512 == 0)
    }
  }
}
