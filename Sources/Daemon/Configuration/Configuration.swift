// SPDX-License-Identifier: Apache-2.0
// What an admin may set, with every default. etc/dmu-xen.toml says the same in words, and
// a test holds the two together.

internal import BlockIO
package import Logging
package import WorkerLink

/// The daemon's configuration: a value, replaced whole by a reload.
package struct Configuration: Sendable, Equatable {
  /// Where the configuration is looked for.
  package static let defaultPath = "/etc/dmu-xen.toml"

  /// Directory of sockets and state. Read at start only.
  package var runDirectory = "/run/dmu-xen"
  /// The least serious messages that are logged.
  package var logLevel = Logger.Level.info
  /// Time between two full looks at xenstore when nothing happens.
  package var lookInterval = Duration.seconds(60)
  /// How long an attach may take in all, well under libxl's 40 s.
  package var attachTimeout = Duration.seconds(30)

  /// By which way the kernel reaches the disks that do not say so themselves.
  package var transport = Transport.auto
  /// Who attaches and detaches disks where this is a driver domain.
  package var driverDomain = DriverDomain.devd

  /// Path of cowd; empty: beside dmu-xend, then along PATH.
  package var workerProgram = ""
  /// The users that workers run as, each disk's as another, with the group of the same number.
  package var workerUsers: ClosedRange<UInt32> = 2_000_000...2_065_535
  /// Whether workers are caged.
  package var sandbox = Switch.on
  /// How long a worker may take until it is ready.
  package var readyTimeout = Duration.seconds(20)
  /// How long a worker may take to flush and end before it is killed.
  package var stopTimeout = Duration.seconds(10)
  /// How often a worker is asked whether it lives; zero: never. One that does not answer for three
  /// times as long is replaced.
  package var heartbeat = Duration.seconds(10)
  /// So many restarts of a disk's worker are allowed...
  package var restartLimit = 10
  /// ...in so long a time.
  package var restartWindow = Duration.seconds(60)

  /// Directories whose files and devices an image may name as its base.
  package var baseDirectories: [String] = []
  /// How many images there may be in a row, the store included.
  package var chainDepth = 32
  /// Directories whose files and devices a store may name to keep its disk's data in.
  package var storeDirectories: [String] = []
  /// Directories in which a store that does not exist is made when a domain boots.
  package var createIn: [String] = ["/var/lib/dmu-xen"]
  /// Something that is done or not.
  package enum Switch: String, Sendable, CaseIterable {
    /// It is done.
    case on
    /// It is not.
    case off
  }

  /// What happens to a write for which there is no space.
  package var onFull = OnFull.wait
  /// How long such a write waits before it fails; zero: without a limit.
  package var fullTimeout = Duration.seconds(3600)
  /// So long without an I/O error a disk that had some counts as ready again; zero: only after
  /// `dmu-xen clear`.
  package var quietTime = Duration.seconds(600)

  /// How long one request may take before the kernel gives the worker's socket up and sends
  /// it again on the next. As long, too, is the pause of a request that was under way when
  /// its worker died.
  package var requestTimeout = Duration.seconds(10)
  /// How long the kernel waits for a new worker before it fails the guest's requests.
  package var deadConnectionTimeout = Duration.seconds(86_400)

  /// How long a hook may take.
  package var hookTimeout = Duration.seconds(20)

  /// Where metrics are served over HTTP; nil: nowhere. Read at start only.
  package var metricsListen: MetricsAddress?
  /// So long after the last question for metrics the kernel goes on measuring.
  package var measuringTime = Duration.seconds(900)

  /// The defaults.
  package init() {}

  /// Path of the control socket.
  package var controlSocket: String { runDirectory + "/control.sock" }
  /// Directory with one directory a disk.
  package var disksDirectory: String { runDirectory + "/disks" }
  /// What is wanted of named disks.
  var namedWishes: NamedWishes { NamedWishes(folder: runDirectory + "/named") }
  /// What hooks have attached.
  var sourceRecords: SourceRecords { SourceRecords(folder: runDirectory + "/sources") }
  /// Directory of the files of hooks that run.
  var hookDirectory: String { runDirectory + "/hooks" }
  /// Path of the files of such a run.
  func hookFiles(_ name: String) -> String { hookDirectory + "/" + name }
  /// Directory of the links of workers that only recover a log.
  var recoveryDirectory: String { runDirectory + "/recover" }
  /// The pending logs of stores.
  var registry: PendingRegistry { PendingRegistry(runDirectory: runDirectory) }
}

/// Who attaches and detaches disks in a driver domain.
package enum DriverDomain: String, Sendable, CaseIterable {
  /// `xl devd`, which runs the block script.
  case devd
  /// The daemon itself.
  case alone
}

/// What happens to a write for which there is no space.
package enum OnFull: String, Sendable, CaseIterable {
  /// It waits for space.
  case wait
  /// It fails at once, which the guest sees as an I/O error.
  case fail
}

/// An error in the configuration: where, and what is wrong.
package struct ConfigurationError: Error, Sendable, Equatable, CustomStringConvertible {
  /// The file.
  package let file: String
  /// The line, from 1; nil when it belongs to the file as a whole.
  package let line: Int?
  /// "table.key"; nil when the text itself cannot be read.
  package let key: String?
  /// What is wrong and what to do.
  package let reason: String

  /// An error from its parts.
  package init(file: String, line: Int?, key: String?, reason: String) {
    self.file = file
    self.line = line
    self.key = key
    self.reason = reason
  }

  /// "FILE line N: KEY: REASON".
  package var description: String {
    let place = line.map { "\(file) line \($0)" } ?? file
    return key.map { "\(place): \($0): \(reason)" } ?? "\(place): \(reason)"
  }
}
