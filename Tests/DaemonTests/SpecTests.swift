// SPDX-License-Identifier: Apache-2.0
// The grammar of specs: every good shape, and every malformed one with its own reason.

import Testing
import TestSupport

@testable import Daemon

@Suite struct SpecTests {
  @Test(
    "Good specs, read and written out again",
    arguments: [
      "dmu:dscow:/a", "dmu:dscow:/a:/b", "dmu:dscow?block-size=64K:/var/lib/x.dscow:/dev/vg/base",
      "dmu:dscow?block-size=4K&force=yes:/a%3Ab:/c%2Cd%25", "dmu:qcow2+x_y-z:/ä/%20:/b",
      "dmu:dscow:lvm//vg/lv:nbd//10.0.0.5%3A10809/base", "dmu:raw:x-9//a//b", "dmu:raw:/a//b",
    ])
  func good(_ text: String) throws {
    let spec = try Spec(text)
    #expect(spec.description == text)
    #expect(try Spec(spec.description) == spec)
  }

  @Test("The parts are decoded")
  func parts() throws {
    let spec = try Spec("dmu:dscow?block-size=64K&x=%26:/a%3ab%2Cc:/b%25")
    #expect(spec.format == "dscow")
    #expect(spec.option("block-size") == "64K")
    #expect(spec.option("x") == "&")
    #expect(spec.option("y") == nil)
    #expect(spec.store == "/a:b,c")
    #expect(spec.base == "/b%")
  }

