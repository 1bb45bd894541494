// SPDX-License-Identifier: Apache-2.0
// dmu-xen: the admin's command, and what block-dmu calls. Arguments only; see
// Daemon/Command.

import ArgumentParser
import Daemon
import SystemIO

/// dmu-xen.
package enum Program {
  /// Runs the program with the arguments of this process.
  package static func main() async { await DMUXenCommand.main() }
}

struct DMUXenCommand: AsyncParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "dmu-xen",
    abstract: "See to the dmu disks of this host's Xen guests.",
    discussion: """
      Exit status: 0 done, 1 failed, 2 dmu-xend is not running, 3 there is no such disk or store, \
      64 wrong usage.
      """,
    version: Version.text,
    subcommands: [
      Attach.self, Detach.self, Activate.self, Deactivate.self, Status.self, Top.self, Logs.self,
      Metrics.self, Specs.self,
      Doctors.self, Reload.self,
      Recover.self, Discard.self, Clear.self, Forget.self, Tables.self, Hotplug.self, Libvirt.self,
    ])
}

extension CompletionKind {
  /// Words of a kind that the daemon knows; `more`: others.
  static func known(_ kind: CompletionWords.Kind, _ more: String...) -> CompletionKind {
    .custom { words, _, _ in CompletionWords.offered(kind, commandLine: words) + more }
  }
  /// A configuration file.
  static let configuration = CompletionKind.file(extensions: ["toml"])
}

struct Place: ParsableArguments {
  @Option(
    name: .shortAndLong, help: "The daemon's configuration file.", completion: .configuration)
  var config = Configuration.defaultPath

  @Option(
    name: .long, help: "The control socket, if it is not the one of the configuration.",
    completion: .file())
  var socket: String?

  var client: ClientCommands { ClientCommands(configurationPath: config, socket: socket) }
}

extension ParsableCommand {
  /// Ends with the status of a command.
  func end(_ status: CommandStatus) throws {
    if status != .done { throw ExitCode(status.rawValue) }
  }
}

struct Attach: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Attach a disk under a name; its device is /dev/dmu/NAME.",
    discussion: """
      Waits until the disk is served and prints the path of its device, for a guest's disk line as \
      in phy:/dev/dmu/NAME,xvda,w. Without SPEC the disk is as its file in disks.d says. A disk \
      that is attached in the same way already is no error. Exit status: 0, 1 failed, 2 dmu-xend is \
      not running, 3 NAME has no file.
      """)

  @OptionGroup var place: Place

  @Argument(
    help: "The disk's name. With --all: none.",
    completion: .custom { words, _, _ in CompletionWords.namedDisks(commandLine: words) })
  var name: String?

  @Argument(
    help: "What the disk is made of: dmu:FORMAT[?OPTION=VALUE]:STORE[:BASE]",
    completion: .custom { words, index, _ in
      CompletionWords.specs(
        beginning: words.indices.contains(index) ? words[index] : "", commandLine: words)
    })
  var spec: String?

  @Flag(help: "The disk is only read.")
  var readOnly = false

  @Flag(help: "Create the store if it does not exist.")
  var create = false

  @Option(
    help: "The UUID of the virtual machine that the disk belongs to; shown by status.",
    completion: .list([]))
  var owner: String?

  @Flag(help: "Attach the disk again whenever the host has booted: write its file in disks.d.")
  var persistent = false

  @Flag(
    help: """
      Let udev look for file systems and volumes on the disk: for one that this host itself uses. \
      (default: it does not)
      """)
  var probe = false

  @Flag(
    help: """
      Only keep the disk by its name: without device, worker and lock, until 'dmu-xen activate'. \
      (default: it is served)
      """)
  var inactive = false

  @Flag(help: "Attach every disk that has a file in disks.d.")
  var all = false

  func validate() throws {
    guard !all else {
      guard name == nil, !readOnly, !create, owner == nil, !persistent, !probe, !inactive else {
        throw ValidationError("--all takes no name and no other option of a disk")
      }
      return
    }
    guard name != nil else { throw ValidationError("give the name of a disk, or --all") }
    guard
      spec != nil
        || (!readOnly && !create && owner == nil && !persistent && !probe && !inactive)
    else {
      throw ValidationError("without SPEC, the disk's file in disks.d alone says how the disk is")
    }
    guard !create || !inactive else {
      throw ValidationError("--inactive opens no store, so that --create has no effect with it")
    }
  }

  func run() throws {
    guard let name else { return try end(place.client.attachAll()) }
    var request = NamedRequest(name, spec)
    (request.readOnly, request.create, request.owner) = (readOnly, create, owner)
    (request.isPersistent, request.probe, request.isInactive) = (persistent, probe, inactive)
    try end(place.client.attach(request))
  }
}

