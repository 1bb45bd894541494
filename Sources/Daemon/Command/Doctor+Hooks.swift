// SPDX-License-Identifier: Apache-2.0
// What the toolstack needs of this host when it attaches a disk: the block script, what that calls,
// and the driver by which a bootloader in this domain reads a guest's disk.

import Glibc
internal import SystemIO

extension Doctor {
  private static let scripts = "/etc/xen/scripts"

  /// The block script and what it calls. `path`: the folders in which programs are looked for.
  func hooks(path: String? = getenv("PATH").map { String(cString: $0) }) -> [Finding] {
    [script(), functions(), command(path ?? "/usr/sbin:/usr/bin:/sbin:/bin"), blkfront()]
  }

  private func script() -> Finding {
    let path = root + Self.scripts + "/block-dmu"
    let remedy = "install the package dmu-xen again, or run make install"
    var status = stat()
    guard access(path, X_OK) == 0, stat(path, &status) == 0 else {
      return Finding("the block script", IOError.last("run", path).description, remedy: remedy)
    }
    let isFile = status.st_mode & S_IFMT == S_IFREG
    return Finding("the block script", isFile ? nil : "\(path) is not a file", remedy: remedy)
  }

  /// Source: Xen's block scripts, all of which read this file first.
  private func functions() -> Finding {
    let path = root + Self.scripts + "/block-common.sh"
    return Finding(
      "Xen's functions for block scripts",
      access(path, R_OK) == 0 ? nil : IOError.last("read", path).description,
      remedy: "install Xen's hotplug scripts (Debian: apt-get install xen-utils-common)")
  }

  private func command(_ path: String) -> Finding {
    let isThere = path.split(separator: ":").contains { access(root + $0 + "/dmu-xen", X_OK) == 0 }
    return Finding(
      "the command dmu-xen, which the block script calls",
      isThere ? nil : "it is in none of \(path)",
      remedy: "install it in, or link it into, a folder of the PATH that xl has, such as /usr/sbin")
  }

  /// A bootloader in this domain, such as pygrub, reads a guest's disk by way of it.
  private func blkfront() -> Finding {
    let there = access(root + "/sys/module/xen_blkfront", F_OK) == 0
    return Finding(
      "the driver xen-blkfront (bootloaders that read guests' disks)",
      there ? nil : "it is not loaded",
      remedy: "only if a guest has a bootloader: modprobe xen-blkfront, and add it to"
        + " /etc/modules-load.d/", .note)
  }
}
