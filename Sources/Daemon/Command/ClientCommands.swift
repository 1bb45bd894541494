// SPDX-License-Identifier: Apache-2.0
// The commands that ask the daemon.

import Glibc
internal import SystemIO

/// Commands over the control socket.
package struct ClientCommands: Sendable {
  /// How long a block script waits for a daemon that is just being started.
  static let patience = Duration.seconds(10)
  /// How long a block script waits in all; libxl kills it after 40 seconds.
  static let scriptLimit = Duration.seconds(36)

  let socket: String
  /// The named disks that are kept over a reboot.
  let diskFiles: DiskFiles

  /// Commands to the daemon of a configuration file, or of a socket given by name. A file
  /// with errors is the daemon's trouble: then the socket is looked for at its usual place.
  package init(configurationPath: String, socket: String?) {
    diskFiles = DiskFiles(configurationPath: configurationPath)
    if let socket {
      self.socket = socket
    } else {
      let configuration: Configuration
      do { configuration = try Configuration.load(configurationPath) } catch {
        configuration = Configuration()
      }
      self.socket = configuration.controlSocket
    }
  }

  /// Prints the disks, as a table or as JSON.
  package func status(domain: String?, json: Bool) -> CommandStatus {
    run { () throws(DiskFailure) in
      let disks = try fetch(domain)
      CommandOutput.say(try ClientCommands.render(disks, json: json))
      if disks.isEmpty, domain != nil { return .noDisk }
      return .done
    }
  }

  /// Prints the disks every two seconds, a terminal cleared before each. Ends with the daemon.
  package func watch(domain: String?, json: Bool) -> CommandStatus {
    run { () throws(DiskFailure) in
      while true {
        let text = try ClientCommands.render(try fetch(domain), json: json)
        CommandOutput.clear()
        CommandOutput.say(text)
        sleep(2)
      }
    }
  }

  /// Prints metrics of all disks, or replaces a file with them. A reader of the file sees the old
  /// text or the new one.
  package func metrics(_ format: MetricsFormat, output: String?) -> CommandStatus {
    run { () throws(DiskFailure) in
      let text = MetricsText.render(try fetchMetrics(nil), format)
      guard let output else {
        CommandOutput.say(text)
        return .done
      }
      do throws(IOError) { try TextFile.replace(output, with: text, mode: 0o644) } catch {
        throw DiskFailure(
          .daemon, "\(error.description): give a file in a directory that this user may write to")
      }
      return .done
    }
  }

  /// The disks of a domain, or all, with what is measured of them.
  func fetchMetrics(_ domain: String?) throws(DiskFailure) -> [DiskStatus] {
    try ask(ControlRequest(.metrics, domain: domain), .seconds(10)).disks ?? []
  }

  /// Has the configuration read anew.
  package func reload() -> CommandStatus {
    run { () throws(DiskFailure) in
      _ = try ControlClient(path: socket).ask(ControlRequest(.reload), within: .seconds(10))
      return .done
    }
  }

  /// A block script's `add`. A daemon that is started again meanwhile is asked again.
  /// `boots`: the domain is known to boot.
  package func add(_ path: String, boots: Bool) -> CommandStatus {
    let end = ContinuousClock.now + ClientCommands.scriptLimit
    return run(withoutDaemon: " and attach the disk again") { () throws(DiskFailure) in
      while true {
        do throws(DiskFailure) {
          let client = try ControlClient.connect(
            path: socket, patience: ClientCommands.patience)
          let reply = try client.ask(
            ControlRequest(.attach, path: path, boots: boots), within: end - .now)
          guard let device = reply.device else { throw DiskFailure.daemonGone }
          CommandOutput.say("\(device.number) \(device.path)\n")
          return .done
        } catch {
          let restarting = error == .daemonGone || error == .ending
          guard restarting, end - .now > ClientCommands.patience else { throw error }
        }
      }
    }
  }

  /// A block script's `remove`: always done, for the daemon cleans up by what it sees.
  package func remove(_ path: String) -> CommandStatus {
    do throws(DiskFailure) {
      let client = try ControlClient(path: socket)
      _ = try client.ask(ControlRequest(.detach, path: path), within: .seconds(5))
    } catch {
      CommandOutput.complain("\(error): the disk is taken down when dmu-xend sees it is gone")
    }
    return .done
  }

  /// Commits the pending logs of a store, or all for nil.
  package func recover(_ store: String?, json: Bool) -> CommandStatus {
    run { () throws(DiskFailure) in
      let stores = try ask(ControlRequest(.recover, store: store), .seconds(300)).stores ?? []
      if json {
        CommandOutput.say(try ClientCommands.pretty(stores))
      } else {
        for one in stores where one.error == nil {
          CommandOutput.say("store \(one.store) is complete (\(one.holds))\n")
        }
        for one in stores {
          if let error = one.error {
            CommandOutput.complain("store \(one.store) keeps its log (\(one.holds)): \(error)")
          }
        }
        if stores.isEmpty { CommandOutput.say("nothing to recover\n") }
      }
      if stores.isEmpty, store != nil { return .noDisk }
      return stores.allSatisfy { $0.error == nil } ? .done : .failed
    }
  }

  /// Gives up what a store's pending log holds. `confirmed`: without asking.
  package func discard(_ store: String, confirmed: Bool, json: Bool) -> CommandStatus {
    run { () throws(DiskFailure) in
      let limit = Duration.seconds(10)
      guard let held = try ask(ControlRequest(.pending, store: store), limit).stores?.first else {
        return .noDisk
      }
      let question =
        "store \(held.store): \(held.holds) would be lost, which a guest believes to be written."
      if !confirmed, !Terminal.confirms(question) {
        CommandOutput.complain("nothing was changed (--yes does it without asking)")
        return .failed
      }
      let lost = try ask(ControlRequest(.discard, store: store), limit).stores ?? []
      if json { CommandOutput.say(try ClientCommands.pretty(lost)) }
      if !json {
        CommandOutput.say("store \(held.store): lost \(lost.first?.holds ?? "nothing")\n")
      }
      return .done
    }
  }

  /// Says that the errors of a disk or a domain were seen to.
  package func clear(_ target: String, json: Bool) -> CommandStatus {
    run { () throws(DiskFailure) in
      let disks = try ask(ControlRequest(.clear, target: target), .seconds(15)).disks ?? []
      CommandOutput.say(try ClientCommands.render(disks, json: json))
      return disks.isEmpty ? .noDisk : .done
    }
  }

  /// Has failed attaches forgotten; all for nil.
  package func forget(_ target: String?) -> CommandStatus {
    run { () throws(DiskFailure) in
      let count = try ask(ControlRequest(.forget, target: target), .seconds(10)).count ?? 0
      CommandOutput.say("forgot \(count) failed attach\(count == 1 ? "" : "es")\n")
      return count == 0 && target != nil ? .noDisk : .done
    }
  }

  func ask(
    _ request: ControlRequest, _ limit: Duration
  ) throws(DiskFailure) -> ControlReply {
    try ControlClient(path: socket).ask(request, within: limit)
  }

  static func pretty(_ value: some Encodable) throws(DiskFailure) -> String {
    do { return try ControlLine.pretty(value) + "\n" } catch {
      throw DiskFailure(.daemon, "the answer cannot be written as JSON: \(error)")
    }
  }

  private func fetch(
    _ domain: String?, within limit: Duration = .seconds(10)
  ) throws(DiskFailure) -> [DiskStatus] {
    try ask(ControlRequest(.status, domain: domain), limit).disks ?? []
  }

  /// The disks, for a shell that completes a word: none where they cannot be had at once.
  func disksForCompletion() -> [DiskStatus] {
    do throws(DiskFailure) { return try fetch(nil, within: .seconds(2)) } catch { return [] }
  }

  private static func render(
    _ disks: [DiskStatus], json: Bool
  ) throws(DiskFailure) -> String {
    json ? try pretty(disks) : StatusTable.render(disks)
  }

  /// `withoutDaemon`: what is to be done beside starting the daemon, when that is missing.
  func run(
    withoutDaemon more: String = "", _ body: () throws(DiskFailure) -> CommandStatus
  ) -> CommandStatus {
    do throws(DiskFailure) { return try body() } catch {
      CommandOutput.complain(error.sentence + (error == .daemonNotRunning ? more : ""))
      if error.code == .gone { return .noDisk }
      return error == .daemonNotRunning ? .noDaemon : .failed
    }
  }
}
