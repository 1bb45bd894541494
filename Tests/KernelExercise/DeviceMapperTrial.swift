// SPDX-License-Identifier: Apache-2.0
import BlockIO
import Glibc
import LinuxBlock
import SystemIO

private let kibibyte: UInt64 = 2

/// Every call of MappedDevice, and every kind of table that this kernel has.
func tryDeviceMapper() throws {
  check(DeviceMapper.isAvailable, "no device-mapper")
  check(try DeviceMapper.version(ofTarget: "linear")?.major == 1, "no linear")
  check(try DeviceMapper.version(ofTarget: "userspace")?.major == 1, "no userspace")
  check(try DeviceMapper.version(ofTarget: "nonsense") == nil, "a target 'nonsense'")
  let files = try (0..<3).map { try scratchFile("dm\($0).img", bytes: 1 << 20) }
  let first = try LoopDevice(file: files[0].raw, name: files[0].name, readOnly: false)
  let second = try LoopDevice(file: files[1].raw, name: files[1].name, readOnly: false)
  let third = try LoopDevice(file: files[2].raw, name: files[2].name, readOnly: false)
  let paths = [first.path, second.path, third.path]
  try tryLife(paths)
  try tryTables(paths)
  try tryRefusals(paths)
  check(try DeviceMapper.devices().isEmpty, "left: \(try DeviceMapper.devices().keys)")
  for file in files { check(unlink(file.name) == 0, "unlink") }
}

/// From its making to its removal.
private func tryLife(_ paths: [String]) throws {
  let device = MappedDevice("life")
  check(try device.information() == nil, "it is there already")
  let number = try device.create(uuid: "TRIAL-life")
  check(try device.uuid() == "TRIAL-life", "another identifier")
  check(try device.information()?.hasLiveTable == false, "a table from nowhere")
  try device.load(try Table(parsing: "0 8 error"))
  check(try device.information()?.hasInactiveTable == true, "no table is loaded")
  try device.clear()
  check(try device.information()?.hasInactiveTable == false, "the table was not cleared")
  let table = try Table([
    Segment(start: 0, length: 512 * kibibyte, .linear(Location(.path(paths[0]), offset: 16))),
    Segment(start: 512 * kibibyte, length: 8, .zero),
    Segment(start: 512 * kibibyte + 8, length: 8, .error),
  ])
  try device.load(table)
  try device.resume()
  check(access(device.path, F_OK) == 0, "\(device.path) is missing")
  check(try DeviceMapper.devices()[device] == number, "it is not listed")
  check(try device.status().map(\.target) == ["linear", "zero", "error"], "another status")
  let dependencies = try device.dependencies()
  check(dependencies.count == 1 && dependencies[0].major == 7, "it stands on \(dependencies)")
  check(
    try device.table()[0].words == "\(dependencies[0]) 16", "it has \(try device.table())")
  // What the kernel prints can be read and loaded again.
  let printed = try device.table().map { "\($0)" }.joined(separator: "\n")
  try device.load(try Table(parsing: printed))
  try device.suspend()
  check(try device.information()?.isSuspended == true, "it is not suspended")
  try device.resume()
  try device.suspend(flush: false, freeze: false)
  try device.resume()
  try tryLatencies(device)
  try tryOpen(device, paths)
}

/// The kernel counts latencies from the first question on, as long as it is not told to stop.
private func tryLatencies(_ device: MappedDevice) throws {
  try device.stopLatencies()
  let open = try Sectors(device.path)
  try open.fill(7, 0x11)
  check(try device.latencies().count == 0, "it was counted before anybody asked")
  for sector in 8..<24 { try open.fill(UInt64(sector), 0x22) }
  let found = try device.latencies()
  check(found.count >= 16, "\(found.count) of 16 writes were counted")
  check(found.nanoseconds > 0, "they took no time")
  check(try device.latencies().count >= found.count, "the count began anew")
  try device.stopLatencies()
  check(try device.latencies().count == 0, "it went on")
  try device.stopLatencies()
  check(try device.message("@stats_list") ?? "" == "", "regions are left")
}

/// While somebody has it open, and under another name.
private func tryOpen(_ device: MappedDevice, _ paths: [String]) throws {
  do {
    let open = try Sectors(device.path)
    try open.fill(3, 0x77)
    check(try Sectors(paths[0], writable: false).byte(19) == 0x77, "the sector is elsewhere")
    check(try open.byte(512 * kibibyte + 3) == 0, "zeroes are none")
    do throws(DeviceMapperError) {
      try device.remove()
      complain("a device in use was removed")
    } catch { check(error.code == EBUSY, "\(error)") }
    check(try device.information()?.openCount == 1, "nobody has it open")
  }
  try device.rename(to: "other")
  let other = MappedDevice("other")
  check(access(other.path, F_OK) == 0 && access(device.path, F_OK) != 0, "the old name stays")
  check(try device.information() == nil, "the old name answers")
  let open = try Sectors(other.path, writable: false)
  try other.remove(deferred: true)
  check(try other.information() != nil, "removed under its user")
  withExtendedLifetime(open) {}
}

