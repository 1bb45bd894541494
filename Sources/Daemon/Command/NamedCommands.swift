// SPDX-License-Identifier: Apache-2.0
// attach, detach, activate and deactivate: named disks, and those of them that are kept over a
// reboot.
//
// The order, with a file in disks.d: a disk is attached before its file is written, and detached
// before it is removed; likewise activated and deactivated before its file says so. A command that
// ends between the two has not said that it is done.

internal import SystemIO

/// A disk as `dmu-xen attach` was told of it.
package struct NamedRequest: Sendable {
  /// The name.
  package var name: String
  /// The spec; nil: that of the disk's file.
  package var spec: String?
  /// Whether it is only read.
  package var readOnly = false
  /// Whether a store that does not exist is created.
  package var create = false
  /// The UUID of the virtual machine that it belongs to.
  package var owner: String?
  /// Whether it is kept over a reboot.
  package var isPersistent = false
  /// Whether udev may look into the device.
  package var probe = false
  /// Whether it is only kept by its name, and not served.
  package var isInactive = false

  /// A request from its parts.
  package init(_ name: String, _ spec: String?) {
    self.name = name
    self.spec = spec
  }
}

extension ClientCommands {
  /// How long an attach or a detach may take; the daemon answers earlier.
  private static let namedLimit = Duration.seconds(60)

  /// Attaches a disk by a name, waits until it is served, and prints the path of its device.
  package func attach(_ request: NamedRequest) -> CommandStatus {
    run(withoutDaemon: " and attach the disk again") { () throws(DiskFailure) in
      let name = try Self.name(request.name)
      let wish = try wish(name, request)
      try attach(name, wish, create: request.create)
      if request.isPersistent {
        do throws(IOError) { try diskFiles.save(name, wish) } catch {
          throw DiskFailure(
            .io,
            "the disk \(name) is attached, but will not be after a reboot: \(error.description):"
              + " see to it and run the command again")
        }
      }
      return .done
    }
  }

  /// Attaches every disk that has a file. One that fails does not keep the others from it.
  package func attachAll() -> CommandStatus {
    var status = CommandStatus.done
    let files: (disks: [DiskName], strange: [String])
    do throws(IOError) { files = try diskFiles.names() } catch {
      CommandOutput.complain("\(error.description): see to it")
      return .failed
    }
    for path in files.strange {
      CommandOutput.complain("\(path) is named like no disk and is passed over: \(DiskName.rule)")
      status = .failed
    }
    for name in files.disks {
      let verdict = run(withoutDaemon: " and run this again") { () throws(DiskFailure) in
        guard let wish = try read(name) else { return .done }
        try attach(name, wish, create: false)
        return .done
      }
      if verdict == .noDaemon { return verdict }
      if verdict != .done { status = .failed }
    }
    return status
  }

  /// Detaches a named disk, waits until nothing of it is left, and removes its file.
  package func detachNamed(_ text: String) -> CommandStatus {
    run(withoutDaemon: " and detach the disk again") { () throws(DiskFailure) in
      let name = try Self.name(text)
      var isUnknown: DiskFailure?
      do throws(DiskFailure) {
        var request = ControlRequest(.detachNamed)
        request.name = name.description
        _ = try ask(request, Self.namedLimit)
      } catch {
        guard error.code == .gone else { throw error }
        isUnknown = error
      }
      do throws(IOError) {
        // What has a file is known, attached or not.
        if try diskFiles.remove(name) { return .done }
      } catch {
        throw DiskFailure(
          .io,
          "the disk \(name) is detached, but comes back after a reboot: \(error.description):"
            + " see to it and run the command again")
      }
      if let isUnknown { throw isUnknown }
      return .done
    }
  }

  /// Serves a named disk that is inactive, prints the path of its device, and has it active after
  /// a reboot if it has a file.
  package func activate(_ text: String) -> CommandStatus {
    run(withoutDaemon: " and activate the disk again") { () throws(DiskFailure) in
      let name = try Self.name(text)
      var request = ControlRequest(.activate)
      request.name = name.description
      guard let device = try ask(request, Self.namedLimit).device else {
        throw DiskFailure.daemonGone
      }
      try note(name, isActive: true)
      CommandOutput.say("\(device.path)\n")
      return .done
    }
  }

  /// Takes a named disk down, keeps its name, and has it inactive after a reboot if it has a file.
  package func deactivate(_ text: String) -> CommandStatus {
    run(withoutDaemon: " and deactivate the disk again") { () throws(DiskFailure) in
      let name = try Self.name(text)
      var request = ControlRequest(.deactivate)
      request.name = name.description
      _ = try ask(request, Self.namedLimit)
      try note(name, isActive: false)
      return .done
    }
  }

  /// Has the file of a disk, if there is one, say whether it is active.
  private func note(_ name: DiskName, isActive: Bool) throws(DiskFailure) {
    do throws(IOError) { try diskFiles.setActive(name, isActive) } catch {
      throw DiskFailure(
        .io,
        "the disk \(name) is \(isActive ? "" : "in")active, but is not so after a reboot:"
          + " \(error.description): see to it and run the command again")
    }
  }

  /// The names of the disks that have a file, for a shell that completes a word.
  static func filedNames(_ configurationPath: String) -> [String] {
    do throws(IOError) {
      return try DiskFiles(configurationPath: configurationPath).names().disks.map { "\($0)" }
    } catch { return [] }
  }

  private static func name(_ text: String) throws(DiskFailure) -> DiskName {
    guard let name = DiskName(path: text) ?? DiskName(text) else { throw .nameBad(text) }
    return name
  }

  private func wish(
    _ name: DiskName, _ request: NamedRequest
  ) throws(DiskFailure) -> NamedWish {
    guard let spec = request.spec else {
      guard let wish = try read(name) else {
        throw DiskFailure(
          .gone,
          "there is no file \(diskFiles.path(name)) that says what disk \(name) is: give its"
            + " spec, as in 'dmu-xen attach \(name) dmu:dscow:STORE:BASE'")
      }
      return wish
    }
    do { _ = try Spec(spec) } catch { throw .malformed(error) }
    var wish = NamedWish(
      params: spec, readOnly: request.readOnly, isProbed: request.probe)
    if request.isInactive { wish.inactiveSince = 0 }
    if let owner = request.owner {
      guard let id = OwnerID(owner) else { throw .ownerBad(owner) }
      wish.owner = id
    }
    return wish
  }

  private func read(_ name: DiskName) throws(DiskFailure) -> NamedWish? {
    do throws(ConfigurationError) { return try diskFiles.load(name) } catch {
      throw DiskFailure(.malformed, "\(error)")
    }
  }

  /// A daemon that is just being started is waited for.
  private func attach(_ name: DiskName, _ wish: NamedWish, create: Bool) throws(DiskFailure) {
    var request = ControlRequest(.attachNamed)
    request.name = name.description
    request.spec = wish.params
    request.readOnly = wish.readOnly
    request.create = create
    request.owner = wish.owner?.description
    request.probe = wish.isProbed
    request.inactive = !wish.isActive
    let client = try ControlClient.connect(path: socket, patience: ClientCommands.patience)
    let reply = try client.ask(request, within: Self.namedLimit)
    guard wish.isActive else { return }
    guard let device = reply.device else { throw DiskFailure.daemonGone }
    CommandOutput.say("\(device.path)\n")
  }
}
