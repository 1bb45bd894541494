// `dmu-xen doctor`: everything that a dmu disk needs of its host, one check after the
// other, each with what to do when it fails. Changes nothing.

internal import DeviceMapper
internal import Posix
internal import WorkerLink
internal import XenStore
import Glibc

/// Examines a host.
public struct Doctor: Sendable {
  /// What one check found.
  public struct Finding: Sendable, Equatable {
    /// What was examined.
    public let what: String
    /// What is wrong; nil when nothing is.
    public let trouble: String?
    /// What to do about it.
    public let remedy: String

    init(_ what: String, _ trouble: String?, remedy: String) {
      self.what = what
      self.trouble = trouble
      self.remedy = remedy
    }

    /// One line, and a second with the remedy when something is wrong.
    var text: String {
      guard let trouble else { return "ok       \(what)\n" }
      return "MISSING  \(what): \(trouble)\n         \(remedy)\n"
    }
  }

  private let configurationPath: String
  private let socket: String?
  /// Stands before every path, in tests.
  private let root: String

  /// A doctor for the host, with the daemon of a configuration file or of a socket.
  public init(configurationPath: String, socket: String?, root: String = "") {
    self.configurationPath = configurationPath
    self.socket = socket
    self.root = root
  }

  /// Prints what was found.
  public func examine() async -> CommandStatus {
    let findings = await findings()
    for finding in findings { CommandOutput.say(finding.text) }
    let missing = findings.count { $0.trouble != nil }
    CommandOutput.say(
      missing == 0
        ? "nothing is missing\n" : "\(missing) of \(findings.count) checks failed\n")
    return missing == 0 ? .done : .failed
  }

  /// Every check, in the order in which a disk comes to need it.
  public func findings() async -> [Finding] {
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
    findings += [script(), worker(configuration), runDirectory(configuration)]
    findings.append(daemon(configuration))
    return findings
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
    let remedy = "dkms install dm-userspace/1.0, then: modprobe dm-userspace"
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

  private func script() -> Finding {
    let path = root + "/etc/xen/scripts/block-dmu"
    let error = access(path, X_OK) == 0 ? nil : IOError.last("run", path).description
    return Finding(
      "the block script", error, remedy: "install hotplug/block-dmu there, mode 0755")
  }

  private func worker(_ configuration: Configuration) -> Finding {
    let remedy = "install cowd beside dmu-xend, or set worker.program in \(configurationPath)"
    if configuration.workerUser == 0 {
      return Finding(
        "the worker", "it would run as root",
        remedy: "set worker.user in \(configurationPath) to 65534")
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
    let good = status.st_mode & 0o077 == 0 && status.st_uid == 0
    return Finding(
      what, good ? nil : "its owner is \(status.st_uid), its mode 0\(bits)",
      remedy: "chown root \(path); chmod 0700 \(path)")
  }

  private func daemon(_ configuration: Configuration) -> Finding {
    do throws(DiskFailure) {
      let client = try ControlClient(path: socket ?? configuration.controlSocket)
      let reply = try client.ask(ControlRequest(.version), within: .seconds(5))
      let same = reply.version == DMUXen.version
      return Finding(
        "the daemon",
        same
          ? nil
          : "it is version \(reply.version ?? "unknown"), this is"
            + " \(DMUXen.version)",
        remedy: "systemctl restart dmu-xend (disks go on meanwhile)")
    } catch {
      return Finding(
        "the daemon", error == .daemonNotRunning ? "dmu-xend is not running" : error.sentence,
        remedy: "systemctl start dmu-xend, and to have it at every boot: systemctl enable dmu-xend")
    }
  }
}
