// SPDX-License-Identifier: Apache-2.0
// `dmu-xen doctor`: everything that a dmu disk needs of its host, one check after the
// other, each with what to do when it fails, and disks in trouble and what is left of former ones.
// Changes nothing but what `clean` was told to.

import Glibc
internal import LinuxBlock
internal import SystemIO
internal import WorkerLink
internal import XenStore

/// Examines a host.
package struct Doctor: Sendable {
  /// What one check found.
  package struct Finding: Sendable, Equatable {
    /// What was examined.
    package let what: String
    /// What is wrong; nil when nothing is.
    package let trouble: String?
    /// What to do about it.
    package let remedy: String

    /// How a finding with trouble begins.
    package enum Kind: String, Sendable {
      /// Something that disks need.
      case missing = "MISSING"
      /// A disk, or what is left of one.
      case trouble = "TROUBLE"
      /// Something that only some guests need.
      case note = "note"
    }

    /// What trouble is to be called.
    package let kind: Kind

    init(_ what: String, _ trouble: String?, remedy: String, _ kind: Kind = .missing) {
      self.what = what
      self.trouble = trouble
      self.remedy = remedy
      self.kind = kind
    }

    /// Whether an admin has to do something.
    var isBad: Bool { trouble != nil && kind != .note }

    /// One line, and a second with the remedy when something is wrong.
    var text: String {
      guard let trouble else { return "ok       \(what)\n" }
      let word = kind.rawValue.padding(toLength: 9)
      return "\(word)\(what): \(trouble)\n" + (remedy.isEmpty ? "" : "         \(remedy)\n")
    }
  }

  let configurationPath: String
  private let socket: String?
  /// Stands before every path, in tests.
  let root: String

  /// A doctor for the host, with the daemon of a configuration file or of a socket.
  package init(configurationPath: String, socket: String?, root: String = "") {
    self.configurationPath = configurationPath
    self.socket = socket
    self.root = root
  }

  /// Prints what was found.
  package func examine() async -> CommandStatus {
    let findings = await findings()
    for finding in findings { CommandOutput.say(finding.text) }
    let bad = findings.count { $0.isBad }
    CommandOutput.say(
      bad == 0 ? "nothing is missing\n" : "\(bad) of \(findings.count) checks failed\n")
    return bad == 0 ? .done : .failed
  }

  /// Offers to remove what is left of disks that are no more, one by one.
  package func clean() -> CommandStatus {
    do throws(DiskFailure) {
      let leftovers = try ask(ControlRequest(.leftovers)).leftovers ?? []
      if leftovers.isEmpty { CommandOutput.say("nothing is left\n") }
      var kept = 0
      for leftover in leftovers {
        let loss = leftover.loses.map { " WITH IT GOES: \($0)." } ?? ""
        guard Terminal.confirms("\(leftover.name): \(leftover.what).\(loss)") else {
          kept += 1
          continue
        }
        _ = try ask(ControlRequest(.clean, target: leftover.name))
      }
      return kept == 0 ? .done : .failed
    } catch {
      CommandOutput.complain(error.sentence)
      return error == .daemonNotRunning ? .noDaemon : .failed
    }
  }

  private func ask(_ request: ControlRequest) throws(DiskFailure) -> ControlReply {
    var configuration = Configuration()
    if socket == nil {
      do throws(ConfigurationError) {
        configuration = try Configuration.load(configurationPath)
      } catch { throw DiskFailure(.daemon, "\(error)") }
    }
    let client = try ControlClient(path: socket ?? configuration.controlSocket)
    return try client.ask(request, within: .seconds(30))
  }

  /// Every check, in the order in which a disk comes to need it.
  package func findings() async -> [Finding] {
    var configuration = Configuration()
    var findings: [Finding] = [rights()]
    do throws(ConfigurationError) {
      configuration = try Configuration.load(configurationPath)
      let isThere = access(configurationPath, F_OK) == 0
      let what = "the configuration \(configurationPath)"
      findings.append(
        Finding(isThere ? what : what + " (no such file: the defaults hold)", nil, remedy: ""))
    } catch {
      findings.append(
        Finding("configuration", "\(error)", remedy: "correct it, then run: dmu-xen reload"))
    }
    findings += [dom0(), await xenStore()]
    findings.append(module("xen_blkback", "xen-blkback", "guests' disks"))
    findings += devices(configuration.transport)
    findings += hooks()
    findings += [worker(configuration), runDirectory(configuration)]
    findings += probing() + keptDisks() + sources()
    let daemon = daemon(configuration)
    findings.append(daemon)
    if daemon.trouble == nil { findings += inUse() }
    return findings
  }

  /// Disks in trouble, workers with too many rights, and what is left of former disks.
  private func inUse() -> [Finding] {
    do throws(DiskFailure) {
      let disks = try ask(ControlRequest(.status)).disks ?? []
      var findings = disks.compactMap { disk -> Finding? in
        guard ![.ready, .pending, .inactive].contains(disk.state) else { return nil }
        let forget = "dmu-xen forget \(disk.target) takes it out of status"
        return Finding(
          "the \(disk.words)",
          "\(disk.state.rawValue)\(disk.error.map { ": \($0)" } ?? "")",
          remedy: disk.note == nil ? "" : forget, .trouble)
      }
      if findings.isEmpty { findings = [Finding("the disks (\(disks.count))", nil, remedy: "")] }
      findings += disks.compactMap(\.worker).compactMap(sandbox)
      findings += check(Set(disks.flatMap { $0.sources ?? [] }.compactMap { Source($0.source) }))
      let leftovers = try ask(ControlRequest(.leftovers)).leftovers ?? []
      findings += leftovers.map {
        Finding("left over: \($0.name)", $0.what, remedy: "dmu-xen doctor --clean", .trouble)
      }
      if leftovers.isEmpty { findings.append(Finding("leftovers: none", nil, remedy: "")) }
      return findings
    } catch { return [Finding("the disks", error.sentence, remedy: "")] }
  }

  /// What a worker may that it should not; nil when all is well. Source: proc_pid_status(5).
  func sandbox(_ pid: Int32) -> Finding? {
    let what = "the worker \(pid)"
    let remedy = "kill \(pid): dmu-xend replaces it; 'dmu-xen status' names its disk"
    do throws(IOError) {
      let lines = try TextFile.read(root + "/proc/\(pid)/status").split(separator: "\n")
      func field(_ name: String) -> String {
        lines.first { $0.hasPrefix(name + ":") }
          .map { $0.dropFirst(name.count + 1).trimmingBlanks } ?? ""
      }
      var faults: [String] = []
      if field("Uid").split(separator: "\t").contains("0") { faults.append("it runs as root") }
      if field("CapEff").contains(where: { $0 != "0" }) { faults.append("it has capabilities") }
      if field("NoNewPrivs") == "0" { faults.append("it may gain privileges") }
      guard !faults.isEmpty else { return nil }
      return Finding(what, faults.joined(separator: ", "), remedy: remedy, .trouble)
    } catch {
      // It has just ended.
      if error.code == ENOENT || error.code == ESRCH { return nil }
      return Finding(what, error.description, remedy: remedy, .trouble)
    }
  }

  private func rights() -> Finding {
    Finding(
      "the rights of root", geteuid() == 0 ? nil : "this is user \(geteuid())",
      remedy: "run dmu-xen doctor as root: other checks may be wrong without")
  }

  private func dom0() -> Finding {
    let path = root + "/proc/xen/capabilities"
    let remedy = "boot Xen, and mount its file system: mount -t xenfs xenfs /proc/xen"
    let what = "Xen, and this domain in control"
    do throws(IOError) {
      let text = try TextFile.read(path)
      return Finding(
        what, text.contains("control_d") ? nil : "\(path) does not name control_d",
        remedy: remedy)
    } catch { return Finding(what, error.description, remedy: remedy) }
  }

  private func xenStore() async -> Finding {
    let remedy = "start xenstored (systemctl start xen), or look at its log"
    do throws(XenStoreError) {
      var wish = XenStoreClient.Configuration()
      wish.deadline = .seconds(2)
      let client = try XenStoreClient(wish)
      defer { client.close() }
      _ = try await client.listIfPresent("/")
      return Finding("xenstored", nil, remedy: remedy)
    } catch { return Finding("xenstored", "\(error)", remedy: remedy) }
  }

  private func module(_ directory: String, _ name: String, _ purpose: String) -> Finding {
    let there = access(root + "/sys/module/" + directory, F_OK) == 0
    return Finding(
      "the driver \(name) (\(purpose))", there ? nil : "it is not loaded",
      remedy: "modprobe \(name)")
  }

  /// The ways to the kernel: the one that is forced, or the better one and the other.
  private func devices(_ transport: Transport) -> [Finding] {
    switch transport {
    case .nbd: [netBlock()]
    case .dm: [target(isNeeded: true)]
    case .auto: [target(isNeeded: false), netBlock()]
    }
  }

  private func target(isNeeded: Bool) -> Finding {
    let what = "the target userspace (devices by the device-mapper)"
    let remedy = "dkms install dm-userspace/\(Version.text), then: modprobe dm-userspace"
    do throws(DeviceMapperError) {
      if try KernelMapper().isAvailable() { return Finding(what, nil, remedy: remedy) }
      guard isNeeded else {
        return Finding(what + ": not there, so that disks go by nbd", nil, remedy: remedy)
      }
      return Finding(what, "the kernel has none of version 1", remedy: remedy)
    } catch { return Finding(what, "\(error)", remedy: remedy) }
  }

  private func netBlock() -> Finding {
    let what = "the driver nbd (the daemon's devices)"
    let remedy = "modprobe nbd nbds_max=0 max_part=0, and add nbd to /etc/modules-load.d/"
    do throws(IOError) {
      return Finding(
        what, try NBDDevice.isAvailable() ? nil : "it is not loaded", remedy: remedy)
    } catch { return Finding(what, error.description, remedy: remedy) }
  }

  private func worker(_ configuration: Configuration) -> Finding {
    let remedy = "install cowd beside dmu-xend, or set worker.program in \(configurationPath)"
    if configuration.sandbox == .off {
      return Finding(
        "the worker", "it would run outside of its cage, with a view of the whole host",
        remedy: "take worker.sandbox = \"off\" out of \(configurationPath)")
    }
    do throws(IOError) {
      let program = try ProcessLauncher.program(configuration)
      return Finding("the worker \(program)", nil, remedy: remedy)
    } catch { return Finding("the worker", error.description, remedy: remedy) }
  }

  private func runDirectory(_ configuration: Configuration) -> Finding {
    let path = root + configuration.runDirectory
    let what = "the run directory \(path)"
    var status = stat()
    guard stat(path, &status) == 0 else {
      return Finding(
        what, IOError.last("examine", path).description, remedy: "dmu-xend makes it: start it")
    }
    let bits = String(status.st_mode & 0o7777, radix: 8)
    let good = status.st_mode & 0o066 == 0 && status.st_uid == 0
    return Finding(
      what, good ? nil : "its owner is \(status.st_uid), its mode 0\(bits)",
      remedy: "chown root \(path); chmod 0711 \(path)")
  }

  private func daemon(_ configuration: Configuration) -> Finding {
    do throws(DiskFailure) {
      let client = try ControlClient(path: socket ?? configuration.controlSocket)
      let reply = try client.ask(ControlRequest(.version), within: .seconds(5))
      let same = reply.version == Version.text
      return Finding(
        "the daemon",
        same
          ? nil
          : "it is version \(reply.version ?? "unknown"), this is"
            + " \(Version.text)",
        remedy: "systemctl restart dmu-xend (disks go on meanwhile)")
    } catch {
      return Finding(
        "the daemon", error == .daemonNotRunning ? "dmu-xend is not running" : error.sentence,
        remedy: "systemctl start dmu-xend, and to have it at every boot: systemctl enable dmu-xend")
    }
  }
}

extension String {
  /// With blanks up to a length.
  fileprivate func padding(toLength length: Int) -> String {
    self + String(repeating: " ", count: max(0, length - count))
  }
}

extension Substring {
  /// Without blanks and tabs at its ends.
  fileprivate var trimmingBlanks: String {
    var text = self
    while let first = text.first, first == " " || first == "\t" { text.removeFirst() }
    while let last = text.last, last == " " || last == "\t" { text.removeLast() }
    return String(text)
  }
}
