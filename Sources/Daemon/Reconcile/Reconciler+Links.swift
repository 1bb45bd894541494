// SPDX-License-Identifier: Apache-2.0
// The links of named disks, /dev/dmu/NAME: which udev makes by its rules, or the daemon where no
// udev runs.

internal import Logging
internal import SystemIO

extension Reconciler {
  /// Tells udev's rules of the link that the disk's device is to have, before there is a device.
  func prepareLink(_ disk: Disk) async throws(DiskFailure) {
    guard let name = disk.id.name, let wish = wishes[name] else { return }
    let links = host.links
    try await offload.run { () throws(DiskFailure) in
      do throws(IOError) { try links.prepare(name, isProbed: wish.isProbed) } catch {
        throw .link(error, name)
      }
    }
  }

  /// Has the link of a named disk made, when the device is there.
  func makeLink(_ disk: Disk) async throws(DiskFailure) {
    guard let name = disk.id.name, let device = disk.device else { return }
    let (links, scheduler) = (host.links, scheduler)
    try await offload.run { () throws(DiskFailure) in
      do throws(IOError) { try links.make(name, device, scheduler) } catch {
        throw .link(error, name)
      }
    }
  }

  /// Sees to the link of a disk that an earlier daemon has left: its device may have been made
  /// without it, or may have gone.
  func restoreLink(_ disk: Disk) async {
    guard let name = disk.id.name else { return }
    guard disk.device != nil, wishes[name] != nil else {
      guard disk.device == nil, let failure = await removeLink(disk) else { return }
      return log(for: disk).error("a link is left", metadata: ["reason": "\(failure)"])
    }
    do throws(DiskFailure) {
      try await prepareLink(disk)
      try await makeLink(disk)
    } catch { log(for: disk).error("the disk has no link", metadata: ["reason": "\(error)"]) }
  }

  /// Removes the link of a named disk whose device has gone. Why that is not possible yet, if so.
  func removeLink(_ disk: Disk) async -> DiskFailure? {
    guard let name = disk.id.name else { return nil }
    let (links, scheduler) = (host.links, scheduler)
    return await offload.run { () -> DiskFailure? in
      do throws(IOError) {
        try links.remove(name, scheduler)
        return nil
      } catch { return .link(error, name) }
    }
  }
}
