// SPDX-License-Identifier: Apache-2.0
// What an admin may set, with every default. etc/dmu-xen.toml says the same in words, and
// a test holds the two together.

public import Logging
internal import Posix
public import WorkerLink

/// The daemon's configuration: a value, replaced whole by a reload.
public struct Configuration: Sendable, Equatable {
  /// Where the configuration is looked for.
  public static let defaultPath = "/etc/dmu-xen.toml"

  /// Directory of sockets and state. Read at start only.
  public var runDirectory = "/run/dmu-xen"
  /// The least serious messages that are logged.
  public var logLevel = Logger.Level.info
  /// Time between two full looks at xenstore when nothing happens.
  public var lookInterval = Duration.seconds(60)
  /// How long an attach may take in all, well under libxl's 40 s.
  public var attachTimeout = Duration.seconds(30)

  /// By which way the kernel reaches the disks that do not say so themselves.
  public var transport = Transport.auto

  /// Path of cowd; empty: beside dmu-xend, then along PATH.
  public var workerProgram = ""
  /// The users that workers run as, each disk's as another, with the group of the same number.
  public var workerUsers: ClosedRange<UInt32> = 2_000_000...2_065_535
  /// Whether workers are caged.
  public var sandbox = Switch.on
  /// How long a worker may take until it is ready.
  public var readyTimeout = Duration.seconds(20)
  /// How long a worker may take to flush and end before it is killed.
  public var stopTimeout = Duration.seconds(10)
  /// How often a worker is asked whether it lives; zero: never. One that does not answer for three
  /// times as long is replaced.
  public var heartbeat = Duration.seconds(10)
  /// So many restarts of a disk's worker are allowed...
  public var restartLimit = 10
  /// ...in so long a time.
  public var restartWindow = Duration.seconds(60)

  /// Directories whose files and devices an image may name as its base.
  public var baseDirectories: [String] = []
  /// How many images there may be in a row, the store included.
  public var chainDepth = 32
  /// Directories whose files and devices a store may name to keep its disk's data in.
  public var storeDirectories: [String] = []
  /// Directories in which a store that does not exist is made when a domain boots.
  public var createIn: [String] = ["/var/lib/dmu-xen"]
  /// Something that is done or not.
  public enum Switch: String, Sendable, CaseIterable {
    /// It is done.
    case on
    /// It is not.
    case off
  }

  /// What happens to a write for which there is no space.
  public var onFull = OnFull.wait
  /// How long such a write waits before it fails; zero: without a limit.
  public var fullTimeout = Duration.seconds(3600)
  /// So long without an I/O error a disk that had some counts as ready again; zero: only after
  /// `dmu-xen clear`.
  public var quietTime = Duration.seconds(600)

  /// How long one request may take before the kernel gives the worker's socket up and sends
  /// it again on the next. As long, too, is the pause of a request that was under way when
  /// its worker died.
  public var requestTimeout = Duration.seconds(10)
  /// How long the kernel waits for a new worker before it fails the guest's requests.
  public var deadConnectionTimeout = Duration.seconds(86_400)

  /// Where metrics are served over HTTP; nil: nowhere. Read at start only.
  public var metricsListen: MetricsAddress?
  /// So long after the last question for metrics the kernel goes on measuring.
  public var measuringTime = Duration.seconds(900)

  /// The defaults.
  public init() {}

  /// Path of the control socket.
  public var controlSocket: String { runDirectory + "/control.sock" }
  /// Directory with one directory a disk.
  public var disksDirectory: String { runDirectory + "/disks" }
  /// Directory of the links of workers that only recover a log.
  var recoveryDirectory: String { runDirectory + "/recover" }
  /// The pending logs of stores.
  var registry: PendingRegistry { PendingRegistry(runDirectory: runDirectory) }
}

/// What happens to a write for which there is no space.
public enum OnFull: String, Sendable, CaseIterable {
  /// It waits for space.
  case wait
  /// It fails at once, which the guest sees as an I/O error.
  case fail
}

/// An error in the configuration: where, and what is wrong.
public struct ConfigurationError: Error, Sendable, Equatable, CustomStringConvertible {
  /// The file.
  public let file: String
  /// The line, from 1; nil when it belongs to the file as a whole.
  public let line: Int?
  /// "table.key"; nil when the text itself cannot be read.
  public let key: String?
  /// What is wrong and what to do.
  public let reason: String

  /// An error from its parts.
  public init(file: String, line: Int?, key: String?, reason: String) {
    self.file = file
    self.line = line
    self.key = key
    self.reason = reason
  }

  /// "FILE line N: KEY: REASON".
  public var description: String {
    let place = line.map { "\(file) line \($0)" } ?? file
    return key.map { "\(place): \($0): \(reason)" } ?? "\(place): \(reason)"
  }
}