struct Detach: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Detach a named disk, also from the disks that come back after a reboot.",
    discussion: """
      Waits until everything is in the store and nothing of the disk is left. Refused while the \
      device is in use. The store stays. Exit status: 0, 1 failed, 2 dmu-xend is not running, 3 \
      there is no such disk.
      """)

  @OptionGroup var place: Place

  @Argument(help: "The disk's name.", completion: .known(.named))
  var name: String

  func run() throws { try end(place.client.detachNamed(name)) }
}

struct Activate: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Serve a named disk that is inactive.",
    discussion: """
      Waits until the disk is served and prints the path of its device. One that is active already \
      is no error. If the disk has a file in disks.d, it is active after a reboot as well. Exit \
      status: 0, 1 failed, 2 dmu-xend is not running, 3 there is no such disk.
      """)

  @OptionGroup var place: Place

  @Argument(help: "The disk's name.", completion: .known(.named))
  var name: String

  func run() throws { try end(place.client.activate(name)) }
}

struct Deactivate: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Take a named disk down and keep its name.",
    discussion: """
      Waits until everything is in the store and nothing of the disk is left but its name: no \
      device, no worker, no lock on the store. Refused while the device is in use. One that is \
      inactive already is no error. If the disk has a file in disks.d, it is inactive after a \
      reboot as well. Exit status: 0, 1 failed, 2 dmu-xend is not running, 3 there is no such disk.
      """)

  @OptionGroup var place: Place

  @Argument(help: "The disk's name.", completion: .known(.named))
  var name: String

  func run() throws { try end(place.client.deactivate(name)) }
}

struct Status: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Show the disks and how they are.",
    discussion: """
      One line a disk. Below the table stands a line for each disk that is not well. Exit \
      status: 0, 1 failed, 2 dmu-xend is not running, 3 DOMAIN has no dmu disk.
      """)

  @OptionGroup var place: Place

  @Argument(
    help: "Only the disks of this domain, by number or name, or a named disk.",
    completion: .known(.domain))
  var domain: String?

  @Flag(help: "Print JSON: an array with an object for each disk.")
  var json = false

  @Flag(name: .shortAndLong, help: "Show it again every two seconds, until interrupted.")
  var watch = false

  func run() throws {
    try end(
      watch
        ? place.client.watch(domain: domain, json: json)
        : place.client.status(domain: domain, json: json))
  }
}

struct Top: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Show what the disks do now, again and again.",
    discussion: """
      Requests and bytes in a second, and how long requests took in the last interval; disks that \
      are not ready first, then the busiest. Exit status: 0, 1 failed, 2 dmu-xend is not running, \
      3 DOMAIN has no dmu disk.
      """)

  @OptionGroup var place: Place

  @Argument(
    help: "Only the disks of this domain, by number or name, or a named disk.",
    completion: .known(.domain))
  var domain: String?

  @Option(
    name: .shortAndLong, help: "Seconds between two looks, 1 to 3600.",
    completion: .list(["1", "2", "10", "60"]))
  var interval = 2

  @Flag(help: "Print one interval and end.")
  var once = false

  @Flag(help: "Print JSON: for each interval an array with an object for each disk.")
  var json = false

  func validate() throws {
    guard (1...3600).contains(interval) else {
      throw ValidationError("--interval takes 1 to 3600 seconds, not \(interval)")
    }
  }

  func run() throws {
    try end(place.client.top(domain: domain, seconds: interval, once: once, json: json))
  }
}

struct Logs: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "log",
    abstract: "Show what dmu-xend and the workers have logged of a disk.",
    discussion: """
      Runs journalctl on the log of dmu-xend.service. Exit status: that of journalctl; 1 it cannot \
      be started, 2 dmu-xend is not running and DISK is no pair of numbers, 3 there is no such disk.
      """)

  @OptionGroup var place: Place

  @Argument(
    help: """
      A disk: 5-51712, 5:xvda, web:xvda, or a named disk by its name or path. Or a domain by \
      number or name.
      """,
    completion: .known(.disk))
  var disk: String

  @Flag(name: .shortAndLong, help: "Show new lines as they come, until interrupted.")
  var follow = false

  @Option(
    help: "From this time on, as journalctl takes it. (default: since the host has booted)",
    completion: .list(["today", "yesterday", "-1h"]))
  var since: String?

  func run() throws { try end(place.client.log(disk, follow: follow, since: since)) }
}

