// SPDX-License-Identifier: Apache-2.0
// Disk lines as xm had them, in lines, configurations and commands.

import TestSupport
import Testing

@testable import XLConfiguration

@Suite("Disk lines of xm for xl")
struct XLConfigurationTests {
  /// A line, and what xl gets; nil: the line stays.
  static let lines: [(String, String?)] = [
    (
      "dmu:dscow:/tmp/fedora4.dscow:/dev/vols/Fedora4,hda1,w",
      "script=block-dmu,vdev=hda1,access=rw,target=dmu:dscow:/tmp/fedora4.dscow:/dev/vols/Fedora4"
    ),
    ("dmu:dscow:/a:/b,hda1", "script=block-dmu,vdev=hda1,target=dmu:dscow:/a:/b"),
    ("dmu:dscow:/a:/b,hda1,r", "script=block-dmu,vdev=hda1,access=ro,target=dmu:dscow:/a:/b"),
    ("dmu:dscow:/a:/b,hda1,ro", "script=block-dmu,vdev=hda1,access=ro,target=dmu:dscow:/a:/b"),
    ("dmu:dscow:/a:/b,hda1,w!", "script=block-dmu,vdev=hda1,access=w!,target=dmu:dscow:/a:/b"),
    ("dmu:dscow:/a:/b,hda1:disk,w", "script=block-dmu,vdev=hda1,access=rw,target=dmu:dscow:/a:/b"),
    (
      "dmu:raw:/cd.iso,hdc:cdrom,r",
      "script=block-dmu,vdev=hdc,access=ro,devtype=cdrom,target=dmu:raw:/cd.iso"
    ),
    ("dmu:dscow:/a:/b,hda1:tape,w", nil),
    (
      " dmu:dscow:/a:/b , xvda\t, w ",
      "script=block-dmu,vdev=xvda,access=rw,target=dmu:dscow:/a:/b"
    ),
    (
      "dmu:dscow?create=yes:/a%2Cb:/b,xvda,w",
      "script=block-dmu,vdev=xvda,access=rw,target=dmu:dscow?create=yes:/a%2Cb:/b"
    ),
    ("dmu:/a,xvda,w", "script=block-dmu,vdev=xvda,access=rw,target=dmu:/a"),
    ("dmu:dscow:/a:/b,raw,xvda,w", "script=block-dmu,vdev=xvda,access=rw,target=dmu:dscow:/a:/b"),
    ("dmu:dscow:/a:/b,,xvda,w", "script=block-dmu,vdev=xvda,access=rw,target=dmu:dscow:/a:/b"),
    (
      "dmu:dscow:/a:/b,xvda,w,backend=storage",
      "script=block-dmu,vdev=xvda,access=rw,backend=storage,target=dmu:dscow:/a:/b"
    ),
    (
      "dmu:dscow:/a:/b,xvda,w,discard",
      "script=block-dmu,vdev=xvda,access=rw,discard,target=dmu:dscow:/a:/b"
    ),
    ("dmu:dscow:/a:/b,raw,xvda,w,script=block-dmu", nil),
    ("dmu:dscow:/a:/b,xvda,w,script=block-mine", nil),
    ("dmu:dscow:/a:/b", nil),
    ("dmu:dscow:/a:/b,", nil),
    ("dmu:dscow:/a:/b,xvda,w,too,many", nil),
    ("script=block-dmu,vdev=xvda,access=rw,target=dmu:dscow:/a:/b", nil),
    ("phy:/dev/vg/a,xvda,w", nil),
    ("/dmu:a,raw,xvda,w", nil),
    ("", nil),
  ]

  @Test("A line in positions", arguments: lines)
  func line(_ line: String, _ expected: String?) {
    #expect(PositionalLine(line)?.rewritten == expected)
  }

  private func rewritten(_ text: String) -> String? {
    GuestConfiguration.rewritten(Array(text.utf8)).map { String(decoding: $0, as: UTF8.self) }
  }

