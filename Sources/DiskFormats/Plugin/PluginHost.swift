// SPDX-License-Identifier: Apache-2.0
// What a plugin is given: its devices, through functions of C.

import BlockIO
internal import CPlugin
import Glibc
import SystemIO

/// The devices of one plugin's disk, behind the structure that its functions are given.
final class PluginHost {
  let devices: [any ByteStore]
  /// Lent to the plugin for as long as this object lives.
  let pointer: UnsafeMutablePointer<dmu_host>
  /// Where the structure says whose it is: just behind itself.
  private struct Block {
    var host: dmu_host
    var owner: UnsafeMutableRawPointer
  }
  private let block: UnsafeMutablePointer<Block>

  init(_ devices: [any ByteStore], writable: Bool) {
    self.devices = devices
    block = .allocate(capacity: 1)
    pointer = UnsafeMutableRawPointer(block).assumingMemoryBound(to: dmu_host.self)
    var host = dmu_host()
    host.version = UInt32(DMU_PLUGIN_VERSION)
    host.devices = UInt32(devices.count)
    host.writable = writable ? 1 : 0
    host.size = { host, device in PluginHost.of(host)?.device(device)?.size ?? 0 }
    host.read = { host, device, buffer, count, offset in
      PluginHost.attempt(host, device) { store throws(IOError) in
        try store.read(UnsafeMutableRawBufferPointer(start: buffer, count: count), at: offset)
      }
    }
    host.write = { host, buffer, count, offset in
      PluginHost.attempt(host, 0) { store throws(IOError) in
        try store.write(UnsafeRawBufferPointer(start: buffer, count: count), at: offset)
      }
    }
    host.grow = { host, size in
      PluginHost.attempt(host, 0) { store throws(IOError) in
        if store.size < size { try store.resize(to: size) }
      }
    }
    host.flush = { host in
      PluginHost.attempt(host, 0) { store throws(IOError) in try store.flush() }
    }
    block.initialize(
      to: Block(host: host, owner: Unmanaged.passUnretained(self).toOpaque()))
  }

  deinit {
    block.deinitialize(count: 1)
    block.deallocate()
  }

  private func device(_ number: UInt32) -> (any ByteStore)? {
    devices.indices.contains(Int(number)) ? devices[Int(number)] : nil
  }

  private static func of(_ host: UnsafePointer<dmu_host>?) -> PluginHost? {
    guard let host else { return nil }
    let block = UnsafeRawPointer(host).assumingMemoryBound(to: Block.self)
    return Unmanaged<PluginHost>.fromOpaque(block.pointee.owner).takeUnretainedValue()
  }

  private static func attempt(
    _ host: UnsafePointer<dmu_host>?, _ device: UInt32,
    _ work: (any ByteStore) throws(IOError) -> Void
  ) -> Int32 {
    guard let store = of(host)?.device(device) else { return ENODEV }
    do throws(IOError) {
      try work(store)
      return 0
    } catch { return error.code }
  }
}

/// The device that a plugin reads out itself.
final class PluginDevice: ReadOnlyStore {
  let name: String
  let size: UInt64 = 1 << 62
  private let body: @Sendable (UnsafeMutableRawPointer, Int, UInt64) -> Int32

  init(_ name: String, _ body: @escaping @Sendable (UnsafeMutableRawPointer, Int, UInt64) -> Int32)
  {
    self.name = name
    self.body = body
  }

  func read(_ buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws(IOError) {
    guard let start = buffer.baseAddress else { return }
    let code = body(start, buffer.count, offset)
    guard code == 0 else { throw IOError(code, "read", name) }
  }
}
