// SPDX-License-Identifier: Apache-2.0
// dmu-xend: takes up the dmu disks of this host's guests. Arguments only; see Daemon.

import ArgumentParser
import Daemon
import Glibc
import SystemIO

/// dmu-xend.
package enum Program {
  /// Runs the program with the arguments of this process.
  package static func main() async { await DMUXend.main() }
}

struct DMUXend: AsyncParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "dmu-xend",
    abstract: "Serve the dmu disks of this host's Xen guests.",
    discussion: """
      Runs in the foreground and logs to stderr. Ended by SIGTERM it leaves disks and their \
      workers as they are; started again it takes them over. SIGHUP reads the configuration \
      anew.

      Exit status: 0 ended by a signal, 1 an error while it ran, 64 wrong usage, 78 an error in \
      the configuration.
      """,
    version: Version.text)

  @Option(
    name: .shortAndLong, help: "The configuration file.",
    completion: .file(extensions: ["toml"]))
  var config = Configuration.defaultPath

  @Flag(name: .long, help: "Read the configuration, say whether it is good, and end.")
  var check = false

  @Flag(
    name: .long,
    help: ArgumentHelp(
      "Make no devices, only keep their sockets: for tests.", visibility: .hidden))
  var standInDevices = false

  @Option(
    name: .long,
    help: ArgumentHelp(
      "With the former: keep devices of the device-mapper as files here.",
      visibility: .hidden))
  var standInMapper: String?

  @Option(
    name: .long,
    help: ArgumentHelp(
      "The file that is locked so that there is one daemon on this host.", visibility: .hidden))
  var hostLock: String?

  func run() async throws {
    var surroundings = Daemon.Surroundings()
    if standInDevices { surroundings.standIn(mapperFolder: standInMapper) }
    if let hostLock { surroundings.hostLock = hostLock }
    let daemon: Daemon
    do {
      daemon = try Daemon(configurationPath: config, surroundings: surroundings)
    } catch {
      CommandOutput.complain("\(error)")
      throw ExitCode(78)
    }
    guard !check else { return print("\(config): good") }
    do {
      try await daemon.run()
    } catch {
      CommandOutput.complain("\(error)")
      throw ExitCode.failure
    }
  }
}