/// Each kind of table, loaded and read back.
private func tryTables(_ paths: [String]) throws {
  let (a, b, c) = (paths[0], paths[1], paths[2])
  let texts = [
    "0 1024 striped 2 16 \(a) 0 \(b) 0",
    "0 1024 mirror core 2 64 sync 2 \(a) 0 \(b) 0 1 handle_errors",
    "0 1024 snapshot \(a) \(b) N 16",
    "0 1024 delay \(a) 0 0 \(b) 8 1",
    "0 1024 userspace table 8 2 \(a) ro:\(b) 2 fault_timeout 5",
    "0 8 linear \(c) 0\n8 8 zero\n16 8 error",
  ]
  for text in texts {
    let device = MappedDevice("table")
    _ = try device.create()
    try device.load(try Table(parsing: text))
    try device.resume()
    let lines = try device.table().map { "\($0)" }
    let again = try Table(parsing: lines.joined(separator: "\n"))
    check(again.length == (try Table(parsing: text)).length, "'\(text)' became \(again)")
    check(try device.status().count == again.segments.count, "'\(text)' has no status")
    if text.contains("mirror") { try tryEvent(device) }
    if text.contains("userspace") {
      check(try device.message("stats")?.contains("faults=0") == true, "no stats")
    }
    try device.remove(patient: true)
  }
}

/// An event is waited for: the device's removal is one.
private func tryEvent(_ device: MappedDevice) throws {
  let number = try device.information()?.eventNumber ?? 0
  // It had events before: then there is nothing to wait for.
  if number > 0 {
    check(try device.waitForEvent(after: number - 1) == number, "another number")
  }
}

/// What the kernel has against a table is in the error.
private func tryRefusals(_ paths: [String]) throws {
  let device = MappedDevice("refused")
  _ = try device.create()
  do throws(DeviceMapperError) {
    _ = try device.create()
    complain("made twice")
  } catch { check(error.code == EBUSY, "\(error)") }
  let refused = [
    ("0 8 linear /dev/nothing 0", "linear: Device lookup failed"),
    ("0 8 userspace x 8 1 /dev/nothing", "userspace: a backing device cannot be opened"),
    ("0 4194304 linear \(paths[0]) 0", ""),
  ]
  for (text, words) in refused {
    let table = try Table(parsing: text)
    do throws(DeviceMapperError) {
      try device.load(table)
      complain("'\(text)' was loaded")
    } catch {
      check(words.isEmpty || error.explanation?.contains(words) == true, "'\(text)': \(error)")
    }
  }
  do throws(DeviceMapperError) {
    _ = try device.message("nonsense")
    complain("nonsense was understood")
  } catch {}
  try device.remove()
  do throws(DeviceMapperError) {
    try device.remove()
    complain("removed twice")
  } catch { check(error.code == ENXIO, "\(error)") }
}

/// A device over files, found again by its name, its loop devices gone with it.
func tryServedDevice() throws {
  check(try ServedDevice.isAvailable(), "no target userspace")
  let store = try scratchFile("store.img", bytes: 1 << 20)
  let base = try scratchFile("base.img", bytes: 1 << 20)
  let other = try scratchFile("other.img", bytes: 1 << 20)
  func backing(_ file: FileStore, _ readOnly: Bool) -> ServedDevice.Backing {
    .init(descriptor: file.raw, name: file.name, readOnly: readOnly)
  }
  let backings = [backing(store, false), backing(base, true)]
  let served = ServedDevice(name: "served", owner: "trial")
  check(try served.state(over: backings) == .absent, "it is there already")
  _ = try served.make(size: 512 << 10, blockSize: 65536, backings, readOnly: false)
  check(try served.state(over: backings) == .unfinished, "it is in use already")
  check(access("/dev/dmu/served", F_OK) == 0, "no node")
  try served.start()
  check(try served.state(over: backings) == .ours, "\(try served.state(over: backings))")
  for wrong in [[backing(store, false)], [backing(other, false), backing(base, true)]] {
    guard case .foreign = try served.state(over: wrong) else {
      complain("\(wrong.map(\.name)) is taken for what it stands on")
    }
  }
  let stranger = ServedDevice(name: "served", owner: "stranger")
  guard case .foreign = try stranger.state(over: backings) else { complain("not a stranger's") }
  let loops = try served.device.dependencies()
  check(loops.count == 2, "it stands on \(loops)")
  try served.device.remove(patient: true)
  for loop in loops {
    let node = try Descriptor(path: "/dev/loop\(loop.minor)", flags: O_RDONLY)
    check(try LoopDevice.backing(of: node.raw, "/dev/loop\(loop.minor)") == nil, "a loop stays")
  }
  do throws(DeviceMapperError) {
    _ = try served.make(size: 1000, blockSize: 65536, backings, readOnly: false)
    complain("a device of 1000 bytes was made")
  } catch { check(error.code == EINVAL, "\(error)") }
  check(try served.device.information() == nil, "it was left half made")
  for file in [store, base, other] { check(unlink(file.name) == 0, "unlink") }
}
