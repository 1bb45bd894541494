// SPDX-License-Identifier: Apache-2.0
// A device of the target `userspace` from the files and devices that it stands on: what has to
// be done before a worker can open its node, and afterwards.
//
// Invariants:
// - A file becomes a loop device of the very descriptor that is given: a lock on it lasts as
//   long as the kernel may write through it, whatever becomes of its owner.
// - Whatever dies, a device either is found again by its name and identifier, or has never had
//   a request.

import Glibc
import SystemIO

/// A device that a worker serves, by its name: the device, its node and its identifier.
package struct ServedDevice: Sendable {
  /// A file or a device that a served device stands on. The descriptor is lent.
  package struct Backing: Sendable {
    /// Its descriptor.
    package var descriptor: Int32
    /// Its path, for people.
    package var name: String
    /// Whether it is only read.
    package var readOnly: Bool
    /// Whether the page cache is passed by. Without it a device, too, is stood on by way of a
    /// loop device, so that whoever reads and writes the same through its node meets no other
    /// bytes.
    package var isDirect: Bool
    /// By how many bytes a file may grow; 0 for one that keeps its length.
    package var growth: UInt64

    /// A backing from its parts.
    package init(
      descriptor: Int32, name: String, readOnly: Bool, isDirect: Bool = true, growth: UInt64 = 0
    ) {
      self.descriptor = descriptor
      self.name = name
      self.readOnly = readOnly
      self.isDirect = isDirect
      self.growth = growth
    }
  }

  /// What there is under the name.
  package enum State: Sendable, Equatable {
    /// Nothing.
    case absent
    /// Our device, which nobody has brought into use.
    case unfinished
    /// Our device over these files and devices.
    case ours
    /// Something else; why.
    case foreign(String)
  }

  /// The name of the target.
  package static let target = "userspace"
  /// What the identifiers of all such devices begin with.
  package static let prefix = "DMU-"

  /// The device.
  package let device: MappedDevice
  /// What tells it from others' devices.
  package let identifier: String

  /// A device by its name. `owner` is who makes it: "cowd", "dmu-xend".
  package init(name: String, owner: String) {
    device = MappedDevice(name)
    identifier = "\(Self.prefix)\(owner)-\(name)"
  }

  /// Whether this kernel has the target, in a version that we can speak to; loads the module
  /// if it is installed.
  package static func isAvailable() throws(DeviceMapperError) -> Bool {
    try DeviceMapper.version(ofTarget: target)?.major == 1
  }

  /// By how many bytes the files of a disk of so many may grow: each block gets a new place once,
  /// its part of the tables included, and some are placed for nothing.
  package static func growth(of size: UInt64) -> UInt64 {
    2 * min(size, 1 << 60) + 1 << 30
  }

  /// What there is under the name.
  package func state(over backings: [Backing]) throws(DeviceMapperError) -> State {
    guard let information = try device.information() else { return .absent }
    guard try device.uuid() == identifier else {
      return .foreign("\(device.path) exists and is none of ours")
    }
    guard information.hasLiveTable else { return .unfinished }
    let lines = try device.table()
    guard lines.count == 1, let line = lines.first, line.target == Self.target else {
      return .foreign("\(device.path) is no device of a worker")
    }
    let table: Table
    do throws(TableError) {
      table = try Table(parsing: "\(line)")
    } catch { return .foreign("\(device.path) has a table of another kind (\(error))") }
    guard case .userspace(let it) = table.segments[0].mapping,
      it.devices.count == backings.count
    else { return .foreign("\(device.path) stands on other devices") }
    for (used, backing) in zip(it.devices, backings) {
      guard case .number(let number) = used.device, try Self.stands(number, on: backing) else {
        return .foreign("\(device.path) stands on other files than \(backing.name)")
      }
    }
    return .ours
  }

  /// Makes the device, suspended, its table loaded and its node there for a worker to prime.
  /// Length and block size in bytes, multiples of 512. Loop devices that were made for it go
  /// with it. Throws: EBUSY when the name is taken, EINVAL for lengths that do not fit, and
  /// what the kernel has against the table; then nothing is left.
  package func make(
    size: UInt64, blockSize: UInt32, _ backings: [Backing], readOnly: Bool,
    faultTimeout: UInt32 = 0
  ) throws(DeviceMapperError) -> DeviceNumber {
    guard size > 0, size % 512 == 0, blockSize % 512 == 0 else {
      throw DeviceMapperError(
        EINVAL, "make", device.name, explanation: "its size is no multiple of 512 bytes")
    }
    let number = try device.create(uuid: identifier)
    do throws(DeviceMapperError) {
      // Loop devices stay open until the table holds them.
      var loops = Loops()
      var devices: [Userspace.Device] = []
      for backing in backings {
        let number = try loops.number(of: backing)
        devices.append(.init(.number(number), readOnly: backing.readOnly))
      }
      let mapping = Mapping.userspace(
        Userspace(
          name: device.name, blockSectors: blockSize / 512, devices: devices,
          faultTimeout: faultTimeout))
      let table: Table
      do throws(TableError) {
        table = try Table(length: size / 512, mapping)
      } catch {
        throw DeviceMapperError(EINVAL, "make", device.name, explanation: "\(error)")
      }
      try device.load(table, readOnly: readOnly)
      withExtendedLifetime(loops) {}
    } catch {
      try device.remove()
      throw error
    }
    return number
  }

  /// Brings it into use. What a guest has written on it is for nobody here to look into, so
  /// it is not probed unless that is wished.
  package func start(probed: Bool = false) throws(DeviceMapperError) {
    try device.resume(probed: probed)
  }

  /// Whether a device is a file's loop device, or the device itself.
  private static func stands(
    _ number: DeviceNumber, on backing: Backing
  ) throws(DeviceMapperError) -> Bool {
    let status = try Self.status(of: backing)
    if status.isDevice, backing.isDirect { return number == status.number }
    let path = "/sys/dev/block/\(number)"
    var target = [CChar](repeating: 0, count: 4096)
    guard realpath(path, &target) != nil else { return false }
    let node = String(
      decoding: target.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)
    guard let name = node.split(separator: "/").last, name.hasPrefix("loop") else { return false }
    do throws(IOError) {
      let loop = try Descriptor(path: "/dev/\(name)", flags: O_RDONLY)
      let found = try LoopDevice.backing(of: loop.raw, "/dev/\(name)")
      return found?.inode == status.inode && found?.fileSystem == status.fileSystem
    } catch { throw DeviceMapperError(error) }
  }

  /// What fstat(2) says of a backing.
  fileprivate struct Status {
    var isDevice: Bool
    var number: DeviceNumber
    var inode: UInt64
    var fileSystem: UInt64
  }

  fileprivate static func status(of backing: Backing) throws(DeviceMapperError) -> Status {
    var status = stat()
    guard fstat(backing.descriptor, &status) == 0 else {
      throw DeviceMapperError(errno, "examine", backing.name)
    }
    return Status(
      isDevice: status.st_mode & S_IFMT == S_IFBLK, number: DeviceNumber(UInt64(status.st_rdev)),
      inode: UInt64(status.st_ino), fileSystem: UInt64(status.st_dev))
  }
}

/// Loop devices while a table is being made.
private struct Loops: ~Copyable {
  private var first: LoopChain?

  /// The number of the device that a backing is, or becomes.
  mutating func number(of backing: ServedDevice.Backing) throws(DeviceMapperError) -> DeviceNumber {
    let status = try ServedDevice.status(of: backing)
    guard !status.isDevice || !backing.isDirect else { return status.number }
    do throws(IOError) {
      let loop = try LoopDevice(
        file: backing.descriptor, name: backing.name, readOnly: backing.readOnly,
        direct: backing.isDirect, growth: backing.readOnly ? 0 : backing.growth)
      let link = LoopChain(loop, first)
      first = link
      return DeviceNumber(UInt64(try link.loop.deviceNumber()))
    } catch { throw DeviceMapperError(error) }
  }
}

/// Owners that cannot be copied, one after the other.
private final class LoopChain {
  let loop: LoopDevice
  let next: LoopChain?

  init(_ loop: consuming LoopDevice, _ next: LoopChain?) {
    self.loop = loop
    self.next = next
  }
}

extension DeviceMapperError {
  /// A failed system call on the way.
  init(_ error: IOError) {
    self.init(error.code, error.operation, error.subject)
  }
}
