// SPDX-License-Identifier: Apache-2.0
// top and log: what disks do now, and what was said of one.

import Glibc
internal import SystemIO

extension ClientCommands {
  /// Prints what disks do, again after each interval; a terminal is cleared before. `once`: one
  /// interval only. Ends with the daemon.
  package func top(domain: String?, seconds: Int, once: Bool, json: Bool) -> CommandStatus {
    run { () throws(DiskFailure) in
      var before = try fetchMetrics(domain)
      var last = ContinuousClock.now
      if before.isEmpty, domain != nil { return .noDisk }
      let isTerminal = isatty(1) == 1
      if isTerminal, !once, !json {
        TerminalScreen.show(DiskRates.between([], before, seconds: 1))
      }
      while true {
        sleep(UInt32(seconds))
        let disks = try fetchMetrics(domain)
        let now = ContinuousClock.now
        let rates = DiskRates.between(before, disks, seconds: (now - last) / .seconds(1))
        (before, last) = (disks, now)
        if json {
          CommandOutput.say(try ClientCommands.pretty(rates))
        } else if isTerminal, !once {
          TerminalScreen.show(rates)
        } else {
          CommandOutput.say(RatesTable.render(rates, width: TerminalScreen.size?.width))
        }
        if once { return .done }
      }
    }
  }

  /// Shows what dmu-xend and the disk's workers have logged of a disk since the host booted, by
  /// journalctl(1), which takes this process's place. `since`: as journalctl's.
  package func log(_ target: String, follow: Bool, since: String?) -> CommandStatus {
    run(withoutDaemon: " or name the disk by its numbers, as in 5-51712, or its path") {
      () throws(DiskFailure) in
      var disks: [DiskID] = []
      if let vbd = VBD(target) {
        disks = [.vbd(vbd)]
      } else if let name = DiskName(path: target) {
        disks = [.named(name)]
      } else {
        let known = try ask(ControlRequest(.status), .seconds(10)).disks ?? []
        let meant = known.filter { $0.isMeant(by: target) }
        disks = meant.map(\.id) + meant.compactMap { $0.identity.flatMap { DiskID($0) } }
      }
      guard !disks.isEmpty else {
        throw DiskFailure(
          .gone,
          "there is no disk '\(ForeignText.shown(target))': one that has gone is named by its"
            + " numbers, as in 5-51712, or by its path, as in /dev/dmu/NAME")
      }
      // What a name may hold and a pattern takes for something else.
      let names = Set(disks.map { "\($0)" }).sorted().joined(separator: "|")
        .replacing(".", with: "\\.").replacing("+", with: "\\+")
      // Every line of daemon and worker about a disk has this fact, followed by another or nothing.
      var words = [
        "journalctl", "--unit=dmu-xend.service", "--grep= disk=(\(names))( |$)",
      ]
      words += since.map { ["--since=\($0)"] } ?? ["--boot"]
      if follow { words += ["--follow", "--no-tail"] }
      throw ClientCommands.become(words)
    }
  }

  /// Has another program take this process's place; answers why it could not.
  private static func become(_ words: [String]) -> DiskFailure {
    let error = ProgramName.become(words)
    return DiskFailure(
      .daemon,
      "\(error): the log is what dmu-xend"
        + " writes to its standard error; without a journal, look where that goes")
  }
}

/// The terminal at standard output.
enum TerminalScreen {
  /// Columns and lines; nil when there is no terminal.
  static var size: (width: Int, height: Int)? {
    var size = winsize()
    guard ioctl(1, UInt(TIOCGWINSZ), &size) == 0, size.ws_col > 0, size.ws_row > 0 else {
      return nil
    }
    return (Int(size.ws_col), Int(size.ws_row))
  }

  /// Clears it and shows the rates.
  static func show(_ rates: [DiskRates]) {
    let size = size
    CommandOutput.clear()
    CommandOutput.say(RatesTable.render(rates, width: size?.width, height: size?.height))
  }
}
