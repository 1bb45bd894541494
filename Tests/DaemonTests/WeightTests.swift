// SPDX-License-Identifier: Apache-2.0
// What the daemon costs with 200 disks: memory, and time when nothing happens. Only the
// release build says something about that: DMU_BIN_DIR names it.

import Daemon
import Glibc
import SystemIO
import Testing
import TestSupport

@Suite(
  .serialized,
  .enabled(
    if: getenv("DMU_BIN_DIR") != nil && Programs.arePresent, "DMU_BIN_DIR names no release build"))
struct WeightTests {
  @Test("The daemon with 200 disks: under 64 MiB, and under 1 % of a core when idle")
  func weight() async throws {
    let settings = [
      "daemon.look-interval": "20", "worker.ready-timeout": "35", "worker.stop-timeout": "60",
    ]
    try await inWorld(settings) { world in
      for index in 0..<200 {
        try await world.makeStore("s\(index).dscow")
        try world.attach(
          1 + index / 4, world.spec("s\(index).dscow"),
          name: ["xvda", "xvdb", "xvdc", "xvdd"][index % 4])
      }
      try await eventually("200 disks are ready", within: .seconds(180)) {
        try await world.status().count { $0.state == .ready } == 200
      }
      let pid = try #require(world.daemonProcess).pid
      try await Task.sleep(for: .seconds(2))
      let before = try ticks(pid)
      // Two full looks at three times their usual rate.
      try await Task.sleep(for: .seconds(40))
      let used = Double(try ticks(pid) - before) / Double(sysconf(Int32(_SC_CLK_TCK))) / 40
      let resident = try memory(pid)
      print(
        "WeightTests: \(resident >> 10) KiB resident,",
        "\((used * 10_000).rounded() / 100) % of a core with a full look every 20 s")
      #expect(resident < 64 << 20)
      #expect(used < 0.01)
    }
  }

  /// Time used so far in clock ticks. Source: proc_pid_stat(5), fields 14 and 15.
  private func ticks(_ pid: Int32) throws -> Int {
    let text = try SmallFile.read("/proc/\(pid)/stat")
    let rest = try #require(text.split(separator: ")").last).split(separator: " ")
    return try #require(Int(rest[11])) + #require(Int(rest[12]))
  }

  /// Resident bytes. Source: proc_pid_status(5), VmRSS.
  private func memory(_ pid: Int32) throws -> Int {
    let text = try SmallFile.read("/proc/\(pid)/status")
    let line = try #require(text.split(separator: "\n").first { $0.hasPrefix("VmRSS:") })
    return try #require(Int(line.split { $0 == " " || $0 == "\t" }[1])) << 10
  }
}

/// Files that are read at one go.
enum SmallFile {
  static func read(_ path: String) throws -> String {
    let file = try Descriptor(path: path, flags: O_RDONLY)
    var buffer = [UInt8](repeating: 0, count: 65536)
    let count = Glibc.read(file.raw, &buffer, buffer.count)
    return String(decoding: buffer[..<max(count, 0)], as: UTF8.self)
  }
}
