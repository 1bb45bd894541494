// SPDX-License-Identifier: Apache-2.0
// Files and loop devices to try things on.

import BlockIO
import Glibc
import SystemIO

/// A file of so many bytes, of nothing, in the lab's memory.
func scratchFile(_ name: String, bytes: UInt64) throws -> FileStore {
  let path = "/mnt/\(name)"
  let descriptor = try Descriptor(path: path, flags: O_RDWR | O_CREAT | O_TRUNC, mode: 0o600)
  let file = try FileStore(descriptor, name: path)
  try file.resize(to: bytes)
  return file
}

/// Writes a byte over a sector, reads a sector.
struct Sectors {
  let device: FileStore

  init(_ path: String, writable: Bool = true) throws {
    device = try FileStore(path: path, writable: writable)
  }

  func fill(_ sector: UInt64, _ byte: UInt8) throws {
    let data = [UInt8](repeating: byte, count: 512)
    try data.withUnsafeBytes { try device.write($0, at: sector * 512) }
    try device.flush()
  }

  /// The byte that the whole sector is of; nil when it is of several.
  func byte(_ sector: UInt64) throws -> UInt8? {
    let data = try device.read(at: sector * 512, count: 512)
    return data.allSatisfy { $0 == data[0] } ? data[0] : nil
  }
}
