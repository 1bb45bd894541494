// SPDX-License-Identifier: Apache-2.0
// The configuration file: every key, its default, and errors that name line and key.

import Glibc
import Logging
import Testing
import TestSupport

@testable import Daemon

@Suite struct ConfigurationTests {
  private func failure(_ text: String) -> ConfigurationError? {
    do {
      _ = try Configuration.parse(text, file: "f")
      return nil
    } catch { return error }
  }

  @Test("Nothing gives the defaults, and a file that is not there")
  func defaults() throws {
    #expect(try Configuration.parse("", file: "f") == Configuration())
    #expect(try Configuration.load("/nowhere/at/all.toml") == Configuration())
  }

  @Test("The file that is installed names every key with its default")
  func installed() throws {
    let path =
      #filePath.replacing("Tests/DaemonTests/ConfigurationTests.swift", with: "")
      + "etc/dmu-xen.toml"
    let text = try TextFile.read(path)
    #expect(try Configuration.parse(text, file: path) == Configuration())
    var table = ""
    var lines: Set<String> = []
    for line in text.split(separator: "\n") where !line.hasPrefix("#") {
      if line.hasPrefix("[") {
        table = String(line.dropFirst().dropLast())
      } else {
        lines.insert("\(table).\(line)")
      }
    }
    let expected = Set(ConfigurationKey.all.map { "\($0.path) = \($0.show(Configuration()))" })
    #expect(lines == expected)
  }

  @Test("Values are taken in")
  func values() throws {
    let configuration = try Configuration.parse(
      """
      [daemon]
      log-level = "debug"   # loud
      look-interval = 5
      [worker]
      program = "/opt/cowd"
      uids = "3000-3999"
      sandbox = "off"
      heartbeat = 0
      restart-limit = 0
      [base]
      directories = ["/srv/bases", "/dev/vg"]
      [nbd]
      request-timeout = 30
      [metrics]
      listen = "[::1]:9817"
      """, file: "f")
    #expect(configuration.metricsListen == .loopback("::1", 9817))
    #expect(configuration.logLevel == .debug)
    #expect(configuration.lookInterval == .seconds(5))
    #expect(configuration.workerProgram == "/opt/cowd")
    #expect(configuration.workerUsers == 3000...3999)
    #expect(configuration.sandbox == .off)
    #expect(configuration.heartbeat == .zero)
    #expect(configuration.restartLimit == 0)
    #expect(configuration.baseDirectories == ["/srv/bases", "/dev/vg"])
    #expect(configuration.requestTimeout == .seconds(30))
  }

