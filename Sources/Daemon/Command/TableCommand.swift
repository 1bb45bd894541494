// SPDX-License-Identifier: Apache-2.0
// `dmu-xen table`: tables of the device-mapper as text, in the form of 2001 and of dmsetup, read here
// so that what is wrong with a line is said by its number and field before the kernel sees it.

import Glibc
internal import LinuxBlock
internal import SystemIO

/// Tables of mapped devices.
package enum TableCommand {
  /// What can go wrong, each with the words that it is told in.
  private enum Fault: Error, CustomStringConvertible {
    case read(IOError)
    case table(String, TableError)
    case kernel(DeviceMapperError)
    case words(String)

    var description: String {
      switch self {
      case .read(let error): "\(error)"
      case .table(let file, let error): "\(file), \(error)"
      case .kernel(let error): "\(error)"
      case .words(let words): words
      }
    }
  }

  /// What `status` says of one line, as JSON.
  struct Line: Encodable, Equatable {
    let start: UInt64
    let length: UInt64
    let target: String
    let parameters: String
    let status: String
  }

  /// What `status` says of one device, as JSON.
  struct Status: Encodable, Equatable {
    let name: String
    let number: String
    let suspended: Bool
    let open: Int32
    let lines: [Line]
  }

  /// The longest table, in bytes: the kernel takes no larger one at once.
  private static let longest = 16 << 20

  /// Gives a device the table of a file, "-" for stdin: makes the device when there is none of that
  /// name, else lets it change from one table to the other while it is suspended. With `onlyChecks`
  /// the table is only read.
  package static func load(
    _ name: String, file: String, readOnly: Bool = false, onlyChecks: Bool = false
  ) -> CommandStatus {
    do throws(Fault) {
      try check(name)
      let table = try parse(file)
      let what =
        "\(table.segments.count) line\(table.segments.count == 1 ? "" : "s"), "
        + "\(table.length) sectors"
      guard !onlyChecks else {
        CommandOutput.say("\(file): \(what)\n")
        return .done
      }
      try checkKernel()
      let device = MappedDevice(name)
      try apply(table, to: device, readOnly: readOnly)
      CommandOutput.say("\(device.path): \(what)\n")
      return .done
    } catch {
      CommandOutput.complain("\(error)")
      return .failed
    }
  }

  /// Prints the tables in use, and what the targets say of themselves: of one device, or of all.
  package static func status(_ name: String?, json: Bool) -> CommandStatus {
    do throws(Fault) {
      try checkKernel()
      var names = [name].compactMap { $0 }
      if names.isEmpty {
        names = try kernel { () throws(DeviceMapperError) in try Self.names() }
      }
      var found: [Status] = []
      for name in names {
        if let status = try look(MappedDevice(name)) { found.append(status) }
      }
      if let name, found.isEmpty {
        CommandOutput.complain("there is no device \(name): `dmu-xen table status` shows all")
        return .noDisk
      }
      do throws(DiskFailure) {
        CommandOutput.say(json ? try ClientCommands.pretty(found) : render(found))
      } catch { throw .words(error.sentence) }
      return .done
    } catch {
      CommandOutput.complain("\(error)")
      return .failed
    }
  }

  /// The names of all mapped devices, in order.
  static func names() throws(DeviceMapperError) -> [String] {
    try DeviceMapper.devices().keys.map(\.name).sorted()
  }

  static func render(_ devices: [Status]) -> String {
    devices.map { device in
      let lines = device.lines.map { line in
        let said = line.status.isEmpty || line.status == line.parameters ? "" : "  [\(line.status)]"
        let words = line.parameters.isEmpty ? "" : " " + line.parameters
        return "  \(line.start) \(line.length) \(line.target)\(words)\(said)\n"
      }
      let state = device.suspended ? ", suspended" : ""
      let none = lines.isEmpty ? "  no table\n" : ""
      return "\(device.name) (\(device.number)\(state), open \(device.open))\n"
        + lines.joined() + none
    }.joined()
  }

  // MARK: Parts

  private static func kernel<Value>(
    _ body: () throws(DeviceMapperError) -> Value
  ) throws(Fault) -> Value {
    do throws(DeviceMapperError) { return try body() } catch { throw .kernel(error) }
  }

  private static func checkKernel() throws(Fault) {
    guard DeviceMapper.isAvailable else {
      throw .words(
        "the device-mapper cannot be used: run this as root, where `modprobe dm-mod` succeeds")
    }
  }

  private static func check(_ name: String) throws(Fault) {
    guard !name.isEmpty, name.utf8.count <= 127, !name.contains("/"), name != "control" else {
      throw .words(
        "'\(name)' cannot be a device's name: it has 1 to 127 bytes, no slash, and is not 'control'"
      )
    }
  }

  private static func parse(_ file: String) throws(Fault) -> Table {
    let text: String
    do throws(IOError) {
      text = try TextFile.read(
        file == "-" ? Descriptor(copying: 0) : Descriptor(path: file, flags: O_RDONLY),
        name: file == "-" ? "stdin" : file, upTo: longest)
    } catch { throw .read(error) }
    do throws(TableError) { return try Table(parsing: text) } catch {
      throw .table(file == "-" ? "stdin" : file, error)
    }
  }

  private static func apply(
    _ table: Table, to device: MappedDevice, readOnly: Bool
  ) throws(Fault) {
    guard let before = try kernel({ () throws(DeviceMapperError) in try device.information() })
    else { return try make(device, table, readOnly) }
    let identifier = try kernel { () throws(DeviceMapperError) in try device.uuid() }
    guard !identifier.hasPrefix(ServedDevice.prefix) else {
      throw .words(
        "\(device.name) is a disk of dmu-xend or cowd, whose table is theirs: choose another name")
    }
    try kernel { () throws(DeviceMapperError) in
      try device.load(table, readOnly: readOnly)
      do throws(DeviceMapperError) {
        if !before.isSuspended { try device.suspend() }
        try device.resume()
      } catch {
        undo { () throws(DeviceMapperError) in try device.clear() }
        undo { () throws(DeviceMapperError) in try device.resume() }
        throw error
      }
    }
  }

  private static func make(
    _ device: MappedDevice, _ table: Table, _ readOnly: Bool
  ) throws(Fault) {
    try kernel { () throws(DeviceMapperError) in
      _ = try device.create()
      do throws(DeviceMapperError) {
        try device.load(table, readOnly: readOnly)
        try device.resume()
      } catch {
        undo { () throws(DeviceMapperError) in try device.remove() }
        throw error
      }
    }
  }

  /// Takes a step back; where that fails, too, it is told before what went wrong first.
  private static func undo(_ step: () throws(DeviceMapperError) -> Void) {
    do throws(DeviceMapperError) { try step() } catch { CommandOutput.complain("\(error)") }
  }

  private static func look(_ device: MappedDevice) throws(Fault) -> Status? {
    try kernel { () throws(DeviceMapperError) in
      guard let known = try device.information() else { return nil }
      let table = try device.table()
      let status = try device.status(flush: false)
      let lines = table.enumerated().map { index, line in
        Line(
          start: line.start, length: line.length, target: line.target, parameters: line.words,
          status: index < status.count ? status[index].words : "")
      }
      return Status(
        name: device.name, number: known.number.description, suspended: known.isSuspended,
        open: known.openCount, lines: lines)
    }
  }
}
