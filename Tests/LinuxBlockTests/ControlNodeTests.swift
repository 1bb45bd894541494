// SPDX-License-Identifier: Apache-2.0
// Whether there is a device-mapper: a node alone is none.

import Glibc
import Testing
import TestSupport

@testable import LinuxBlock

@Suite struct ControlNodeTests {
  @Test("A control node without a driver is no device-mapper")
  func nodeWithoutDriver() throws {
    #expect(DeviceMapper.canBeOpened("/dev/null"))
    let folder = try TemporaryFolder()
    let node = folder.file("control")
    #expect(!DeviceMapper.canBeOpened(node))
    // 10:99999: no misc device has such a number. Only root makes nodes.
    guard mknod(node, S_IFCHR | 0o600, 10 << 8 | 0x9F | 0x18600 << 12) == 0 else {
      return #expect(geteuid() != 0)
    }
    #expect(!DeviceMapper.canBeOpened(node))
  }
}
