// SPDX-License-Identifier: Apache-2.0
import Glibc
import Testing

@testable import LinuxBlock
@testable import SystemIO

@Suite("Netlink") struct NetlinkTests {
  /// The bytes that the kernel gets, written out by hand from linux/netlink.h,
  /// linux/genetlink.h and linux/nbd-netlink.h.
  @Test func connectHasTheKernelsBytes() {
    let configuration = NBDConfiguration(
      size: 0x1_0000_0000, blockSize: 512, flags: 0x6d, timeout: 30, deadConnectionTimeout: 600,
      identifier: "1-51712", index: 5)
    let message = NBDMessage.connect(family: 0x1c, sequence: 7, socket: 9, configuration)
    #expect(
      message == [
        116, 0, 0, 0, 0x1c, 0, 5, 0, 7, 0, 0, 0, 0, 0, 0, 0,  // length, family, flags, sequence
        1, 1, 0, 0,  // connect, version 1
        8, 0, 1, 0, 5, 0, 0, 0,  // index
        12, 0, 2, 0, 0, 0, 0, 0, 1, 0, 0, 0,  // size
        12, 0, 3, 0, 0, 2, 0, 0, 0, 0, 0, 0,  // block size
        12, 0, 4, 0, 30, 0, 0, 0, 0, 0, 0, 0,  // timeout
        12, 0, 5, 0, 0x6d, 0, 0, 0, 0, 0, 0, 0,  // server flags
        12, 0, 8, 0, 0x58, 2, 0, 0, 0, 0, 0, 0,  // dead connection timeout
        12, 0, 10, 0, 0x31, 0x2d, 0x35, 0x31, 0x37, 0x31, 0x32, 0,  // identifier, "1-51712"
        16, 0, 7, 0x80, 12, 0, 1, 0x80, 8, 0, 1, 0, 9, 0, 0, 0,  // sockets { item { fd } }
      ])
  }

  @Test func theOthersHaveTheKernelsBytes() {
    #expect(
      NBDMessage.reconfigure(family: 0x1c, sequence: 2, index: 3, socket: 11, identifier: nil) == [
        44, 0, 0, 0, 0x1c, 0, 5, 0, 2, 0, 0, 0, 0, 0, 0, 0, 3, 1, 0, 0,
        8, 0, 1, 0, 3, 0, 0, 0,
        16, 0, 7, 0x80, 12, 0, 1, 0x80, 8, 0, 1, 0, 11, 0, 0, 0,
      ])
    #expect(
      NBDMessage.disconnect(family: 0x1c, sequence: 2, index: 3) == [
        28, 0, 0, 0, 0x1c, 0, 5, 0, 2, 0, 0, 0, 0, 0, 0, 0, 2, 1, 0, 0,
        8, 0, 1, 0, 3, 0, 0, 0,
      ])
    #expect(
      NBDMessage.status(family: 0x1c, sequence: 2, index: nil) == [
        20, 0, 0, 0, 0x1c, 0, 5, 0, 2, 0, 0, 0, 0, 0, 0, 0, 5, 1, 0, 0,
      ])
  }

  /// A status answer: two devices, the second not connected.
  private static let status: [UInt8] = [
    64, 0, 0, 0, 0x1c, 0, 2, 0, 7, 0, 0, 0, 0, 0, 0, 0, 5, 1, 0, 0,
    44, 0, 9, 0x80,
    20, 0, 1, 0x80, 8, 0, 1, 0, 0, 0, 0, 0, 5, 0, 2, 0, 1, 0, 0, 0,
    20, 0, 1, 0x80, 8, 0, 1, 0, 1, 0, 0, 0, 5, 0, 2, 0, 0, 0, 0, 0,
  ]

  @Test func statusIsUnderstood() throws {
    let replies = try NetlinkDecoder.replies(Self.status)
    guard case .answer(7, 5, let attributes) = replies.first, replies.count == 1 else {
      Issue.record("not one answer: \(replies)")
      return
    }
    #expect(try NBDMessage.devices(attributes) == [0: true, 1: false])
  }

  @Test func errorsAreUnderstood() throws {
    // NLMSG_ERROR, -ENOSPC, then the request's header alone (capped) and the kernel's words.
    let error: [UInt8] = [
      48, 0, 0, 0, 2, 0, 0, 3, 9, 0, 0, 0, 0, 0, 0, 0, 0xe4, 0xff, 0xff, 0xff,
      28, 0, 0, 0, 0x1c, 0, 5, 0, 9, 0, 0, 0, 0, 0, 0, 0,
      9, 0, 1, 0, 0x66, 0x75, 0x6c, 0x6c, 0, 0, 0, 0,
    ]
    #expect(
      try NetlinkDecoder.replies(error) == [.result(sequence: 9, code: ENOSPC, text: "full")])
    let done: [UInt8] = [
      36, 0, 0, 0, 2, 0, 0, 1, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
      28, 0, 0, 0, 0x1c, 0, 5, 0, 9, 0, 0, 0, 0, 0, 0, 0,
    ]
    #expect(try NetlinkDecoder.replies(done) == [.result(sequence: 9, code: 0, text: nil)])
  }

  /// Every prefix, and every byte set to every value, is understood or refused, and never
  /// read past its end.
  @Test func damageNeverTraps() {
    var refused = 0
    func decode(_ bytes: [UInt8]) {
      do throws(NetlinkFault) {
        for reply in try NetlinkDecoder.replies(bytes) {
          if case .answer(_, _, let attributes) = reply { _ = try NBDMessage.devices(attributes) }
        }
      } catch { refused += 1 }
    }
    for count in 1..<Self.status.count { decode(Array(Self.status[..<count])) }
    #expect(refused == Self.status.count - 1)
    for index in Self.status.indices {
      for value in UInt8.min...UInt8.max {
        var bytes = Self.status
        bytes[index] = value
        decode(bytes)
      }
    }
    #expect(refused > 1000)
  }

  /// The kernel's own family is there on any Linux: encoding, socket and decoding together.
  @Test func theKernelAnswers() throws {
    var channel = try GenericNetlink()
    #expect(try channel.family("nlctrl") == 0x10)
    #expect(throws: IOError.self) {
      var channel = try GenericNetlink()
      _ = try channel.family("dmu-no-such")
    }
    // With or without the driver this answers; without it, that is no error.
    _ = try NBDDevice.isAvailable()
  }
}