struct Metrics: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Print metrics of all disks for Prometheus.",
    discussion: """
      Where the kernel serves a disk, it measures latencies from the first such question on, and \
      until nobody has asked for metrics.measuring-time (15 minutes). Exit status: 0, 1 failed, 2 dmu-xend is not running.
      """)

  @OptionGroup var place: Place

  @Option(
    help: """
      The format: prometheus (text format 0.0.4, which node_exporter and promtool read) or \
      openmetrics.
      """)
  var format = Format.prometheus

  @Option(
    name: .shortAndLong,
    help: "Replace this file instead, in one step: for node_exporter's textfile collector.",
    completion: .file(extensions: ["prom"]))
  var output: String?

  enum Format: String, ExpressibleByArgument, CaseIterable {
    case prometheus, openmetrics

    var format: MetricsFormat {
      switch self {
      case .prometheus: .prometheus
      case .openmetrics: .openmetrics
      }
    }
  }

  func run() throws { try end(place.client.metrics(format.format, output: output)) }
}

struct Specs: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "spec", abstract: "Understand the specs of disk lines.",
    subcommands: [Check.self])

  struct Check: ParsableCommand {
    static let configuration = CommandConfiguration(
      abstract: "Explain a spec, or say what is wrong with it.",
      discussion: """
        Nothing is opened or changed: what is said of store and base is what is there now. Exit \
        status: 0 the spec is good, 1 it is not.
        """)

    @Argument(
      help: "The spec: dmu:FORMAT[?OPTION=VALUE]:STORE[:BASE]",
      completion: .custom { words, index, _ in
        CompletionWords.specs(
          beginning: words.indices.contains(index) ? words[index] : "", commandLine: words)
      })
    var spec: String

    @Option(
      name: .shortAndLong, help: "The daemon's configuration file.", completion: .configuration)
    var config = Configuration.defaultPath

    func run() throws { try end(SpecCommand.check(spec, configurationPath: config)) }
  }
}

struct Tables: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "table",
    abstract: "Give a mapped device a table, and show those in use.",
    subcommands: [Load.self, Show.self])

  struct Load: ParsableCommand {
    static let configuration = CommandConfiguration(
      abstract: "Make a mapped device of a table, or give it another one.",
      discussion: """
        A line of FILE is START LENGTH TARGET ARGUMENTS, in sectors of 512 bytes, as dmsetup takes \
        it; empty lines and those that begin with # are passed over. Targets: linear, error, zero, \
        striped, mirror, snapshot, delay, flakey, userspace. What is wrong with a line is said by \
        its number and field before anything changes. A device that is there gets the table \
        between two requests. Exit status: 0, 1 failed.
        """)

    @Argument(
      help: "The device's name in /dev/mapper.",
      completion: .custom { _, _, _ in CompletionWords.mappedDevices() })
    var name: String

    @Argument(help: "The file with the table; '-' is stdin.", completion: .file())
    var file: String

    @Flag(name: .shortAndLong, help: "The device is only read.")
    var readOnly = false

    @Flag(help: "Only say whether the table is good.")
    var check = false

    func run() throws {
      try end(TableCommand.load(name, file: file, readOnly: readOnly, onlyChecks: check))
    }
  }

  struct Show: ParsableCommand {
    static let configuration = CommandConfiguration(
      commandName: "status",
      abstract: "Show the tables in use, and in brackets what their targets say.",
      discussion: "Exit status: 0, 1 failed, 3 there is no such device.")

    @Argument(
      help: "The device's name in /dev/mapper. (default: all)",
      completion: .custom { _, _, _ in CompletionWords.mappedDevices() })
    var name: String?

    @Flag(help: "Print JSON: an array with an object for each device.")
    var json = false

    func run() throws { try end(TableCommand.status(name, json: json)) }
  }
}

struct Doctors: AsyncParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "doctor",
    abstract: "Say what is missing on this host for dmu disks to work, and what is left of some.",
    discussion: """
      Exit status: 0 nothing is missing and no disk is in trouble, 1 something is.
      """)

  @OptionGroup var place: Place

  @Flag(help: "Offer to remove what is left of disks that are no more, one by one.")
  var clean = false

  func run() async throws {
    let doctor = Doctor(configurationPath: place.config, socket: place.socket)
    try end(clean ? doctor.clean() : await doctor.examine())
  }
}

struct Recover: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Commit the writes of disks that are no more to their stores.",
    discussion: """
      A disk whose worker did not end well leaves a pending log: acknowledged writes that are not \
      in the store yet. Attaching a disk with that store goes on from the log; this command \
      commits it without a disk. Exit status: 0 all is committed, 1 something is not, 2 dmu-xend \
      is not running, 3 STORE has no pending log.
      """)

  @OptionGroup var place: Place

  @Argument(
    help: "The store's path, or 'all'. (default: all)", completion: .known(.pending, "all"))
  var store = "all"

  @Flag(help: "Print JSON: an array with an object for each store.")
  var json = false

  func run() throws {
    try end(place.client.recover(store == "all" ? nil : store, json: json))
  }
}

