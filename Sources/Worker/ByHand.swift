// SPDX-License-Identifier: Apache-2.0
// A worker that a person started: it serves a store on a Unix socket, for which it needs no rights
// and no help of the kernel, or as a device of the kernel: of the device-mapper, or of the nbd
// driver. It stays in the foreground until SIGTERM or SIGINT. See Keeper for who does what.

import DiskFormats
import Glibc
import SystemIO
package import WorkerLink

/// What a person asked for.
package struct ByHandOptions: Sendable {
  /// Where the disk shall appear.
  package enum Service: Sendable, Equatable {
    /// At a Unix socket, by NBD.
    case socket(path: String)
    /// As a device of the kernel, with a link of this name in /dev/mapper.
    case device(name: String)
  }

  /// Name of the image format.
  package var format: String
  /// Path of the store.
  package var store: String
  /// Where the disk shall appear.
  package var service: Service
  /// Path of the base, instead of the one that the image names.
  package var base: String?
  /// Name of the base's format, whatever the image says of it.
  package var baseFormat: String?
  /// Whether the disk is only read.
  package var readOnly = false
  /// Whether a base that has changed is accepted.
  package var force = false
  /// By which way a device reaches the kernel.
  package var transport = Transport.auto
  /// Whether a write that finds no space fails, instead of waiting for some.
  package var failsWhenFull = false
  /// Whether nothing is opened that the image names.
  package var untrusted = false
  /// Files and folders that the image may have written beside those in its own folder.
  package var allowed: [String] = []
  /// Whether the worker is caged.
  package var isCaged = true
  /// The folder of plugins; nil: the usual one.
  package var plugins: String?
  /// Where every fault and answer is written as a line; "-" is standard error.
  package var trace: String?
  /// A named pipe by which held writes are let go.
  package var hold: String?
  /// What is logged.
  package var level = Log.Level.warning

  /// Options from what is always needed.
  package init(format: String, store: String, service: Service) {
    self.format = format
    self.store = store
    self.service = service
  }
}

/// The life of a worker by hand.
package enum ByHand {
  /// Users that nobody has are taken from here on, one for each process id. Source: the unused
  /// ranges in systemd's "Users, Groups, UIDs and GIDs".
  private static let firstUser: UInt32 = 0x7f00_0000

  /// Starts a keeper and serves until a signal or, for a device, until somebody disconnects it.
  /// `arguments` are those of this program. Answers the exit status: 0 when all that was written is
  /// durable; what was wrong has been said. Throws when nothing can be served at all.
  package static func run(
    _ options: ByHandOptions, arguments: [String]
  ) throws(WorkerError) -> Int32 {
    let log = Log(level: options.level, journal: Log.underJournal)
    let signals = try system { () throws(IOError) in
      try SignalSource([SIGTERM, SIGINT, SIGHUP])
    }
    // What a person names is opened before there is a cage, and a plugin is that person's.
    var person = Supervised.Person()
    person.debugging = try DiskDebugging(trace: options.trace, hold: options.hold, log)
    if FormatName.kind(options.format) == nil {
      let folder = options.plugins ?? PluginFolder.usual
      guard PluginFolder.has(options.format, in: folder) else {
        throw FormatName.unknown(options.format, ", and no plugin \(folder)/\(options.format).so")
      }
      person.plugin = (options.format, try PluginFolder.load(options.format, from: folder))
    }
    var supervised = SupervisedOptions()
    supervised.uid = firstUser + UInt32(getpid())
    supervised.gid = supervised.uid
    supervised.isCaged = options.isCaged
    supervised.isByHand = true
    if case .socket = options.service { supervised.servesKernel = false }
    let link = try startKeeper(arguments)
    let kept = [signals.raw, link.raw] + (person.debugging?.descriptors ?? [])
    try system { () throws(IOError) in try Hardening.closeOthers(than: Set(kept)) }
    return try Supervised.run(supervised, person, signals, link: link, log)
  }

  /// The worker's end of the link to a new keeper.
  private static func startKeeper(_ arguments: [String]) throws(WorkerError) -> Descriptor {
    try system { () throws(IOError) in
      let pair = try UnixSocket.pair(.packets)
      var command = Command(
        try Folder.target(of: "/proc/self/exe"), ["--keeper"] + arguments)
      command.descriptors = [3: pair.second.raw]
      // A terminal's signals are for the worker.
      command.newSession = true
      _ = try command.start()
      return pair.first
    }
  }

  /// Writes a line to standard output at once, for whoever waits for it.
  static func say(_ line: String) {
    let bytes = Array((ForeignText.shown(line, limit: 8192) + "\n").utf8)
    // Nobody may be listening; that is no reason not to serve.
    _ = Glibc.write(1, bytes, bytes.count)
  }
}