  @Test("A source keeps its text, whatever path a hook makes of it")
  func sources() throws {
    let spec = try Spec("dmu:dscow:lvm//vg/lv:nbd//host%3A1/b")
    let (store, base) = (try #require(spec.storeSource), try #require(spec.baseSource))
    #expect(store.scheme == "lvm" && store.rest == "vg/lv" && base.rest == "host:1/b")
    #expect(spec.isUnresolved && spec.sources.map(\.source) == [base, store])
    let half = spec.attached([store: "/dev/vg/lv"])
    #expect(half.store == "/dev/vg/lv" && half.base == "nbd//host:1/b" && half.isUnresolved)
    let all = half.attached([base: "/dev/nbd0"])
    #expect(all.base == "/dev/nbd0" && !all.isUnresolved && all.storeName == "lvm//vg/lv")
    #expect(all.description == spec.description)
    #expect(try Spec("dmu:raw:/a//b").storeSource == nil)
    let long = String(repeating: "x", count: 1025)
    #expect(Source("lvm//" + long) == nil && Source("lvm//" + long.dropLast()) != nil)
    #expect(Source(String(repeating: "x", count: 33) + "//a") == nil)
  }

  static let bad: [(String, SpecError.Reason)] = [
    ("drbd:x", .noPrefix), ("", .noPrefix), ("dmu:", .noStore), ("dmu:dscow", .noStore),
    ("dmu::/a", .noFormat), ("dmu:?x=1:/a", .noFormat), ("dmu:ds.cow:/a", .badFormat("ds.cow")),
    ("dmu:ds cow:/a", .badFormat("ds cow")), ("dmu:dscow:", .noStore),
    ("dmu:dscow::/b", .noStore), ("dmu:dscow:/a:", .emptyBase),
    ("dmu:dscow:/a:/b:/c", .tooManyParts(4)), ("dmu:dscow?:/a", .noOptionName),
    ("dmu:dscow?=1:/a", .noOptionName), ("dmu:dscow?x=1&:/a", .noOptionName),
    ("dmu:dscow?x.y=1:/a", .badOptionName("x.y")), ("dmu:dscow?x:/a", .noOptionValue("x")),
    ("dmu:dscow?x=:/a", .noOptionValue("x")), ("dmu:dscow?x=1&x=2:/a", .optionTwice("x")),
    ("dmu:dscow?x=1=2:/a", .badCode(what: "option 'x'", .bare("="))),
    ("dmu:dscow:a", .notAbsolute(.store, "a")), ("dmu:dscow:/a:b", .notAbsolute(.base, "b")),
    ("dmu:raw:lvm/vg", .notAbsolute(.store, "lvm/vg")),
    ("dmu:raw:Lvm//x", .notAbsolute(.store, "Lvm//x")),
    ("dmu:raw:9//x", .notAbsolute(.store, "9//x")),
    ("dmu:raw:lvm//", .badSource(.store, "lvm//")),
    ("dmu:raw:/a:lvm//-x", .badSource(.base, "lvm//-x")),
    ("dmu:raw:a//x:a//x", .sameTwice),
    ("dmu:dscow:/\(String(repeating: "x", count: 4095))", .tooLong(.store)),
    ("dmu:dscow:/a:/\(String(repeating: "x", count: 4095))", .tooLong(.base)),
    ("dmu:dscow:/a:/a", .sameTwice), ("dmu:dscow:/%61:/a", .sameTwice),
    ("dmu:dscow:/a,w", .badCode(what: "store", .bare(","))),
    ("dmu:dscow:/a?b", .badCode(what: "store", .bare("?"))),
    ("dmu:dscow:/a&b", .badCode(what: "store", .bare("&"))),
    ("dmu:dscow:/a=b", .badCode(what: "store", .bare("="))),
    ("dmu:dscow:/a:/b%", .badCode(what: "base", .notACode("%"))),
    ("dmu:dscow:/a%4", .badCode(what: "store", .notACode("%4"))),
    ("dmu:dscow:/a%zz", .badCode(what: "store", .notACode("%zz"))),
    ("dmu:dscow:/a%+1", .badCode(what: "store", .notACode("%+1"))),
    ("dmu:dscow:/a%00", .badCode(what: "store", .control(0))),
    ("dmu:dscow:/a%0a", .badCode(what: "store", .control(10))),
    ("dmu:dscow:/a\n", .badCode(what: "store", .control(10))),
    ("dmu:dscow:/a%ff", .badCode(what: "store", .notText)),
  ]

  @Test("Malformed specs, each with its reason")
  func malformed() {
    var sentences: Set<String> = []
    for (text, reason) in SpecTests.bad {
      #expect(throws: SpecError(text, reason), "\(text.prefix(60))") { try Spec(text) }
      let sentence = SpecError(text, reason).description
      #expect(!sentence.contains("\n"))
      #expect(sentence.hasSuffix(": write dmu:FORMAT[?OPTION=VALUE]:STORE[:BASE]"))
      sentences.insert(SpecError("", reason).description)
    }
    #expect(sentences.count == Set(SpecTests.bad.map(\.1)).count, "two reasons in the same words")
  }

  @Test("No text makes the parser trap, and what it takes it gives back")
  func random() {
    var random = SeededRandom(announcedAs: "SpecTests.random")
    let pieces = [
      "dmu:", "dscow", ":", "/", "?", "=", "&", "%", "%3A", "%00", "a", "ä", "\u{0}", "\n", ",",
      "..", "\u{1F600}",
    ]
    var good = 0
    for _ in 0..<20_000 {
      let count = Int.random(in: 0..<10, using: &random)
      let text =
        "dmu:dscow:/"
        + (0..<count).map { _ in pieces.randomElement(using: &random) ?? "" }
        .joined()
      do {
        let spec = try Spec(text)
        good += 1
        #expect(try Spec(spec.description) == spec, "\(text)")
      } catch {
        #expect(!error.description.contains("\n"))
      }
    }
    #expect(good > 100)
  }

  @Test("check refuses what cannot be an image, and a store without a folder")
  func check() throws {
    let folder = try TemporaryFolder()
    func fault(_ text: String) throws -> String? {
      let spec = try Spec(text)
      do throws(DiskFailure) {
        try SpecCommand.examine(spec)
        return nil
      } catch { return error.sentence }
    }
    let (here, base) = (folder.path, "/dev/null")
    #expect(try fault("dmu:dscow:\(here)/s:\(here)/b") == nil, "what is not there may come")
    #expect(
      try fault("dmu:dscow:\(here)/s:\(here)")
        == "base \(here) is a directory: give the path of an image file or a block device")
    #expect(try fault("dmu:dscow:\(here):\(here)/b")?.hasPrefix("store \(here) is a dir") == true)
    #expect(
      try fault("dmu:dscow:\(here)/s:\(base)")?.hasPrefix("base /dev/null is no file") == true)
    #expect(
      try fault("dmu:dscow:\(here)/no/s:\(here)/b")?
        .hasPrefix("store \(here)/no/s does not exist and cannot be created") == true)
    func state(_ text: String, _ createIn: [String]) throws -> String {
      let spec = try Spec(text)
      let lines = SpecCommand.explain(spec, try FormatOptions(spec), createIn: createIn)
        .split(separator: "\n")
      return String(try #require(lines.first { $0.hasPrefix("store:") }))
    }
    #expect(
      try state("dmu:dscow:\(here)/s:/b", []).contains(
        "is not created here: add '?create=yes', or make it with 'dscow_tool -c \(here)/s /b'"))
    #expect(try state("dmu:dscow:\(here)/s:/b", [here]).contains("when the domain boots"))
    #expect(try state("dmu:dscow?create=yes:\(here)/s:/b", []).contains("when the domain boots"))
    #expect(try state("dmu:dscow?create=no:\(here)/s:/b", [here]).contains("not created"))
  }

  @Test("The disk line of xm is explained")
  func formerLine() throws {
    let line = try #require(
      DiskLine.explanation("dmu:dscow:/tmp/fedora4.dscow:/dev/vols/Fedora4,hda1,w"))
    #expect(
      line.hasSuffix(
        "write\ndisk = [ \"script=block-dmu,vdev=hda1,access=rw,"
          + "target=dmu:dscow:/tmp/fedora4.dscow:/dev/vols/Fedora4\" ]"))
    #expect(DiskLine.explanation("dmu:dscow:/a:/b,xvda,r")?.contains("access=ro") == true)
    #expect(DiskLine.explanation("dmu:dscow:/a:/b") == nil)
    #expect(DiskLine.explanation("dmu:nonsense,xvda,w") == nil)
    #expect(DiskLine.explanation("dmu:dscow:/a:/b,raw,xvda,w,script=block-dmu") == nil)
  }

  @Test("Options of dscow")
  func options() throws {
    #expect(try FormatOptions(Spec("dmu:dscow?block-size=64k:/a")).blockSize == 65536)
    #expect(try FormatOptions(Spec("dmu:dscow?block-size=4194304:/a")).blockSize == 4 << 20)
    #expect(try FormatOptions(Spec("dmu:dscow?force=yes:/a")).force)
    #expect(try !FormatOptions(Spec("dmu:dscow?force=no:/a")).force)
    #expect(try FormatOptions(Spec("dmu:dscow:/a")).create == nil)
    #expect(try FormatOptions(Spec("dmu:dscow?create=yes:/a")).create == true)
    #expect(try FormatOptions(Spec("dmu:qcow2?create=no:/a")).create == false)
    for bad in ["block-size=2K", "block-size=8M", "block-size=12K", "block-size=-4K", "force=1"] {
      #expect(throws: DiskFailure.self) { try FormatOptions(Spec("dmu:dscow?\(bad):/a")) }
    }
  }
}