struct Discard: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "discard-pending",
    abstract: "Give up the writes that a store's pending log holds.",
    discussion: """
      The guest was told that these writes were done; they are lost. Asks before it does so. Exit \
      status: 0 they are gone, 1 failed or not confirmed, 2 dmu-xend is not running, 3 STORE has \
      no pending log.
      """)

  @OptionGroup var place: Place

  @Argument(
    help: "The store's path, or the log's name as status prints it.",
    completion: .known(.pending))
  var store: String

  @Flag(help: "Do not ask.")
  var yes = false

  @Flag(help: "Print JSON: an array with an object for the store.")
  var json = false

  func run() throws { try end(place.client.discard(store, confirmed: yes, json: json)) }
}

struct Clear: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Say that the cause of a disk's errors was seen to.",
    discussion: """
      After a failed flush every further one fails, since nobody knows what it lost; this lets \
      them succeed again. Counted I/O errors are forgotten, and the disk is ready. Exit status: 0, \
      1 failed, 2 dmu-xend is not running, 3 there is no such disk.
      """)

  @OptionGroup var place: Place

  @Argument(
    help: "A domain by number or name, or a disk: 5-51712, 5:xvda, web:xvda, a named disk.",
    completion: .known(.disk))
  var disk: String

  @Flag(help: "Print JSON: an array with an object for each disk.")
  var json = false

  func run() throws { try end(place.client.clear(disk, json: json)) }
}

struct Forget: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Take attaches that failed out of status.",
    discussion: """
      They stay there until the same disk is attached again, or this. Exit status: 0, 1 failed, 2 \
      dmu-xend is not running, 3 there is none.
      """)

  @OptionGroup var place: Place

  @Argument(
    help: "A domain by number or name, a disk as in 'clear', or 'all'.",
    completion: .known(.failed, "all"))
  var disk: String

  func run() throws { try end(place.client.forget(disk == "all" ? nil : disk)) }
}

struct Reload: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Have the daemon read its configuration anew and try failed disks again.",
    discussion: "An error leaves the running configuration in force, and is printed.")

  @OptionGroup var place: Place

  func run() throws { try end(place.client.reload()) }
}

struct Hotplug: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "The part of the block script block-dmu; not for people.",
    subcommands: [Add.self, Remove.self])

  struct Add: ParsableCommand {
    static let configuration = CommandConfiguration(
      abstract: "Wait until a disk is served and print its device: MAJOR:MINOR PATH.",
      discussion: """
        The numbers are hexadecimal. A failure is one sentence on stderr, and exit status 1, or \
        2 when dmu-xend is not running.
        """)
    @OptionGroup var place: Place
    @Argument(
      help: "The backend's path in xenstore, as in XENBUS_PATH.",
      completion: .list(["backend/vbd/"]))
    var path: String
    @Option(help: "Why the disk is attached: boot, or unknown. Only a boot creates a store.")
    var why = Why.unknown

    enum Why: String, ExpressibleByArgument, CaseIterable { case boot, unknown }

    func run() throws { try end(place.client.add(path, boots: why == .boot)) }
  }

  struct Remove: ParsableCommand {
    static let configuration = CommandConfiguration(
      abstract: "Say that the toolstack is done with a disk.",
      discussion: "Exit status: 0, also when dmu-xend is not running; it sees by itself later.")
    @OptionGroup var place: Place
    @Argument(
      help: "The backend's path in xenstore, as in XENBUS_PATH.",
      completion: .list(["backend/vbd/"]))
    var path: String

    func run() throws { try end(place.client.remove(path)) }
  }
}

struct Libvirt: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "The part of libvirt's hook 50-dmu-xen; not for people.",
    discussion: """
      Reads the domain's XML from standard input. 'prepare' attaches the disks that it names, 'release' \
      detaches those of its UUID, 'reconnect' says what is missing; every other operation does nothing. \
      Only 'prepare' fails: exit status 1, or 2 when dmu-xend is not running.
      """)
  @OptionGroup var place: Place
  @Argument(help: "The domain's name.", completion: .list([]))
  var domain: String
  @Argument(
    help: "What libvirt does with it.", completion: .list(["prepare", "release", "reconnect"]))
  var operation: String
  @Argument(help: "The part of that, and what else libvirt says.", completion: .list([]))
  var more: [String] = []

  func run() throws { try end(place.client.libvirt(operation, descriptor: 0)) }
}
