// SPDX-License-Identifier: Apache-2.0
// What keeps dom0 from interpreting what guests write on their disks: udev's rules, the nbd
// driver's parameter, LVM's filter.

import Glibc
internal import SystemIO

extension Doctor {
  /// The filter for lvm.conf: LVM's commands scan devices by themselves, whatever udev does.
  static let lvmFilter =
    #"global_filter = [ "r|^/dev/mapper/dmu|", "r|^/dev/dmu/|", "r|^/dev/nbd|", "r|^/dev/loop|" ]"#

  /// Whether guests' disks are probed in this domain.
  func probing() -> [Finding] { [rules(), partitions(), volumes()].compactMap { $0 } }

  /// Source: udev(7), for the folders and their order.
  private func rules() -> Finding {
    let what = "the udev rules (guests' disks are not probed)"
    let remedy = "install etc/09-dmu-xen.rules as /usr/lib/udev/rules.d/09-dmu-xen.rules"
    guard access(root + "/run/udev/control", F_OK) == 0 else {
      return Finding(what + ": no udevd runs", nil, remedy: remedy)
    }
    for folder in ["/etc", "/run", "/usr/local/lib", "/usr/lib", "/lib"] {
      let path = root + folder + "/udev/rules.d/09-dmu-xen.rules"
      var status = stat()
      guard stat(path, &status) == 0 else {
        if errno == ENOENT || errno == ENOTDIR { continue }
        return Finding(what, IOError.last("examine", path).description, remedy: remedy)
      }
      // An empty file, or a link to /dev/null, turns rules of that name off.
      let isOff = status.st_mode & S_IFMT != S_IFREG || status.st_size == 0
      return Finding(what, isOff ? "\(path) turns them off" : nil, remedy: "remove that file")
    }
    return Finding(what, "they are not installed", remedy: remedy)
  }

  /// nil without the driver.
  private func partitions() -> Finding? {
    let what = "the driver nbd reads no partition tables"
    let remedy =
      "when no nbd device is in use: modprobe -r nbd; modprobe nbd nbds_max=0 max_part=0"
      + " (or by /usr/lib/modprobe.d/dmu-xen.conf)"
    do throws(IOError) {
      let most = try TextFile.read(root + "/sys/module/nbd/parameters/max_part")
        .filter { !$0.isWhitespace }
      guard most != "0" else { return Finding(what, nil, remedy: remedy) }
      return Finding(
        what, "its parameter max_part is \(most): it reads those that guests write",
        remedy: remedy)
    } catch {
      return error.code == ENOENT ? nil : Finding(what, error.description, remedy: remedy)
    }
  }

  /// nil without LVM.
  private func volumes() -> Finding? {
    let what = "LVM's commands leave guests' disks alone"
    var text = ""
    do throws(IOError) {
      text = try TextFile.read(root + "/etc/lvm/lvm.conf")
    } catch {
      return error.code == ENOENT ? nil : Finding(what, error.description, remedy: "", .note)
    }
    do throws(IOError) {
      text += try TextFile.read(root + "/etc/lvm/lvmlocal.conf")
    } catch {
      guard error.code == ENOENT else { return Finding(what, error.description, remedy: "", .note) }
    }
    let filters = text.split(separator: "\n").filter {
      $0.drop { $0 == " " || $0 == "\t" }.hasPrefix("global_filter")
    }
    let isFiltered = filters.contains { line in
      ["/dev/mapper/dmu", "/dev/nbd", "/dev/loop"].allSatisfy { line.contains($0) }
    }
    return Finding(
      what, isFiltered ? nil : "lvm.conf has no global_filter for them",
      remedy: "in the section devices of /etc/lvm/lvm.conf: " + Self.lvmFilter, .note)
  }
}
