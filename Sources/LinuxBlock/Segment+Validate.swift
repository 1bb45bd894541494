// SPDX-License-Identifier: Apache-2.0
// What can be wrong with a line whose words were understood. Limits are those of the
// kernel's constructors (6.1: dm-stripe.c, dm-log.c, dm-raid1.c, dm-exception-store.c) and of
// dm-userspace.

extension Segment {
  /// Throws what is wrong with the line, which should begin at a sector.
  func validate(line: Int, expecting next: UInt64) throws(TableError) {
    func check(_ holds: Bool, _ field: String, _ reason: String) throws(TableError) {
      guard holds else { throw TableError(line: line, field: field, reason) }
    }
    try check(
      start == next, "START",
      next == 0
        ? "\(start) is not 0, where a table begins"
        : "\(start) is not \(next), where the line before it ends")
    try check(length > 0, "LEN", "0 sectors are none")
    try check(
      length <= UInt64(Int64.max) >> 9 && start <= UInt64(Int64.max) >> 9, "LEN",
      "\(length) sectors are more than a device can have")
    switch mapping {
    case .error, .zero: break
    case .linear(let location): try place(location, "OFFSET", line)
    case .striped(let chunk, let stripes): try validateStripes(chunk, stripes, line)
    case .mirror(let mirror): try validate(mirror, line)
    case .snapshot(let snapshot): try validate(snapshot, line)
    case .delay(let delay):
      try check(delay.flushes == nil || delay.writes != nil, "WRITE DEV", "is missing")
      for way in [delay.reads, delay.writes, delay.flushes] {
        if let way { try place(way.location, "OFFSET", line) }
      }
    case .flakey(let flakey):
      try place(flakey.location, "OFFSET", line)
      try check(flakey.up > 0 || flakey.down > 0, "DOWN", "no seconds up and none down")
    case .userspace(let device): try validate(device, line)
    }
  }

  private func place(
    _ location: Location, _ field: String, _ line: Int, length: UInt64? = nil
  ) throws(TableError) {
    guard location.offset <= UInt64(Int64.max) >> 9 - (length ?? self.length) else {
      throw TableError(
        line: line, field: field, "\(location.offset) lies beyond any device's end")
    }
  }

  private func validateStripes(
    _ chunk: UInt32, _ stripes: [Location], _ line: Int
  ) throws(TableError) {
    func fail(_ field: String, _ reason: String) -> TableError {
      TableError(line: line, field: field, reason)
    }
    guard !stripes.isEmpty else { throw fail("STRIPES", "0 devices hold nothing") }
    guard chunk > 0 else { throw fail("CHUNK", "0 sectors are none") }
    let count = UInt64(stripes.count)
    guard length % count == 0 else {
      throw fail("LEN", "\(length) sectors cannot be shared evenly by \(count) devices")
    }
    guard length / count % UInt64(chunk) == 0 else {
      throw fail("CHUNK", "a device's \(length / count) sectors are not whole chunks of \(chunk)")
    }
    for (index, stripe) in stripes.enumerated() {
      try place(stripe, "OFFSET \(index + 1)", line, length: length / count)
    }
  }

  private func validate(_ mirror: Mirror, _ line: Int) throws(TableError) {
    let region = mirror.region
    guard region >= 2, region & (region - 1) == 0 else {
      throw TableError(
        line: line, field: "REGION", "\(region) is not a power of two greater than 1")
    }
    guard region <= length else {
      throw TableError(line: line, field: "REGION", "\(region) is more than the line's length")
    }
    guard (2...9).contains(mirror.legs.count) else {
      throw TableError(line: line, field: "MIRRORS", "\(mirror.legs.count) is not 2 to 9")
    }
    guard !mirror.keepsLog || mirror.handlesErrors else {
      throw TableError(line: line, field: "FEATURE", "keep_log needs handle_errors")
    }
    for (index, leg) in mirror.legs.enumerated() { try place(leg, "OFFSET \(index + 1)", line) }
  }

  private func validate(_ snapshot: Snapshot, _ line: Int) throws(TableError) {
    let chunk = snapshot.chunk
    guard chunk & (chunk &- 1) == 0, chunk <= 1 << 22 else {
      throw TableError(
        line: line, field: "CHUNK", "\(chunk) is neither 0 nor a power of two up to 4194304")
    }
    guard snapshot.origin != snapshot.store else {
      throw TableError(line: line, field: "STORE", "it is the origin itself")
    }
  }

  private func validate(_ device: Userspace, _ line: Int) throws(TableError) {
    func fail(_ field: String, _ reason: String) -> TableError {
      TableError(line: line, field: field, reason)
    }
    guard Userspace.isName(device.name) else {
      throw fail("NAME", "'\(device.name)' is not 1 to 63 letters, digits or #+-.:=@_")
    }
    let block = device.blockSectors
    guard block > 0, block <= 1 << 20, block & (block - 1) == 0 else {
      throw fail("BLOCK_SECTORS", "\(block) is not a power of two up to 1048576")
    }
    guard (1...15).contains(device.devices.count) else {
      throw fail("NDEVS", "\(device.devices.count) is not 1 to 15")
    }
    guard device.faultTimeout <= 86400 else {
      throw fail("SECONDS", "\(device.faultTimeout) is more than 86400")
    }
  }
}

extension Userspace {
  /// Whether a node may be called so.
  package static func isName(_ name: String) -> Bool {
    let others = Set("#+-.:=@_".utf8)
    return (1...63).contains(name.utf8.count) && !name.hasPrefix(".")
      && name.utf8.allSatisfy { byte in
        (0x30...0x39).contains(byte) || (0x41...0x5a).contains(byte & 0xdf)
          || others.contains(byte)
      }
  }
}
