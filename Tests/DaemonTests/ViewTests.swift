// SPDX-License-Identifier: Apache-2.0
// What the daemon tells xenstored of itself: that mark makes the next look believe that a disk that
// is not there was taken away.

import Testing
import TestSupport
import XenStore

@testable import Daemon

@Suite struct ViewTests {
  @Test("A store that has forgotten the daemon is not told anything until it is told anew")
  func forgotten() async throws {
    let xenstored = try XenStored.start()
    let client = try XenStoreClient(.init(socketPath: xenstored.socketPath))
    defer { client.close() }
    let view = XenStoreView(client: client)
    let disk = VBD(domain: 5, device: 51712)
    func tell(_ disks: Int, anew: Bool) async throws -> Bool {
      try await view.publishSelf(state: "running", disks: disks, pending: 0, anew: anew)
    }
    #expect(try await !tell(1, anew: false))
    #expect(try await view.look(disk) == nil, "nothing was told, so the look says nothing")
    #expect(try await tell(1, anew: true))
    #expect(try await tell(2, anew: false))
    #expect(try await view.look(disk)?.exists == false)

    try xenstored.restart(keepingData: false)
    // The connection is made anew by itself.
    var told: Bool?
    try await eventually("it is connected again") {
      do throws(XenStoreError) {
        told = try await view.publishSelf(state: "running", disks: 3, pending: 0, anew: false)
        return true
      } catch { return false }
    }
    #expect(told == false)
    #expect(try await view.look(disk) == nil)
  }
}
