// SPDX-License-Identifier: Apache-2.0
// Whether anything is under way on a disk's device, and whether its backends take requests.

import Glibc
package import SystemIO

/// What one look at a device found.
package struct DeviceSight: Sendable, Equatable {
  /// Requests are under way.
  package var isBusy: Bool
  /// What the backends of its vbds have taken from their guests so far.
  package var taken: [UInt64]

  /// A sight from its parts.
  package init(isBusy: Bool, taken: [UInt64]) {
    self.isBusy = isBusy
    self.taken = taken
  }
}

/// Looks at devices.
package protocol DeviceTraffic: Sendable {
  /// What is under way on a device, and what the backends of these vbds have taken. Blocks.
  func look(_ device: DeviceNode, _ users: [VBD]) throws(IOError) -> DeviceSight
}

/// The kernel's counters, in sysfs.
package struct BackendTraffic: DeviceTraffic {
  /// What xen-blkback counts: reads, writes, flushes, discards, and requests that found it without
  /// memory.
  static let counters = ["rd_req", "wr_req", "f_req", "ds_req", "oo_req"]

  /// Looks at this host's devices.
  package init() {}

  /// A vbd without xen-blkback, or one that has gone, counts nothing.
  package func look(_ device: DeviceNode, _ users: [VBD]) throws(IOError) -> DeviceSight {
    let path = "/sys/dev/block/\(device.major):\(device.minor)/inflight"
    let numbers = try TextFile.read(path).split(whereSeparator: \.isWhitespace)
    var taken: [UInt64] = []
    for vbd in users {
      for counter in BackendTraffic.counters { taken.append(BackendTraffic.count(vbd, counter)) }
    }
    return DeviceSight(isBusy: numbers.contains { $0 != "0" }, taken: taken)
  }

  private static func count(_ vbd: VBD, _ counter: String) -> UInt64 {
    let path = "/sys/bus/xen-backend/devices/vbd-\(vbd)/statistics/\(counter)"
    do throws(IOError) { return UInt64(try TextFile.read(path).trimmingNewline) ?? 0 } catch {
      return 0
    }
  }
}
