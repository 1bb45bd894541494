// SPDX-License-Identifier: Apache-2.0
// A device of the device-mapper, by its name: everything that dmsetup does with one.
//
// Every call needs root. Errors carry the kernel's words where it has any.

internal import CDeviceMapper
import Glibc

/// A line of a table or a status as the kernel prints it.
package struct KernelLine: Sendable, Equatable, CustomStringConvertible {
  /// The first sector.
  package let start: UInt64
  /// How many sectors.
  package let length: UInt64
  /// The target's name.
  package let target: String
  /// What the target says.
  package let words: String

  /// As dmsetup prints it.
  package var description: String { "\(start) \(length) \(target) \(words)" }
}

/// What the kernel knows of a device.
package struct DeviceInformation: Sendable, Equatable {
  /// Its number.
  package let number: DeviceNumber
  /// How many have it open.
  package let openCount: Int32
  /// How many events it has had; wraps.
  package let eventNumber: UInt32
  /// How many lines its table has.
  package let targetCount: Int32
  /// Whether it is suspended.
  package let isSuspended: Bool
  /// Whether a table is in use, and whether one is loaded to be.
  package let hasLiveTable: Bool
  /// Whether a table waits for the next resume.
  package let hasInactiveTable: Bool
  /// Whether it is only read.
  package let isReadOnly: Bool
}

