// SPDX-License-Identifier: Apache-2.0
// Sizes on the command line: what qemu-img takes, and what it makes of it.

import DiskFormats
import Foundation
import Testing

@Suite("Sizes") struct SizeTests {
  @Test(arguments: [
    "0", "512", "1k", "1K", "3M", "1G", "1.5G", "0.3K", "1.999M", "2.0k", "0x1000", "0X200", "1.5",
    "1.5B", "10GB", "1e3", ".5G", "-1", "+1G", "", "G", "1 G", "0x", "0xg", "7E", "17E",
    "1.123456789012345678M",
  ]) func aSizeIsWhatItIsToQEMU(_ words: String) throws {
    let bench = try Bench()
    let theirs = try bench.run("qemu-img", ["create", "-f", "qcow2", "a", "--", words])
    let ours = try bench.run("dmu-img", ["create", "-f", "qcow2", "b", "--", words])
    // A file of 7 EiB is too long for some: only that the number was understood is of interest.
    guard theirs.exit == 0, ours.exit == 0 else {
      let isNumber = ImageFile.bytes(words) != nil
      let isRefused = theirs.error.contains("Invalid image size") || words.isEmpty
      // A sign before the length of a new disk means nothing, and QEMU drops a plus.
      if words.hasPrefix("+") { return #expect(!isNumber) }
      return #expect(isNumber == !isRefused, "\(theirs.error) \(ours.error)")
    }
    let sizes = try ["a", "b"].map { try bench.must("dmu-img", "info", "--json", $0) }.map {
      try #require(try JSONSerialization.jsonObject(with: Data($0.utf8)) as? [String: Any])[
        "virtual-size"] as? Int
    }
    #expect(sizes[0] == sizes[1])
  }

  @Test func aDiskIsMadeShorterByAnAmount() throws {
    let bench = try Bench()
    try bench.must("dmu-img", "create", "d", "3M")
    for arguments in [["resize", "--shrink", "d", "-1M"], ["resize", "d", "-0.5M", "--shrink"]] {
      #expect(try bench.run("dmu-img", arguments).exit == 0, "\(arguments)")
    }
    #expect(try bench.bytes("d").count == 1_572_864)
    try bench.must("dmu-img", "resize", "d", "+1.5M")
    #expect(try bench.bytes("d").count == 3 << 20)
    try bench.must("dmu-img", "resize", "--shrink", "d", "--", "-1M")
    #expect(try bench.bytes("d").count == 2 << 20)
    let refused = try bench.tool("resize", "d", "+10GB")
    #expect(refused.exit == 1)
    #expect(refused.error.contains("'+10GB' is no size: write SIZE, +SIZE or -SIZE, where SIZE is"))
  }
}
