// SPDX-License-Identifier: Apache-2.0
// What libvirt's hook does: the disks that a domain's metadata names are attached before the domain
// starts, and detached when it is gone.
//
//   prepare     before everything else of a start, of a restore, and of a start from a managed save:
//               attaches the disks, active. The only operation that may fail: then there is no start.
//   release     at the end of a domain, and of a running one that libvirtd gives up when it is started
//               anew: detaches every disk of the domain's UUID that nobody has open.
//   reconnect   libvirtd has been started anew: says what is missing, changes nothing.
//
// No operation creates a store, since `prepare` is the same for a boot and for a restore. Nothing
// here calls libvirt, which waits for the hook.
// Source: https://libvirt.org/hooks.html, /etc/libvirt/hooks/libxl.

import Glibc
internal import SystemIO
internal import XMLText

/// The disks that the metadata of a domain names.
package struct LibvirtDisks: Sendable, Equatable {
  /// A disk of them.
  package struct Disk: Sendable, Equatable {
    package var name: String
    package var spec: String
    package var readOnly: Bool
  }

  /// The domain's UUID, as it stands there.
  package var uuid: String
  package var disks: [Disk]

  /// What a domain says, from its parts.
  init(uuid: String, disks: [Disk]) {
    self.uuid = uuid
    self.disks = disks
  }

  /// What `dmu:disks` stands for.
  package static let namespace = "urn:dmu-xen:libvirt:1"

  /// Reads the XML of a domain: `uuid` and `metadata/dmu:disks/dmu:disk`. Throws in words, with the line
  /// where there is one.
  package init(descriptor: Int32) throws(DiskFailure) {
    (uuid, disks) = ("", [])
    do throws(XMLError) {
      let reader = try XMLReader(descriptor: descriptor, name: "the domain's XML")
      var path: [String] = []
      while let node = try reader.next() {
        switch node {
        case .element(let name, let namespace):
          path.removeLast(max(0, path.count - reader.depth))
          path.append(namespace == Self.namespace ? "dmu:" + name : name)
          if path == ["domain", "metadata", "dmu:disks", "dmu:disk"] {
            disks.append(try Self.disk(reader))
          }
        case .text(let text) where path == ["domain", "uuid"]: uuid += text
        case .end: path.removeLast(max(0, path.count - reader.depth))
        case .text, .comment: continue
        }
      }
    } catch { throw DiskFailure(.malformed, "\(error)") }
    guard OwnerID(uuid) != nil else {
      throw DiskFailure(.malformed, "the domain's XML has no UUID: '\(ForeignText.shown(uuid))'")
    }
  }

  private static func disk(_ reader: XMLReader) throws(XMLError) -> Disk {
    guard let name = reader.attribute("name"), let spec = reader.attribute("spec") else {
      throw reader.refuse("a dmu:disk has name= and spec=")
    }
    let words = reader.attribute("readonly") ?? "no"
    guard ["yes", "no"].contains(words) else {
      throw reader.refuse("readonly='\(words)' is neither 'yes' nor 'no'")
    }
    return Disk(name: name, spec: spec, readOnly: words == "yes")
  }
}

extension ClientCommands {
  /// What libvirt's hook does for an operation; the domain's XML comes from a descriptor. Nothing is
  /// printed to stdout, which libvirt would read. `patience`: how long `release` waits for devices to
  /// be closed; libvirt waits with it.
  package func libvirt(
    _ operation: String, descriptor: Int32, patience: Duration = .seconds(10)
  ) -> CommandStatus {
    switch operation {
    case "prepare":
      return run { () throws(DiskFailure) in try prepare(LibvirtDisks(descriptor: descriptor)) }
    case "release", "reconnect":
      // A failure here would harm the domain, and help nobody.
      _ = run { () throws(DiskFailure) in
        let domain = try LibvirtDisks(descriptor: descriptor)
        guard operation == "release" else { return try look(domain) }
        return try release(domain.uuid, within: patience)
      }
      return .done
    default: return .done
    }
  }

  /// Attaches the disks of a domain; of one that fails the others of this call are detached again.
  private func prepare(_ domain: LibvirtDisks) throws(DiskFailure) -> CommandStatus {
    guard !domain.disks.isEmpty else { return .done }
    let before = Set(try owned(by: domain.uuid).compactMap(\.name))
    var attached: [String] = []
    for disk in domain.disks {
      var request = ControlRequest(.attachNamed)
      request.name = disk.name
      request.spec = disk.spec
      request.readOnly = disk.readOnly
      request.create = false
      request.owner = domain.uuid
      request.probe = false
      request.inactive = false
      do throws(DiskFailure) {
        guard DiskName(disk.name) != nil else { throw .nameBad(disk.name) }
        do { _ = try Spec(disk.spec) } catch { throw DiskFailure.malformed(error) }
        let client = try ControlClient.connect(path: socket, patience: ClientCommands.patience)
        _ = try client.ask(request, within: .seconds(60))
        if !before.contains(disk.name) { attached.append(disk.name) }
      } catch {
        for name in attached.reversed() {
          do throws(DiskFailure) { try detach(name) } catch {
            CommandOutput.complain("the disk \(name) stays attached: \(error.sentence)")
          }
        }
        throw error
      }
    }
    return .done
  }

  /// Detaches the disks of an owner, each when nobody has it open any more. One that is kept over a
  /// reboot is the admin's, and stays.
  private func release(
    _ owner: String, within patience: Duration
  ) throws(DiskFailure) -> CommandStatus {
    var left = try owned(by: owner).compactMap(\.name).filter { name in
      !ClientCommands.isFiled(name, diskFiles)
    }
    let end = ContinuousClock.now + patience
    var failures: [String] = []
    while !left.isEmpty {
      failures = []
      left = left.filter { name in
        do throws(DiskFailure) { try detach(name) } catch {
          guard error.code != .gone else { return false }
          failures.append("the disk \(name) stays attached: \(error.sentence)")
          return true
        }
        return false
      }
      guard !left.isEmpty, ContinuousClock.now < end else { break }
      usleep(500_000)
    }
    for failure in failures { CommandOutput.complain(failure) }
    return .done
  }

  /// Says which disks of a running domain are not served.
  private func look(_ domain: LibvirtDisks) throws(DiskFailure) -> CommandStatus {
    let owned = try owned(by: domain.uuid)
    for disk in domain.disks where !owned.contains(where: { $0.name == disk.name }) {
      CommandOutput.complain("the disk \(disk.name) of a running domain is not attached")
    }
    return .done
  }

  private func owned(by uuid: String) throws(DiskFailure) -> [DiskStatus] {
    guard let owner = OwnerID(uuid) else { throw .ownerBad(uuid) }
    let client = try ControlClient.connect(path: socket, patience: ClientCommands.patience)
    let disks = try client.ask(ControlRequest(.status), within: .seconds(10)).disks ?? []
    return disks.filter { $0.owner.flatMap { OwnerID($0) } == owner }
  }

  private func detach(_ name: String) throws(DiskFailure) {
    var request = ControlRequest(.detachNamed)
    request.name = name
    _ = try ask(request, .seconds(60))
  }

  private static func isFiled(_ name: String, _ files: DiskFiles) -> Bool {
    guard let name = DiskName(name) else { return false }
    // A file that cannot be read is one.
    do { return try files.load(name) != nil } catch { return true }
  }
}
