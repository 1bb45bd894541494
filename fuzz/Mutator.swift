// SPDX-License-Identifier: Apache-2.0
// Mutations that know what an image is made of: numbers of 2, 4 and 8 bytes on their own
// alignment, near the front or where an entry of a table points, set to what breaks parsers;
// and checksums that are put right again, so that the damage behind them is looked at.

@testable import DiskFormats

@_silgen_name("LLVMFuzzerMutate")
func mutateBytes(_ data: UnsafeMutablePointer<UInt8>, _ size: Int, _ most: Int) -> Int

/// A small generator; the fuzzer seeds it anew for each call.
struct Generator {
  var state: UInt64

  mutating func next() -> UInt64 {
    state &+= 0x9E37_79B9_7F4A_7C15
    var value = state
    value = (value ^ (value >> 30)) &* 0xBF58_476D_1CE4_E5B9
    value = (value ^ (value >> 27)) &* 0x94D0_49BB_1331_11EB
    return value ^ (value >> 31)
  }

  mutating func below(_ limit: Int) -> Int { Int(next() % UInt64(max(limit, 1))) }
}

/// Changes images of one format.
struct Mutator {
  let kind: ImageKind

  func mutate(
    _ data: UnsafeMutablePointer<UInt8>, _ size: Int, _ most: Int, seed: UInt32
  ) -> Int {
    var random = Generator(state: UInt64(seed))
    var size = size
    if size < 64 || random.below(4) == 0 {
      size = mutateBytes(data, size, most)
    } else {
      for _ in 0...random.below(4) { setNumber(data, size, &random) }
    }
    if random.below(8) != 0 { mendChecksums(data, size) }
    return size
  }

  /// Sets one number somewhere that matters.
  private func setNumber(
    _ data: UnsafeMutablePointer<UInt8>, _ size: Int, _ random: inout Generator
  ) {
    let width = [2, 4, 8, 8][random.below(4)]
    let offset = place(data, size, width, &random)
    guard offset + width <= size else { return }
    let value: UInt64
    switch random.below(8) {
    case 0: value = 0
    case 1: value = .max
    case 2: value = 1 << UInt64(random.below(width * 8))
    case 3: value = UInt64(size) &- UInt64(random.below(3)) &* 512
    case 4: value = UInt64(random.below(size)) & ~511
    case 5: value = number(data, offset, width) &+ UInt64(random.below(3)) &- 1
    case 6:
      let other = random.below(size / width) * width
      value = number(data, min(other, size - width), width)
    default: value = number(data, offset, width) ^ (1 << UInt64(random.below(width * 8)))
    }
    put(value, data, offset, width)
  }

  /// Half the numbers lie in the first 256 bytes; others where a number in them points to.
  private func place(
    _ data: UnsafeMutablePointer<UInt8>, _ size: Int, _ width: Int, _ random: inout Generator
  ) -> Int {
    let front = min(size, 256)
    let near = random.below(front / width) * width
    switch random.below(4) {
    case 0, 1: return near
    case 2:
      let pointer = number(data, min(random.below(front / 8) * 8, size - 8), 8)
      // The middle bits are the offset, in the formats whose entries have flags at both ends.
      let target = Int(pointer & 0x00FF_FFFF_FFFF_FE00)
      return target < size ? target + random.below(64) * width : near
    default: return random.below(size / width) * width
    }
  }

  private var isLittle: Bool { kind == .dscow || kind == .vmdk }

  private func number(_ data: UnsafeMutablePointer<UInt8>, _ offset: Int, _ width: Int) -> UInt64 {
    var value: UInt64 = 0
    for index in 0..<width {
      let byte = data[offset + (isLittle ? width - 1 - index : index)]
      value = value << 8 | UInt64(byte)
    }
    return value
  }

  private func put(
    _ value: UInt64, _ data: UnsafeMutablePointer<UInt8>, _ offset: Int, _ width: Int
  ) {
    for index in 0..<width {
      let shift = UInt64(8 * (isLittle ? index : width - 1 - index))
      data[offset + index] = UInt8(truncatingIfNeeded: value >> shift)
    }
  }

  private func mendChecksums(_ data: UnsafeMutablePointer<UInt8>, _ size: Int) {
    switch kind {
    case .vhd:
      mendSum(data, 0, 512, at: 64, size)
      mendSum(data, size - 512, 512, at: 64, size)
      mendSum(data, 512, 1024, at: 36, size)
    case .dscow:
      for copy in [0, 4096] where copy + 4096 <= size {
        put(0, data, copy + DscowHeader.Field.checksum, 4)
        let sum = CRC32C.of(Array(UnsafeBufferPointer(start: data + copy, count: 4096)))
        put(UInt64(sum), data, copy + DscowHeader.Field.checksum, 4)
      }
    default: break
    }
  }

  /// The ones' complement of the sum of a structure's bytes, the sum's own left out.
  private func mendSum(
    _ data: UnsafeMutablePointer<UInt8>, _ start: Int, _ count: Int, at field: Int, _ size: Int
  ) {
    guard start >= 0, start + count <= size else { return }
    put(0, data, start + field, 4)
    let sum = (0..<count).reduce(UInt32(0)) { $0 &+ UInt32(data[start + $1]) }
    put(UInt64(~sum), data, start + field, 4)
  }
}
