// SPDX-License-Identifier: Apache-2.0
// Descriptors that no disk may use up: with none left, nobody could be answered on the control
// socket, and the disks there are could not be seen to.

import Glibc
internal import SystemIO

/// The descriptors that are kept back from new disks.
enum DescriptorReserve {
  /// What the control socket's clients and the care for a disk may need at once.
  private static let wanted = 512

  /// Throws EMFILE when a disk more would leave too few.
  static func check() throws(IOError) {
    var limits = rlimit()
    guard getrlimit(__rlimit_resource_t(RLIMIT_NOFILE.rawValue), &limits) == 0 else {
      throw IOError.last("read the limit of open files")
    }
    let limit = Int(clamping: limits.rlim_cur)
    // Of a small limit a part.
    let reserve = min(wanted, limit / 4)
    guard try Folder.names("/proc/self/fd").count + reserve < limit else {
      throw IOError(
        EMFILE, "leave descriptors for the disks there are: raise LimitNOFILE of dmu-xend, now",
        "\(limit)")
    }
  }
}
