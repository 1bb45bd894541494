// SPDX-License-Identifier: Apache-2.0
// cowd: one disk, served from its image. Arguments only; the work is in Worker.

import ArgumentParser
import Glibc
import SystemIO
import Worker
import WorkerLink

/// What a write does that finds no space.
extension CompletionKind {
  /// The names of formats and of the plugins that are installed.
  static let formatsAndPlugins = CompletionKind.custom { words, _, _ in
    FormatName.all + FormatName.plugins(in: words.value(after: "--plugins"))
  }
  /// unix:PATH.
  static let socket = CompletionKind.custom { words, index, _ in
    let prefix = "unix:"
    guard words.indices.contains(index), words[index].hasPrefix(prefix) else { return [prefix] }
    return Folder.paths(beginning: String(words[index].dropFirst(prefix.count)))
      .map { prefix + $0 }
  }
}

enum OnFull: String, ExpressibleByArgument, CaseIterable {
  case wait, fail
}

/// cowd.
package enum Program {
  /// Runs the program with the arguments of this process.
  package static func main() { Cowd.main() }
}

struct Cowd: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "cowd",
    abstract: "Serves a disk image as a block device.",
    usage: """
      cowd -p FORMAT NAME STORE
      cowd -p FORMAT --nbd unix:PATH STORE
      """,
    discussion: """
      With NAME the disk appears as /dev/mapper/NAME: by the device-mapper's target \
      'userspace' if its module is there, else by the kernel's nbd driver (both need root). \
      With --nbd it is served on a Unix socket, which needs no rights:

        dscow_tool -c my.dscow base.img
        cowd -p dscow --nbd unix:/tmp/my.sock my.dscow

      cowd stays in the foreground. SIGTERM or SIGINT ends it: everything written is made \
      durable first, and the device or the socket is removed. What a flush has confirmed \
      survives even SIGKILL and a power cut. See cowd(8).
      """,
    version: Version.text)

  @Option(
    name: [.customShort("p"), .customLong("format")],
    help: "The image's format, or a plugin's name.", completion: .formatsAndPlugins)
  var format: String?

  @Option(
    name: .long,
    help: ArgumentHelp("Serve NBD on a Unix socket at PATH.", valueName: "unix:PATH"),
    completion: .socket)
  var nbd: String?

  @Option(
    name: .long,
    help: ArgumentHelp("The base, instead of the one that the store names.", valueName: "path"),
    completion: .file())
  var base: String?

  @Option(
    name: .long, help: "How a device reaches the kernel: auto, dm or nbd.",
    completion: .list(Transport.allCases.map(\.rawValue)))
  var transport = "auto"

  @Option(
    name: .long,
    help: ArgumentHelp("The base's format, whatever the store says.", valueName: "format"),
    completion: .list(FormatName.all))
  var baseFormat: String?

  @Flag(name: .long, help: "Accept a base that has changed, and note it anew.")
  var force = false

  @Option(
    name: .long,
    help: ArgumentHelp(
      "Where plugins are (/usr/lib/dmu-xen/plugins).", valueName: "folder"),
    completion: .directory)
  var plugins: String?

  @Option(
    name: .long,
    help: ArgumentHelp(
      "Write every fault and answer to this file; - for standard error.", valueName: "file"),
    completion: .file())
  var trace: String?

  @Option(
    name: .long,
    help: ArgumentHelp(
      "Hold every write until this named pipe lets it go.", valueName: "pipe"),
    completion: .file())
  var hold: String?

  @Option(
    name: .long,
    help: ArgumentHelp(
      "What a write does that finds no space: 'wait' for some, or 'fail'.", valueName: "what"))
  var onFull = OnFull.wait

  @Flag(name: .long, help: "Serve the disk for reading only.")
  var readOnly = false

  @Flag(name: [.customShort("v"), .long], help: "Log more; twice, much more.")
  var verbose: Int

  @Flag(name: .long, help: ArgumentHelp("Started by dmu-xend.", visibility: .private))
  var supervised = false

  @Option(name: .long, help: ArgumentHelp("The user to become.", visibility: .private))
  var uid: UInt32 = 65534

  @Option(name: .long, help: ArgumentHelp("The group to become.", visibility: .private))
  var gid: UInt32 = 65534

  @Option(name: .long, help: ArgumentHelp("The most files.", visibility: .private))
  var files: UInt64 = 256

  @Flag(name: .long, help: "Open no file that the image names; --base may name one.")
  var untrusted = false

  @Option(
    name: .long,
    help: ArgumentHelp(
      "A file or folder outside the store's folder that the image may have written. Again for more.",
      valueName: "path"),
    completion: .file())
  var allow: [String] = []

  @Flag(name: .long, help: "Do not cage the process that reads the image: for debugging.")
  var noSandbox = false

  @Flag(name: .long, help: ArgumentHelp("The keeper of a worker.", visibility: .private))
  var keeper = false

  @Argument(help: "NAME (not with --nbd), and the path of the STORE.", completion: .file())
  var operands: [String] = []

  func validate() throws {
    guard !supervised else { return }
    guard format != nil else { throw ValidationError("Say the image's format: -p dscow.") }
    guard Transport(rawValue: transport) != nil else {
      throw ValidationError("'\(transport)' is no transport: say auto, dm or nbd.")
    }
    if let nbd {
      guard nbd.hasPrefix("unix:"), nbd != "unix:" else {
        throw ValidationError("'\(nbd)' is no place to serve at: write --nbd unix:PATH.")
      }
      guard operands.count == 1 else { throw ValidationError("With --nbd, say only the STORE.") }
    } else {
      guard operands.count == 2 else {
        throw ValidationError("Say the NAME of the device and the STORE, or --nbd unix:PATH.")
      }
    }
  }

  func run() throws {
    guard !supervised else {
      var options = SupervisedOptions()
      options.uid = uid
      options.gid = gid
      options.files = files
      options.isCaged = !noSandbox
      options.level = verbose > 0 ? .debug : .info
      throw ExitCode(Supervised.run(options, version: Version.text))
    }
    let service: ByHandOptions.Service =
      if let nbd { .socket(path: String(nbd.dropFirst("unix:".count))) } else {
        .device(name: operands[0])
      }
    var options = ByHandOptions(
      format: format ?? "", store: operands[operands.count - 1], service: service)
    options.base = base
    options.baseFormat = baseFormat
    options.force = force
    options.plugins = plugins
    options.trace = trace
    options.hold = hold
    options.readOnly = readOnly
    options.untrusted = untrusted
    options.allowed = allow
    options.isCaged = !noSandbox
    options.failsWhenFull = onFull == .fail
    options.transport = Transport(rawValue: transport) ?? .auto
    options.level = verbose > 1 ? .debug : verbose > 0 ? .info : .warning
    guard !keeper else { throw ExitCode(Keeper.run(options, link: 3)) }
    let status: Int32
    do {
      status = try ByHand.run(options, arguments: Array(CommandLine.arguments.dropFirst()))
    } catch {
      Log(level: .error, journal: Log.underJournal)(.error, "\(error)")
      throw ExitCode.failure
    }
    throw ExitCode(status)
  }
}
