// SPDX-License-Identifier: Apache-2.0
// What the doctor says of udev, nbd, LVM, the block script, bootloaders and workers, on a host that is
// a folder.

import Foundation
import Testing
import TestSupport

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
    doctor.probing().map(\.text)
  }

  private var doctor: Doctor {
    Doctor(configurationPath: host.file("none"), socket: nil, root: host.path)
  }

  @Test func hooksOfTheToolstack() throws {
    func lines() -> [String] { doctor.hooks(path: "/usr/local/sbin:/usr/sbin").map(\.text) }
    let scripts = host.path + "/etc/xen/scripts"
    #expect(
      lines() == [
        "MISSING  the block script: cannot run \(scripts)/block-dmu: No such file or directory\n"
          + "         install the package dmu-xen again, or run make install\n",
        "MISSING  Xen's functions for block scripts: cannot read \(scripts)/block-common.sh: No such"
          + " file or directory\n         install Xen's hotplug scripts (Debian: apt-get install"
          + " xen-utils-common)\n",
        "MISSING  the command dmu-xen, which the block script calls: it is in none of"
          + " /usr/local/sbin:/usr/sbin\n         install it in, or link it into, a folder of the PATH"
          + " that xl has, such as /usr/sbin\n",
        "note     the driver xen-blkfront (bootloaders that read guests' disks): it is not loaded\n"
          + "         only if a guest has a bootloader: modprobe xen-blkfront, and add it to"
          + " /etc/modules-load.d/\n",
      ])
    try put("/etc/xen/scripts/block-dmu", "")
    #expect(lines()[0].hasPrefix("MISSING"), "nobody may run it")
    for path in ["/etc/xen/scripts/block-dmu", "/usr/sbin/dmu-xen"] {
      try put(path, "")
      #expect(chmod(host.path + path, 0o755) == 0)
    }
    try put("/etc/xen/scripts/block-common.sh", "")
    try put("/sys/module/xen_blkfront/refcnt", "0\n")
    #expect(lines().allSatisfy { $0.hasPrefix("ok  ") })
  }

  @Test func keptDisks() throws {
    #expect(doctor.keptDisks().isEmpty)
    let folder = host.file("none/disks.d")
    try put("/none/disks.d/data.toml", "spec = \"dmu:raw:/x\"\n")
    #expect(doctor.keptDisks().map(\.text) == ["ok       the named disks of \(folder) (1)\n"])
    try put("/none/disks.d/bad.toml", "spec = 5\n")
    try put("/none/disks.d/5.toml", "")
    try put("/run/systemd/system/x", "")
    let lines = doctor.keptDisks().map(\.text)
    #expect(lines.count == 3)
    #expect(lines[0].hasPrefix("TROUBLE  the file \(folder)/5.toml: it is named like no disk"))
    #expect(
      lines[1].hasPrefix(
        "TROUBLE  the named disk bad: \(folder)/bad.toml line 1: spec: the value must be a spec\n"))
    #expect(
      lines[2].hasPrefix("note     the named disks of \(folder) (2): dmu-xen-disks.service is"))
    try put("/etc/systemd/system/multi-user.target.wants/dmu-xen-disks.service", "")
    #expect(doctor.keptDisks().last?.trouble == nil)
  }

  @Test func rightsOfAWorker() throws {
    func status(_ uid: Int, _ capabilities: String, _ noNew: Int) throws {
      try put(
        "/proc/7/status",
        "Uid:\t\(uid)\t\(uid)\t\(uid)\t\(uid)\nCapEff:\t\(capabilities)\n"
          + "NoNewPrivs:\t\(noNew)\n")
    }
    #expect(doctor.sandbox(7) == nil, "it has just ended")
    try status(2_000_001, "0000000000000000", 1)
    #expect(doctor.sandbox(7) == nil)
    try status(0, "0000000000200000", 0)
    #expect(
      doctor.sandbox(7)?.text
        == "TROUBLE  the worker 7: it runs as root, it has capabilities, it may gain privileges\n"
        + "         kill 7: dmu-xend replaces it; 'dmu-xen status' names its disk\n")
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
