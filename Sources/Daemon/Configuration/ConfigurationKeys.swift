// SPDX-License-Identifier: Apache-2.0
// The keys of the configuration file: what each may hold and where it goes.

internal import Logging
internal import TOMLKit
internal import WorkerLink

/// What a value must be; thrown when it is not.
struct Wanted: Error {
  let what: String
  init(_ what: String) { self.what = what }
}

/// One key: its table, its name, how it is taken in, and how its default is written.
struct ConfigurationKey: Sendable {
  let table: String
  let name: String
  let take: @Sendable (inout Configuration, any TOMLValueConvertible) throws(Wanted) -> Void
  let show: @Sendable (Configuration) -> String

  var path: String { "\(table).\(name)" }

  static let all: [ConfigurationKey] = [
    path("daemon", "run-directory", \.runDirectory),
    logLevel,
    seconds("daemon", "look-interval", \.lookInterval, 1...86_400),
    seconds("daemon", "attach-timeout", \.attachTimeout, 1...35),
    transport,
    driverDomain,
    path("worker", "program", \.workerProgram, mayBeEmpty: true),
    users("worker", "uids", \.workerUsers),
    sandbox,
    seconds("worker", "ready-timeout", \.readyTimeout, 1...35),
    seconds("worker", "stop-timeout", \.stopTimeout, 1...600),
    seconds("worker", "heartbeat", \.heartbeat, 0...3600),
    number("worker", "restart-limit", \.restartLimit, 0...1_000_000),
    seconds("worker", "restart-window", \.restartWindow, 1...86_400),
    directories("store", "directories", \.storeDirectories),
    directories("store", "create-in", \.createIn),
    onFull,
    seconds("store", "full-timeout", \.fullTimeout, 0...31_536_000),
    seconds("store", "quiet-time", \.quietTime, 0...31_536_000),
    directories("base", "directories", \.baseDirectories),
    number("base", "chain-depth", \.chainDepth, 1...256),
    seconds("nbd", "request-timeout", \.requestTimeout, 1...3600),
    seconds("nbd", "dead-connection-timeout", \.deadConnectionTimeout, 1...31_536_000),
    seconds("hooks", "timeout", \.hookTimeout, 1...600),
    metricsListen,
    seconds("metrics", "measuring-time", \.measuringTime, 1...86_400),
  ]

  /// Keys that there were once, and what to do now.
  static let gone = [
    "worker.user": "each disk has a user of its own, see worker.uids",
    "worker.group": "each disk has a group of its own, see worker.uids",
  ]

  private static let logLevel = word("daemon", "log-level", \.logLevel)
  private static let onFull = word("store", "on-full", \.onFull)
  private static let sandbox = word("worker", "sandbox", \.sandbox)
  private static let metricsListen = ConfigurationKey(
    table: "metrics", name: "listen",
    take: { configuration, value throws(Wanted) in
      guard let text = value.string else { throw Wanted(MetricsAddress.wanted) }
      configuration.metricsListen = MetricsAddress(text)
      if configuration.metricsListen == nil, !text.isEmpty { throw Wanted(MetricsAddress.wanted) }
    }, show: { "\"\($0.metricsListen?.description ?? "")\"" })
  private static let transport = word("daemon", "transport", \.transport)
  private static let driverDomain = word("daemon", "driver-domain", \.driverDomain)

  private static func word<Word: RawRepresentable<String> & CaseIterable & Sendable>(
    _ table: String, _ name: String,
    _ field: any WritableKeyPath<Configuration, Word> & Sendable
  ) -> ConfigurationKey {
    ConfigurationKey(
      table: table, name: name,
      take: { configuration, value throws(Wanted) in
        guard let text = value.string, let word = Word(rawValue: text) else {
          let words = Word.allCases.map { "\"\($0.rawValue)\"" }
          throw Wanted("one of " + words.joined(separator: ", "))
        }
        configuration[keyPath: field] = word
      }, show: { "\"\($0[keyPath: field].rawValue)\"" })
  }

  private static func path(
    _ table: String, _ name: String,
    _ field: any WritableKeyPath<Configuration, String> & Sendable, mayBeEmpty: Bool = false
  ) -> ConfigurationKey {
    ConfigurationKey(
      table: table, name: name,
      take: { configuration, value throws(Wanted) in
        guard let text = value.string, text.hasPrefix("/") || (mayBeEmpty && text.isEmpty) else {
          throw Wanted("an absolute path in quotes" + (mayBeEmpty ? ", or \"\"" : ""))
        }
        configuration[keyPath: field] = text
      }, show: { "\"\($0[keyPath: field])\"" })
  }

  private static func directories(
    _ table: String, _ name: String,
    _ field: any WritableKeyPath<Configuration, [String]> & Sendable
  ) -> ConfigurationKey {
    let wanted = "a list of absolute paths, as in [\"/srv/bases\"]"
    return ConfigurationKey(
      table: table, name: name,
      take: { configuration, value throws(Wanted) in
        guard let array = value.array else { throw Wanted(wanted) }
        var paths: [String] = []
        for index in 0..<array.count {
          guard let text = array[index].string, text.hasPrefix("/") else { throw Wanted(wanted) }
          paths.append(text)
        }
        configuration[keyPath: field] = paths
      },
      show: { "[" + $0[keyPath: field].map { "\"\($0)\"" }.joined(separator: ", ") + "]" })
  }

  private static func users(
    _ table: String, _ name: String,
    _ field: any WritableKeyPath<Configuration, ClosedRange<UInt32>> & Sendable
  ) -> ConfigurationKey {
    ConfigurationKey(
      table: table, name: name,
      take: { configuration, value throws(Wanted) in
        let ends = (value.string ?? "").split(separator: "-", omittingEmptySubsequences: false)
          .map { UInt32($0) }
        // 65534 is nobody's, and so everybody's.
        guard ends.count == 2, let first = ends[0], let last = ends[1], first >= 1000,
          first <= last, last < UInt32.max, !(first...last).contains(65534)
        else {
          throw Wanted(
            "a range of user numbers that nothing else has, from 1000 on and without 65534, as in"
              + " \"2000000-2065535\"")
        }
        configuration[keyPath: field] = first...last
      },
      show: {
        let range = $0[keyPath: field]
        return "\"\(range.lowerBound)-\(range.upperBound)\""
      })
  }

  private static func seconds(
    _ table: String, _ name: String,
    _ field: any WritableKeyPath<Configuration, Duration> & Sendable, _ range: ClosedRange<Int>
  ) -> ConfigurationKey {
    ConfigurationKey(
      table: table, name: name,
      take: { configuration, value throws(Wanted) in
        guard let number = value.int, range.contains(number) else {
          throw Wanted("a number of seconds from \(range.lowerBound) to \(range.upperBound)")
        }
        configuration[keyPath: field] = .seconds(number)
      }, show: { String($0[keyPath: field].components.seconds) })
  }

  private static func number<Number: FixedWidthInteger & Sendable>(
    _ table: String, _ name: String,
    _ field: any WritableKeyPath<Configuration, Number> & Sendable, _ range: ClosedRange<Int>
  ) -> ConfigurationKey {
    ConfigurationKey(
      table: table, name: name,
      take: { configuration, value throws(Wanted) in
        guard let number = value.int, range.contains(number), let fit = Number(exactly: number)
        else { throw Wanted("a number from \(range.lowerBound) to \(range.upperBound)") }
        configuration[keyPath: field] = fit
      }, show: { String($0[keyPath: field]) })
  }
}
