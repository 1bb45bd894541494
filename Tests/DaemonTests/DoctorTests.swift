// SPDX-License-Identifier: Apache-2.0
// What the doctor says of udev, nbd and LVM, on a host that is a folder.

import Foundation
import TestSupport
import Testing

@testable import Daemon

@Suite struct DoctorTests {
  private let host: TemporaryFolder

  init() throws { host = try TemporaryFolder() }

  private func put(_ path: String, _ text: String) throws {
    let url = URL(fileURLWithPath: host.path + path)
    try FileManager.default.createDirectory(
      at: url.deletingLastPathComponent(), withIntermediateDirectories: true)
    try Data(text.utf8).write(to: url)
  }

  private func lines() -> [String] {
    Doctor(configurationPath: host.file("none"), socket: nil, root: host.path).probing()
      .map(\.text)
  }

  @Test func rulesAreMissedWhereUdevRuns() throws {
    #expect(
      lines() == ["ok       the udev rules (guests' disks are not probed): no udevd runs\n"])
    try put("/run/udev/control", "")
    #expect(
      lines() == [
        "MISSING  the udev rules (guests' disks are not probed): they are not installed\n"
          + "         install etc/09-dmu-xen.rules as /usr/lib/udev/rules.d/09-dmu-xen.rules\n"
      ])
    try put("/usr/lib/udev/rules.d/09-dmu-xen.rules", "# rules\n")
    #expect(lines() == ["ok       the udev rules (guests' disks are not probed)\n"])
    // Those of a folder that comes first count.
    let off = "/etc/udev/rules.d/09-dmu-xen.rules"
    try put(off, "")
    #expect(lines()[0].contains("\(host.path)\(off) turns them off"))
    #expect(lines()[0].hasPrefix("MISSING"))
  }

  @Test func partitionsOfNBD() throws {
    let path = "/sys/module/nbd/parameters/max_part"
    try put(path, "16\n")
    #expect(
      lines()[1].hasPrefix(
        "MISSING  the driver nbd reads no partition tables: its parameter max_part is 16: it reads")
    )
    #expect(lines()[1].contains("modprobe -r nbd; modprobe nbd nbds_max=0 max_part=0"))
    try put(path, "0\n")
    #expect(lines()[1] == "ok       the driver nbd reads no partition tables\n")
  }

  @Test func filterOfLVM() throws {
    try put("/etc/lvm/lvm.conf", "devices {\n\t# global_filter = [ \"a|.*|\" ]\n}\n")
    #expect(
      lines()[1]
        == "note     LVM's commands leave guests' disks alone: lvm.conf has no global_filter for"
        + " them\n         in the section devices of /etc/lvm/lvm.conf: global_filter = "
        + #"[ "r|^/dev/mapper/dmu|", "r|^/dev/dmu/|", "r|^/dev/nbd|", "r|^/dev/loop|" ]"# + "\n")
    try put("/etc/lvm/lvmlocal.conf", "devices {\n\t\(Doctor.lvmFilter)\n}\n")
    #expect(lines()[1] == "ok       LVM's commands leave guests' disks alone\n")
  }
}
