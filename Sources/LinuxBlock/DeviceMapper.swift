// SPDX-License-Identifier: Apache-2.0
// What the device-mapper of this kernel is and has.

internal import CDeviceMapper
import Glibc

/// The device-mapper as a whole.
package enum DeviceMapper {
  /// A version of a target.
  package struct Version: Sendable, Hashable, CustomStringConvertible {
    /// Tells what is not compatible.
    package let major: UInt32
    /// Tells what has been added.
    package let minor: UInt32
    /// Tells what has been mended.
    package let patch: UInt32

    /// MAJOR.MINOR.PATCH.
    package var description: String { "\(major).\(minor).\(patch)" }
  }

  /// Whether this kernel has a device-mapper that this process may use.
  package static var isAvailable: Bool { canBeOpened("/dev/mapper/control") }

  /// Whether a driver answers at this node: libdevmapper makes the node where there is none, also
  /// for a kernel without a device-mapper.
  static func canBeOpened(_ node: String) -> Bool {
    let file = open(node, O_RDWR | O_CLOEXEC)
    guard file >= 0 else { return false }
    close(file)
    return true
  }

  /// The version of a target; nil when the kernel has none of that name, or no device-mapper.
  /// The kernel loads the module `dm-NAME` for it if that is installed.
  package static func version(ofTarget name: String) throws(DeviceMapperError) -> Version? {
    guard isAvailable else { return nil }
    let asked = try versions(Int(DM_DEVICE_GET_TARGET_VERSION), name)
    if let version = asked?[name] { return version }
    return try versions(Int(DM_DEVICE_LIST_VERSIONS), nil)?[name]
  }

  private static func versions(
    _ type: Int, _ name: String?
  ) throws(DeviceMapperError) -> [String: Version]? {
    try KernelRequest.perform(type, "list the targets of", "the device-mapper") {
      task throws(DeviceMapperError) in
      if let name { try task.name(name) }
      // No such target, or a kernel before 5.0, which cannot be asked for one.
      guard task.library.dm_task_run(task.raw) != 0 else { return nil }
      guard let list = task.library.dm_task_get_versions(task.raw) else { return nil }
      var found: [String: Version] = [:]
      var at = UnsafeRawPointer(list)
      while true {
        let version = (0..<3).map { index in
          at.loadUnaligned(fromByteOffset: 4 + 4 * index, as: UInt32.self)
        }
        let name = String(cString: (at + 16).assumingMemoryBound(to: CChar.self))
        found[name] = Version(major: version[0], minor: version[1], patch: version[2])
        let next = Int(at.loadUnaligned(as: UInt32.self))
        if next == 0 { return found }
        at += next
      }
    }
  }

  /// Every mapped device, by name.
  package static func devices() throws(DeviceMapperError) -> [MappedDevice: DeviceNumber] {
    try KernelRequest.perform(Int(DM_DEVICE_LIST), "list", "the mapped devices") {
      task throws(DeviceMapperError) in
      try task.run()
      guard let list = task.library.dm_task_get_names(task.raw), list.pointee.dev != 0 else {
        return [:]
      }
      var found: [MappedDevice: DeviceNumber] = [:]
      var at = UnsafeRawPointer(list)
      while true {
        let device = at.loadUnaligned(as: UInt64.self)
        let name = String(cString: (at + 12).assumingMemoryBound(to: CChar.self))
        found[MappedDevice(name)] = DeviceNumber(device)
        let next = Int(at.loadUnaligned(fromByteOffset: 8, as: UInt32.self))
        if next == 0 { return found }
        at += next
      }
    }
  }
}
