// SPDX-License-Identifier: Apache-2.0
// The links of named disks, /dev/dmu/NAME, and what udev has to know in order to make them.
//
// Where udev runs, its rules (etc/09-dmu-xen.rules) make the link: then it is in udev's database,
// and systemd has a device unit for it. The rules know a device of ours by the device-mapper's name
// or nbd's "backend", and find a file of that name in /run/dmu-xen/links, which says what the link
// is called and whether the device may be probed. Where no udev runs, or it does not make the link,
// the daemon makes it.
//
// Order, so that udev never handles an event of the device without knowing of the link:
//
//   1. The files are written before the device is made.
//   2. The link is waited for, or made, before anybody is told of the device.
//   3. When the device has gone the link is removed, then the files.
//
// A crash between any two of these leaves files, which mean nothing without a device of that name,
// or a link, which the next attach replaces.

import Glibc
internal import SystemIO

/// Where links are made. All calls block.
struct DeviceLinks: Sendable {
  /// How long udev is waited for.
  static let patience = Duration.seconds(3)
  /// The files that udev's rules read; the rules name this folder whatever the run directory is.
  static let host = DeviceLinks(
    folder: "/dev/dmu", files: "/run/dmu-xen/links", udev: "/run/udev")

  /// The folder of the links.
  let folder: String
  private let files: String
  /// udevd's folder: `control` is there while it runs, `queue` while it has events to handle.
  private let udev: String

  init(folder: String, files: String, udev: String) {
    self.folder = folder
    self.files = files
    self.udev = udev
  }

  /// Path of a disk's link.
  func path(_ name: DiskName) -> String { "\(folder)/\(name)" }

  /// By what udev's rules know the disk's device: the name that the device-mapper has, and nbd's
  /// identifier.
  private static func marks(_ name: DiskName) -> [String] {
    [KernelMapper.prefix + "\(name)", KernelAttacher.mark + "\(name)"]
  }

  /// Writes the files. Throws EEXIST when something else than a link has the disk's path: the node
  /// of another device of the module.
  func prepare(_ name: DiskName, isProbed: Bool) throws(IOError) {
    try checkFree(name)
    // The run directory as the daemon makes it.
    let parent = String(files[..<(files.lastIndex(of: "/") ?? files.startIndex)])
    for (path, mode) in [(parent, mode_t(0o711)), (files, 0o755)] {
      guard mkdir(path, mode) == 0 || errno == EEXIST else { throw IOError.last("make", path) }
    }
    let text = "DMU_XEN_NAME=\(name)\nDMU_XEN_PROBE=\(isProbed ? 1 : 0)\n"
    for mark in Self.marks(name) {
      try TextFile.replace("\(files)/\(mark)", with: text, mode: 0o644)
    }
  }

  /// Sees to it that the link leads to the device: waits for udev, and makes the link where udev
  /// does not.
  func make(_ name: DiskName, _ device: DeviceNode, _ scheduler: any Scheduling) throws(IOError) {
    let target = target(device)
    let end = scheduler.now + Self.patience
    // A link from before may be removed by udev when it comes to the former device's end.
    while isBusy || udevRuns && read(name) != target {
      guard scheduler.now < end else { break }
      scheduler.block(for: .milliseconds(10))
    }
    guard read(name) != target else { return }
    try checkFree(name)
    if mkdir(folder, 0o755) == 0 {
      // Whatever the daemon's umask is: others than root look for devices.
      guard chmod(folder, 0o755) == 0 else { throw IOError.last("set the mode of", folder) }
    } else if errno != EEXIST {
      throw IOError.last("make", folder)
    }
    // Replaced in one step: somebody may be looking. No disk's name begins with a dot.
    let new = "\(folder)/.\(name)"
    guard unlink(new) == 0 || errno == ENOENT else { throw IOError.last("remove", new) }
    guard symlink(target, new) == 0 else { throw IOError.last("make the link", path(name)) }
    guard rename(new, path(name)) == 0 else { throw IOError.last("make the link", path(name)) }
  }

  /// Removes link and files of a disk whose device has gone. Something else of that name stays.
  func remove(_ name: DiskName, _ scheduler: any Scheduling) throws(IOError) {
    if read(name) != nil, unlink(path(name)) != 0, errno != ENOENT {
      throw IOError.last("remove", path(name))
    }
    for mark in Self.marks(name) {
      let file = "\(files)/\(mark)"
      guard unlink(file) == 0 || errno == ENOENT else { throw IOError.last("remove", file) }
    }
    // Until udev has seen the end of the device it may still remove a link of this name.
    let end = scheduler.now + Self.patience
    while isBusy, scheduler.now < end { scheduler.block(for: .milliseconds(10)) }
  }

  /// Throws EEXIST when something else than a link has a disk's path.
  func checkFree(_ name: DiskName) throws(IOError) {
    var status = stat()
    guard lstat(path(name), &status) == 0 else {
      if errno == ENOENT { return }
      throw IOError.last("examine", path(name))
    }
    guard status.st_mode & S_IFMT == S_IFLNK else { throw IOError(EEXIST, "make", path(name)) }
  }

  /// What the link leads to; nil when there is none.
  private func read(_ name: DiskName) -> String? { FileUsers.link(path(name)) }

  /// As udev makes links: relative within /dev.
  private func target(_ device: DeviceNode) -> String {
    let path = device.kernelPath
    guard folder == "/dev/dmu", path.hasPrefix("/dev/") else { return path }
    return ".." + path.dropFirst("/dev".count)
  }

  private var udevRuns: Bool { access(udev + "/control", F_OK) == 0 }
  private var isBusy: Bool { udevRuns && access(udev + "/queue", F_OK) == 0 }
}
