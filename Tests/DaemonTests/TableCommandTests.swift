// SPDX-License-Identifier: Apache-2.0
// `dmu-xen table` where no device-mapper is needed; with one it is tried in the kernel lab.

import Foundation
import Testing
import TestSupport

@testable import Daemon

@Suite struct TableCommandTests {
  private let devices = [
    TableCommand.Status(
      name: "lines", number: "254:3", suspended: false, open: 1,
      lines: [
        TableCommand.Line(
          start: 0, length: 2048, target: "linear", parameters: "7:0 0", status: ""),
        TableCommand.Line(
          start: 2048, length: 4096, target: "striped", parameters: "2 64 7:0 2048 7:1 0",
          status: "2 7:0 7:1 1 AA"),
        TableCommand.Line(start: 6144, length: 64, target: "zero", parameters: "", status: ""),
      ]),
    TableCommand.Status(name: "none", number: "254:4", suspended: true, open: 0, lines: []),
  ]

  @Test func tablesAreShownAsDmsetupTakesThem() {
    #expect(
      TableCommand.render(devices) == """
        lines (254:3, open 1)
          0 2048 linear 7:0 0
          2048 4096 striped 2 64 7:0 2048 7:1 0  [2 7:0 7:1 1 AA]
          6144 64 zero
        none (254:4, suspended, open 0)
          no table

        """)
    #expect(TableCommand.render([]) == "")
  }

  @Test func scriptsGetEveryField() throws {
    let text = try ClientCommands.pretty(devices)
    let found = try JSONSerialization.jsonObject(with: Data(text.utf8)) as? [[String: Any]]
    let device = try #require(found?.first)
    #expect(Set(device.keys) == ["name", "number", "suspended", "open", "lines"])
    let line = try #require((device["lines"] as? [[String: Any]])?[1])
    #expect(line["start"] as? Int == 2048 && line["length"] as? Int == 4096)
    #expect(line["target"] as? String == "striped")
    #expect(line["parameters"] as? String == "2 64 7:0 2048 7:1 0")
    #expect(line["status"] as? String == "2 7:0 7:1 1 AA")
  }

  @Test func aCheckNeedsNoDevice() throws {
    let folder = try TemporaryFolder()
    let file = folder.file("table")
    try Data("0 8 zero\n8 8 error\n".utf8).write(to: URL(fileURLWithPath: file))
    #expect(TableCommand.load("name", file: file, onlyChecks: true) == .done)
    try Data("0 8 zero\n9 8 error\n".utf8).write(to: URL(fileURLWithPath: file))
    #expect(TableCommand.load("name", file: file, onlyChecks: true) == .failed)
    #expect(TableCommand.load("name", file: folder.file("none"), onlyChecks: true) == .failed)
    for name in ["", "a/b", "control", String(repeating: "n", count: 128)] {
      #expect(TableCommand.load(name, file: file, onlyChecks: true) == .failed, "\(name)")
    }
  }
}
