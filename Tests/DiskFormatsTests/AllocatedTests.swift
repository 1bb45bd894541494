// SPDX-License-Identifier: Apache-2.0
// How many blocks have a place in the store, as status shows it: what is committed stays counted.

import DiskFormats
import Testing

@Suite struct AllocatedTests {
  @Test(arguments: [ImageKind.qcow, .qcow2, .vhd, .vmdk, .dscow])
  func growsWithEveryNewBlock(kind: ImageKind) throws {
    let judge = try Judge()
    if kind == .dscow {
      try judge.must("truncate", "-s", "64M", "disk.img")
      let made = try judge.open("disk.img", writable: true)
      try Dscow.create(store: made, base: nil, baseName: "", size: 64 << 20, overwrite: true)
    } else {
      try judge.must("qemu-img", "create", "-q", "-f", kind.name, "disk.img", "64M")
    }
    let store = try judge.open("disk.img", writable: true)
    let format = try judge.chain(store, kind: kind, writable: true)
    let engine = DeviceEngine(format, store: store)
    let before = format.allocatedBlocks
    let step = Int(format.blockSize) / 512
    for round in 1...5 {
      let sector = round * 2 * step
      try engine.write(sector, [UInt8](repeating: 1, count: 512))
      #expect(format.allocatedBlocks == before + UInt64(round), "placed")
      try engine.flush()
      #expect(format.allocatedBlocks == before + UInt64(round), "committed")
      // A block that has its place takes no other.
      try engine.write(sector, [UInt8](repeating: 2, count: 512))
      try engine.flush()
      #expect(format.allocatedBlocks == before + UInt64(round), "written again")
    }
  }
}
