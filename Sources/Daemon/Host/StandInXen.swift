// SPDX-License-Identifier: Apache-2.0
// A hypervisor and a kernel's counters that are none: for tests. What they would say stands in files of
// a folder, which whoever plays them makes:
//
//   domain-5      how domain 5 is: words of "running", "paused", "shutdown", "dying"
//   busy-43:32    requests are under way on the device with these numbers
//   taken-5-51712 how many requests the backend of this vbd has taken
//
// A domain without a file is none that the hypervisor knows; without the folder it cannot be asked.

import Glibc
package import SystemIO

/// Says what files say.
package struct StandInXen: DomainStates, DeviceTraffic {
  private let folder: String

  /// A stand-in by the files of a folder.
  package init(folder: String) { self.folder = folder }

  /// By the words of the domain's file.
  package func state(of domain: Int) throws(IOError) -> DomainState? {
    guard access(folder, F_OK) == 0 else { throw IOError.last("ask", "the stand-in of Xen") }
    guard let text = try text("domain-\(domain)") else { return nil }
    let words = text.split(whereSeparator: \.isWhitespace)
    return DomainState(
      isShutDown: words.contains("shutdown"), isDying: words.contains("dying"),
      isPaused: words.contains("paused"))
  }

  /// By the device's and the vbds' files.
  package func look(_ device: DeviceNode, _ users: [VBD]) throws(IOError) -> DeviceSight {
    var taken: [UInt64] = []
    for vbd in users { taken.append(try text("taken-\(vbd)").flatMap { UInt64($0) } ?? 0) }
    return DeviceSight(
      isBusy: access(folder + "/busy-\(device.major):\(device.minor)", F_OK) == 0, taken: taken)
  }

  private func text(_ name: String) throws(IOError) -> String? {
    do throws(IOError) { return try TextFile.read(folder + "/" + name).trimmingNewline } catch {
      guard error.code == ENOENT else { throw error }
      return nil
    }
  }
}