  @Test("Errors name line and key")
  func errors() throws {
    let text = "[daemon]\nlog-level = \"info\"\n\n[worker]\n# a comment\nstop-timeot = 5\n"
    #expect(
      failure(text)?.description
        == "f line 6: worker.stop-timeot: there is no such key (did you mean 'stop-timeout'?)")
    #expect(
      failure("\n[wroker]\n")?.description
        == "f line 2: wroker: there is no such table (did you mean 'worker'?)")
    #expect(
      failure("[worker]\nready-timeout = \"soon\"\n")?.description
        == "f line 2: worker.ready-timeout: the value must be a number of seconds from 1 to 35")
    #expect(
      failure("[worker]\nready-timeout = 36\n")?.line == 2)
    #expect(
      failure("[daemon]\n\nlog-level = \"loud\"\n")?.description.hasPrefix(
        "f line 3: daemon.log-level: the value must be one of \"trace\"") == true)
    #expect(
      failure("[base]\ndirectories = [\"/a\", 5]\n")?.description
        == "f line 2: base.directories: the value must be a list of absolute paths, as in"
        + " [\"/srv/bases\"]")
    #expect(failure("[base]\ndirectories = [\"a\"]\n")?.line == 2)
    #expect(
      failure("worker = 5\n")?.description
        == "f line 1: worker: this must be a table: write [worker]")
    for range in ["\"\"", "1000", "\"1000\"", "\"999-2000\"", "\"3000-2000\"", "\"60000-70000\""] {
      #expect(
        failure("worker.uids = \(range)\n")?.description.hasPrefix(
          "f line 1: worker.uids: the value must be a range of user numbers") == true)
    }
    #expect(
      failure("[metrics]\nlistn = \"\"\n")?.description
        == "f line 2: metrics.listn: there is no such key (did you mean 'listen'?)")
    #expect(
      failure("[metrics]\nlisten = \"0.0.0.0:9817\"\n")?.description
        == "f line 2: metrics.listen: the value must be the path of a Unix socket, at most 107"
        + " bytes, or a loopback address and a port, as in \"127.0.0.1:9817\" or"
        + " \"[::1]:9817\", or \"\"")
    #expect(failure("[metrics]\nlisten = 9817\n")?.line == 2)
    #expect(
      failure("[worker]\nuser = 65534\n")?.description
        == "f line 2: worker.user: there is no such key any more: each disk has a user of its own,"
        + " see worker.uids")
    for strange in [
      "[]", "[#]", "[=]", "[[daemon]]", "= 5", "\"a\" = 5", "[daemon", "x", "[a b]", "a = \"x",
      "a = 'x",
      "a = \"\\u0041\"", "a = {}", "a = 1, 2", "a = ]", "# \u{B}[=", "# \u{2028}[", "# \u{85}x",
      "# \rx", "a = \u{E4}",
      "a = \"\\",
    ] {
      #expect(
        failure("# one\n\(strange)\n")?.description
          == "f line 2: this is neither a [table] nor KEY = VALUE nor a # comment, as far as is"
          + " needed here", "\(strange)")
    }
    #expect(failure("[base]\r\ndirectories = []\r\n") == nil)
    #expect(failure("[base]\r\n\r\ndirectories = 5\r\n")?.line == 3)
    #expect(failure("[base]\ndirectories = [ # list\n \"/a\", # ]\n \"/b\"\n]\n") == nil)
    let broken = try #require(failure("[daemon]\nlook-interval = 1x\n"))
    #expect(broken.line == 2)
    #expect(broken.key == nil)
    let word = try #require(failure("[daemon]\nlog-level = debug  # more\n"))
    #expect(word.line == 2)
    #expect(word.reason == "the value debug has no quotes: write log-level = \"debug\"")
    let path = try #require(failure("[daemon]\r\nrun-directory =/run/x\r\n"))
    #expect(path.reason == "the value /run/x has no quotes: write run-directory = \"/run/x\"")
    let twice = try #require(failure("[daemon]\nlook-interval = 1\nlook-interval = 2\n"))
    #expect(twice.line == 3)
  }

  @Test("No text makes the reader trap")
  func random() throws {
    var random = SeededRandom(announcedAs: "ConfigurationTests.random")
    let path =
      #filePath.replacing("Tests/DaemonTests/ConfigurationTests.swift", with: "")
      + "etc/dmu-xen.toml"
    let original = Array(try TextFile.read(path).utf8)
    for _ in 0..<3_000 {
      var bytes = original
      for _ in 0..<Int.random(in: 1..<4, using: &random) {
        let place = Int.random(in: 0..<bytes.count, using: &random)
        bytes[place] = UInt8.random(in: 1..<127, using: &random)
      }
      if Bool.random(using: &random) { bytes.removeLast(Int.random(in: 0..<1000, using: &random)) }
      _ = failure(String(decoding: bytes, as: UTF8.self))
    }
  }

  @Test("Words that are nearly right")
  func nearest() {
    let known = ["restart-limit", "restart-window", "user"]
    #expect(NearestMatch.find("restart-limt", among: known) == "restart-limit")
    #expect(NearestMatch.find("usre", among: known) == "user")
    #expect(NearestMatch.find("colour", among: known) == nil)
    #expect(NearestMatch.find("", among: known) == nil)
    #expect(NearestMatch.find("x", among: []) == nil)
  }
}