  @Test("A configuration stays byte for byte but for the dmu lines of its disks")
  func configuration() {
    let text = """
      # disk = [ "dmu:dscow:/no:/b,xvda,w" ]
      name = 'dmu:dscow:/no:/b,xvda,w'   # disk = [ 'dmu:dscow:/no:/b,xvda,w' ]
      extra = "disk=[ 'dmu:dscow:/no:/b,xvda,w' ] \\" ["
      vif = [ "dmu:dscow:/no:/b,xvda,w" ]
      disk.other = [ "dmu:dscow:/no:/b,xvda,w" ]
      disk = [ 'phy:/dev/vg/a,xvda,w', # 'dmu:dscow:/no:/b,xvda,w'
      \t"dmu:dscow:/one:/b,xvdb,w"\t,
        'dmu:dscow:/t\\'wo:/b,xvdc,r',
        [ "dmu:dscow:/no:/b,xvda,w" ],
      ]; memory = 512; disk += ["dmu:dscow:/three:/b,xvdd,w"]
      disk = "dmu:dscow:/no:/b,xvda,w"
      on_reboot = "restart"
      """
    let expected =
      text
      .replacing(
        "dmu:dscow:/one:/b,xvdb,w",
        with: "script=block-dmu,vdev=xvdb,access=rw,target=dmu:dscow:/one:/b"
      )
      .replacing(
        "dmu:dscow:/t\\'wo:/b,xvdc,r",
        with: "script=block-dmu,vdev=xvdc,access=ro,target=dmu:dscow:/t\\'wo:/b"
      )
      .replacing(
        "dmu:dscow:/three:/b,xvdd,w",
        with: "script=block-dmu,vdev=xvdd,access=rw,target=dmu:dscow:/three:/b")
    #expect(rewritten(text) == expected)
    #expect(rewritten(expected) == nil)
  }

  @Test("A configuration without dmu lines needs no other")
  func nothing() {
    #expect(rewritten("") == nil)
    #expect(rewritten("disk = [ 'phy:/dev/vg/a,xvda,w' ]\n") == nil)
    // No string: it has no end in its line.
    #expect(rewritten("disk = [ 'dmu:dscow:/a:/b,xvda,w\n' ]") == nil)
    #expect(rewritten("disk = [ 'dmu:dscow:/a:/b,xvda,w\\") == nil)
  }

  @Test("What is no configuration is copied, whatever it is, and once is enough")
  func random() {
    let words = [
      "disk", "=", "+=", "[", "]", "'", "\"", "\\", "\n", ";", "#", " ", ",",
      "dmu:dscow:/a:/b,xvda,w", "name", "+", "\u{FF}", "'dmu:/a,xvda,w'",
    ]
    var found = 0
    for seed in Depth.seeds(400) {
      var random = SplitMix64(seed: seed)
      let start = ["", "", "disk = [", "disk=['a',\n", "# disk += [\ndisk += ["]
      let text =
        start.randomElement(using: &random)!
        + (0..<60).map { _ in words.randomElement(using: &random)! }.joined()
      guard let once = rewritten(text) else { continue }
      found += 1
      #expect(rewritten(once) == nil, "seed \(seed)")
      #expect(once.contains("script=block-dmu,"), "seed \(seed)")
      // What stands before the first line of a disk, and behind the last, is as it was.
      let before = text.prefix(while: { $0 != "d" }), behind = text.reversed().prefix { $0 != "w" }
      #expect(once.hasPrefix(before), "seed \(seed)")
      #expect(once.reversed().starts(with: behind), "seed \(seed)")
    }
    #expect(found > Depth.times(20))
  }

  /// A command, where its configurations stand, and the border of a disk line.
  static let commands: [(String, [Int], Range<Int>?)] = [
    ("create /g.cfg", [1], nil),
    ("cr -p /g.cfg disk=[]", [2, 3], nil),
    ("-v -N create /g.cfg", [3], nil),
    ("create -f /g.cfg disk=[]", [2, 3], nil),
    ("create -pf /g.cfg", [2], nil),
    ("create -f/g.cfg", [1], nil),
    ("create --defconfig=/g.cfg name=x", [1, 2], nil),
    ("create --defconfig /g.cfg", [2], nil),
    ("create -- /g.cfg", [2], nil),
    ("create disk=[] /g.cfg", [1, 2], nil),
    ("config-update g /g.cfg disk=[]", [2, 3], nil),
    ("config-update g -f /g.cfg", [3], nil),
    ("config-update g", [], nil),
    ("restore -p /g.cfg /g.save", [2], nil),
    ("restore /g.save", [], nil),
    ("migrate -C /g.cfg g host", [2], nil),
    ("migrate -s ssh -C/g.cfg g host", [3], nil),
    ("migrate g host", [], nil),
    ("save -c g /g.save /g.cfg", [4], nil),
    ("save g /g.save", [], nil),
    ("block-attach g dmu:dscow:/a:/b hda1 w", [], 2..<5),
    ("block-a g dmu:dscow:/a:/b,hda1,w", [], 2..<3),
    ("block-detach g hda1", [], nil),
    ("list", [], nil),
    ("-v", [], nil),
    ("", [], nil),
  ]

  @Test("Commands with disk lines", arguments: commands)
  func command(_ text: String, _ parts: [Int], _ line: Range<Int>?) {
    let command = XLCommand(text.split(separator: " ").map(String.init))
    #expect(command.parts.map(\.index).sorted() == parts)
    #expect(command.line == line)
  }
}
