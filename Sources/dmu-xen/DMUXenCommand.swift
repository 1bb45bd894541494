// dmu-xen: the admin's command, and what block-dmu calls. Arguments only; see
// Daemon/Command.

import ArgumentParser
import Daemon

@main
struct DMUXenCommand: AsyncParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "dmu-xen",
    abstract: "See to the dmu disks of this host's Xen guests.",
    discussion: """
      Exit status: 0 done, 1 failed, 2 dmu-xend is not running, 3 there is no such disk, 64 \
      wrong usage.
      """,
    version: DMUXen.version,
    subcommands: [Status.self, Specs.self, Doctors.self, Reload.self, Hotplug.self])
}

struct Place: ParsableArguments {
  @Option(name: .shortAndLong, help: "The daemon's configuration file.")
  var config = Configuration.defaultPath

  @Option(
    name: .long, help: "The control socket, if it is not the one of the configuration.")
  var socket: String?

  var client: ClientCommands { ClientCommands(configurationPath: config, socket: socket) }
}

extension ParsableCommand {
  /// Ends with the status of a command.
  func end(_ status: CommandStatus) throws {
    if status != .done { throw ExitCode(status.rawValue) }
  }
}

struct Status: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Show the disks and how they are.",
    discussion: """
      One line a disk. Below the table stands a line for each disk that is not well. Exit \
      status: 0, 1 failed, 2 dmu-xend is not running, 3 DOMAIN has no dmu disk.
      """)

  @OptionGroup var place: Place

  @Argument(help: "Only the disks of this domain, by number or name.")
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

    @Argument(help: "The spec: dmu:FORMAT[?OPTION=VALUE]:STORE[:BASE]")
    var spec: String

    func run() throws { try end(SpecCommand.check(spec)) }
  }
}

struct Doctors: AsyncParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "doctor", abstract: "Say what is missing on this host for dmu disks to work.",
    discussion: "Exit status: 0 nothing is missing, 1 something is.")

  @OptionGroup var place: Place

  func run() async throws {
    try end(await Doctor(configurationPath: place.config, socket: place.socket).examine())
  }
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
    @Argument(help: "The backend's path in xenstore, as in XENBUS_PATH.")
    var path: String

    func run() throws { try end(place.client.add(path)) }
  }

  struct Remove: ParsableCommand {
    static let configuration = CommandConfiguration(
      abstract: "Say that the toolstack is done with a disk.",
      discussion: "Exit status: 0, also when dmu-xend is not running; it sees by itself later.")
    @OptionGroup var place: Place
    @Argument(help: "The backend's path in xenstore, as in XENBUS_PATH.")
    var path: String

    func run() throws { try end(place.client.remove(path)) }
  }
}