/// A mapped device. A value: the device need not be there.
package struct MappedDevice: Sendable, Hashable {
  /// Its name in /dev/mapper.
  package let name: String
  /// Its node.
  package var path: String { "/dev/mapper/" + name }

  /// A device by its name.
  package init(_ name: String) {
    self.name = name
  }

  /// Makes the device, without a table and suspended. Throws EBUSY when the name or the
  /// identifier is taken.
  package func create(uuid: String? = nil) throws(DeviceMapperError) -> DeviceNumber {
    try KernelRequest.perform(DM_DEVICE_CREATE, "create", name) { task throws(DeviceMapperError) in
      try task.name(name)
      if let uuid { try task.set(task.library.dm_task_set_uuid(task.raw, uuid)) }
      try task.set(task.library.dm_task_set_add_node(task.raw, DM_ADD_NODE_ON_RESUME))
      try task.run()
      let info = try task.information()
      return DeviceNumber(major: info.major, minor: info.minor)
    }
  }

  /// Loads a table, which comes into use with the next resume. Throws what a target's
  /// constructor has against it, in the kernel's words.
  package func load(_ table: Table, readOnly: Bool = false) throws(DeviceMapperError) {
    try KernelRequest.perform(DM_DEVICE_RELOAD, "load a table for", name) {
      task throws(DeviceMapperError) in
      try task.name(name)
      if readOnly { try task.set(task.library.dm_task_set_ro(task.raw)) }
      for segment in table.segments {
        let (target, words) = (segment.mapping.target, segment.mapping.parameters)
        try task.set(
          task.library.dm_task_add_target(task.raw, segment.start, segment.length, target, words))
      }
      try task.run()
    }
  }

  /// Drops a table that is loaded and not in use.
  package func clear() throws(DeviceMapperError) {
    try simple(DM_DEVICE_CLEAR, "clear the loaded table of")
  }

  /// Brings the loaded table into use and lets requests go on. The node is there afterwards.
  /// Unless `probed`, nobody looks for file systems and volumes on it by himself.
  package func resume(probed: Bool = true) throws(DeviceMapperError) {
    try KernelRequest.perform(DM_DEVICE_RESUME, "resume", name) { task throws(DeviceMapperError) in
      try task.name(name)
      try task.set(task.library.dm_task_set_add_node(task.raw, DM_ADD_NODE_ON_RESUME))
      try task.runWithNodes(probed: probed)
    }
  }

  /// Makes requests wait. With `flush` those under way come to their end first, otherwise
  /// targets may give them back; with `freeze` a file system on it is brought to rest.
  package func suspend(flush: Bool = true, freeze: Bool = true) throws(DeviceMapperError) {
    try KernelRequest.perform(DM_DEVICE_SUSPEND, "suspend", name) {
      task throws(DeviceMapperError) in
      try task.name(name)
      if !flush { try task.set(task.library.dm_task_no_flush(task.raw)) }
      if !freeze { try task.set(task.library.dm_task_skip_lockfs(task.raw)) }
      try task.run()
    }
  }

  /// Gives the device another name. Throws EBUSY when that is taken.
  package func rename(to other: String) throws(DeviceMapperError) {
    try KernelRequest.perform(DM_DEVICE_RENAME, "rename", name) { task throws(DeviceMapperError) in
      try task.name(name)
      try task.set(task.library.dm_task_set_newname(task.raw, other))
      try task.runWithNodes()
    }
  }

  /// Removes the device. Throws EBUSY while somebody has it open; `deferred`: then it goes
  /// with the last close. `patient`: tries again for some seconds, as udev may be looking at it.
  package func remove(deferred: Bool = false, patient: Bool = false) throws(DeviceMapperError) {
    try KernelRequest.perform(DM_DEVICE_REMOVE, "remove", name) { task throws(DeviceMapperError) in
      try task.name(name)
      if deferred { try task.set(task.library.dm_task_deferred_remove(task.raw)) }
      if patient { try task.set(task.library.dm_task_retry_remove(task.raw)) }
      try task.runWithNodes()
    }
  }

  /// What the kernel knows of it; nil when there is no such device.
  package func information() throws(DeviceMapperError) -> DeviceInformation? {
    try KernelRequest.perform(DM_DEVICE_INFO, "examine", name) { task throws(DeviceMapperError) in
      try task.name(name)
      try task.run()
      let info = try task.information()
      guard info.exists != 0 else { return nil }
      return DeviceInformation(
        number: DeviceNumber(major: info.major, minor: info.minor), openCount: info.open_count,
        eventNumber: info.event_nr, targetCount: info.target_count,
        isSuspended: info.suspended != 0, hasLiveTable: info.live_table != 0,
        hasInactiveTable: info.inactive_table != 0, isReadOnly: info.read_only != 0)
    }
  }

  /// Its identifier; empty when it has none. Throws ENXIO when there is no such device.
  package func uuid() throws(DeviceMapperError) -> String {
    try KernelRequest.perform(DM_DEVICE_INFO, "examine", name) { task throws(DeviceMapperError) in
      try task.name(name)
      try task.run()
      guard try task.information().exists != 0 else {
        throw DeviceMapperError(ENXIO, "examine", name)
      }
      return task.library.dm_task_get_uuid(task.raw).map { String(cString: $0) } ?? ""
    }
  }

  /// The devices that its table in use is built on. Throws ENXIO when there is no such device.
  package func dependencies() throws(DeviceMapperError) -> [DeviceNumber] {
    try KernelRequest.perform(DM_DEVICE_DEPS, "list what is under", name) {
      task throws(DeviceMapperError) in
      try task.name(name)
      try task.run()
      guard let deps = task.library.dm_task_get_deps(task.raw) else { return [] }
      let start = UnsafeRawPointer(deps) + MemoryLayout<dm_deps>.size
      return (0..<Int(deps.pointee.count)).map { index in
        let device = start.loadUnaligned(fromByteOffset: index * 8, as: UInt64.self)
        return DeviceNumber(device)
      }
    }
  }

  /// What each target says of itself. With `flush` targets may bring their figures up to date
  /// first. Throws ENXIO when there is no such device.
  package func status(flush: Bool = true) throws(DeviceMapperError) -> [KernelLine] {
    try KernelRequest.perform(DM_DEVICE_STATUS, "read the status of", name) {
      task throws(DeviceMapperError) in
      try task.name(name)
      if !flush { try task.set(task.library.dm_task_no_flush(task.raw)) }
      try task.run()
      return task.lines()
    }
  }

  /// The table in use, as the kernel prints it; `Table(parsing:)` takes its lines. Throws
  /// ENXIO when there is no such device.
  package func table() throws(DeviceMapperError) -> [KernelLine] {
    try KernelRequest.perform(DM_DEVICE_TABLE, "read the table of", name) {
      task throws(DeviceMapperError) in
      try task.name(name)
      try task.run()
      return task.lines()
    }
  }

  /// Says something to the target at a sector. Answers what it says back, if anything.
  package func message(_ words: String, sector: UInt64 = 0) throws(DeviceMapperError) -> String? {
    try KernelRequest.perform(DM_DEVICE_TARGET_MSG, "send '\(words)' to", name) {
      task throws(DeviceMapperError) in
      try task.name(name)
      try task.set(task.library.dm_task_set_sector(task.raw, sector))
      try task.set(task.library.dm_task_set_message(task.raw, words))
      try task.run()
      return task.library.dm_task_get_message_response(task.raw).map { String(cString: $0) }
    }
  }

  /// Waits until the device has had an event after that number; the number then. A signal
  /// ends the waiting with EINTR, the device's removal with ENXIO.
  package func waitForEvent(after number: UInt32) throws(DeviceMapperError) -> UInt32 {
    try KernelRequest.performApart(DM_DEVICE_WAITEVENT, "wait for an event of", name) {
      task throws(DeviceMapperError) in
      try task.name(name)
      try task.set(task.library.dm_task_set_event_nr(task.raw, number))
      try task.run()
      return try task.information().event_nr
    }
  }

  private func simple(_ type: Int, _ operation: String) throws(DeviceMapperError) {
    try KernelRequest.perform(type, operation, name) { task throws(DeviceMapperError) in
      try task.name(name)
      try task.run()
    }
  }
}

extension DeviceNumber {
  /// From the kernel's own spelling in 64 bits. Source: new_decode_dev in kdev_t.h, widened.
  init(_ device: UInt64) {
    self.init(
      major: UInt32((device >> 8) & 0xfff) | UInt32((device >> 32) & 0xffff_f000),
      minor: UInt32(device & 0xff) | UInt32((device >> 12) & 0xfff_ff00))
  }
}
