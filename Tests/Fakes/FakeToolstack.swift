// SPDX-License-Identifier: Apache-2.0
//
// What libxl, blkback and a guest do to xenstore for a disk, node by node, without any of them: for
// tests that need many disks coming and going. Each step is one call, so that a test can stop
// between any two, repeat them or leave them out. The order of a well-behaved life:
//
//     createDomain · attach · backendWaits · (the script's nodes) · connect
//     beginDetach · backendCloses · finishDetach · destroyDomain
//
// Source: libxl_disk.c, libxl_device.c (libxl__device_generic_add, libxl__device_destroy),
// xen-blkback/xenbus.c; seen on Xen 4.17.

package import TestSupport

/// One disk as the toolstack knows it.
package struct FakeDisk: Hashable, Sendable {
  /// The guest's domain id.
  package var domain: Int
  /// The device number, 51712 for xvda; see `number(of:)`.
  package var device: Int
  /// The guest's name for it, `xvda`.
  package var name: String
  /// What `target=` said: the spec, `dmu:` and all.
  package var params: String
  /// The script's absolute path.
  package var script: String
  /// False for a disk that the guest may only read.
  package var isWritable: Bool
  /// The domain that serves the disk; not 0 for a driver domain.
  package var backendDomain: Int

  /// A writable disk of domain 0's, under the script that dmu disks have.
  package init(domain: Int, name: String = "xvda", params: String, isWritable: Bool = true) {
    self.domain = domain
    self.device = Self.number(of: name)
    self.name = name
    self.params = params
    self.script = "/etc/xen/scripts/block-dmu"
    self.isWritable = isWritable
    self.backendDomain = 0
  }

  /// The device number of `xvda` to `xvdp`: major 202, sixteen minors a disk.
  package static func number(of name: String) -> Int {
    guard let letter = name.utf8.last else { return 202 << 8 }
    return 202 << 8 | (Int(letter) - Int(UInt8(ascii: "a"))) << 4
  }

  /// `/local/domain/B/backend/vbd/D/V`.
  package var backend: String {
    "/local/domain/\(backendDomain)/backend/vbd/\(domain)/\(device)"
  }
  /// `backend/vbd/D/V`, as the script finds it in XENBUS_PATH.
  package var relativeBackend: String { "backend/vbd/\(domain)/\(device)" }
  /// `/local/domain/D/device/vbd/V`.
  package var frontend: String { "/local/domain/\(domain)/device/vbd/\(device)" }
  /// libxl's own note of the device, which no guest can write.
  package var libxl: String { "/libxl/\(domain)/device/vbd/\(device)" }
}

/// Plays libxl, blkback and blkfront in one xenstored. Blocking; may be used by several tasks.
package final class FakeToolstack: Sendable {
  private let wire: XenStoredWire

  /// Connects, and writes what xen-init-dom0 writes.
  package init(_ xenstored: XenStored) throws(WireError) {
    wire = try xenstored.connect()
    try wire.write("/local/domain/0/domid", "0")
    try wire.write("/local/domain/0/name", "Domain-0")
  }

  /// A domain comes: its nodes, and xenstored is told of it.
  package func createDomain(_ domain: Int, name: String) throws(WireError) {
    let root = "/local/domain/\(domain)"
    try wire.transaction { transaction throws(WireError) in
      try wire.remove(root, in: transaction)
      try make(root, ["n0", "r\(domain)"], transaction)
      try wire.write("\(root)/name", name, in: transaction)
      try wire.write("\(root)/domid", "\(domain)", in: transaction)
      for directory in ["device", "data", "control"] {
        try make("\(root)/\(directory)", ["n\(domain)", "r0"], transaction)
      }
    }
    try wire.introduce(domain: domain)
  }

  /// A domain goes: its nodes and libxl's. The backends of its disks stay until `finishDetach`.
  package func destroyDomain(_ domain: Int) throws(WireError) {
    try wire.transaction { transaction throws(WireError) in
      try wire.remove("/local/domain/\(domain)", in: transaction)
      try wire.remove("/libxl/\(domain)", in: transaction)
    }
    // Xen is asked last, so that whoever hears of the end finds the nodes gone.
    try wire.release(domain: domain)
  }

  /// libxl attaches a disk: one transaction, all nodes with their permissions.
  package func attach(_ disk: FakeDisk) throws(WireError) {
    let back = [
      ("params", disk.params), ("script", disk.script), ("frontend-id", "\(disk.domain)"),
      ("online", "1"), ("removable", "0"), ("bootable", "1"), ("state", "1"), ("dev", disk.name),
      ("type", "phy"), ("mode", disk.isWritable ? "w" : "r"), ("device-type", "disk"),
      ("discard-enable", "1"), ("specification", "xen"),
    ]
    let front = [
      ("backend-id", "\(disk.backendDomain)"), ("state", "1"),
      ("virtual-device", "\(disk.device)"), ("device-type", "disk"),
    ]
    let ofGuest = ["n\(disk.domain)", "r\(disk.backendDomain)"]
    let ofBackend = ["n\(disk.backendDomain)", "r\(disk.domain)"]
    try wire.transaction { transaction throws(WireError) in
      try wire.remove(disk.libxl, in: transaction)
      try make(disk.libxl, ["n0"], transaction)
      try wire.write("\(disk.libxl)/frontend", disk.frontend, in: transaction)
      try wire.write("\(disk.libxl)/backend", disk.backend, in: transaction)
      try wire.remove(disk.frontend, in: transaction)
      try make(disk.frontend, ofGuest, transaction)
      try wire.write("\(disk.frontend)/backend", disk.backend, in: transaction)
      try writeAll(front, below: disk.frontend, transaction)
      try wire.remove(disk.backend, in: transaction)
      try make(disk.backend, ofBackend, transaction)
      try wire.write("\(disk.backend)/frontend", disk.frontend, in: transaction)
      try writeAll(back, below: disk.backend, transaction)
      // libxl keeps its own copy, beyond the backend's reach.
      try writeAll(back, below: disk.libxl, transaction)
    }
  }

  /// blkback has seen the disk: writes its features and waits for `physical-device` in state 2.
  package func backendWaits(_ disk: FakeDisk) throws(WireError) {
    let features = [
      ("feature-max-indirect-segments", "256"), ("multi-queue-max-queues", "1"),
      ("max-ring-page-order", "4"), ("state", "2"),
    ]
    try writeAll(features, below: disk.backend, 0)
  }

  /// The frontend and blkback connect (state 4); `sectors` is the disk's length in 512 bytes.
  package func connect(_ disk: FakeDisk, sectors: Int) throws(WireError) {
    try writeAll([("ring-ref", "8"), ("event-channel", "9")], below: disk.frontend, 0)
    try wire.write("\(disk.frontend)/state", "3")
    try wire.transaction { transaction throws(WireError) in
      let values = [
        ("feature-flush-cache", "1"), ("feature-discard", "1"), ("feature-barrier", "1"),
        ("sectors", "\(sectors)"), ("info", "0"), ("sector-size", "512"), ("state", "4"),
      ]
      try writeAll(values, below: disk.backend, transaction)
    }
    try wire.write("\(disk.frontend)/state", "4")
  }

  /// libxl asks the backend to let go: `online` 0 and `state` 5, in one transaction.
  package func beginDetach(_ disk: FakeDisk) throws(WireError) {
    try wire.transaction { transaction throws(WireError) in
      try wire.write("\(disk.backend)/online", "0", in: transaction)
      try wire.write("\(disk.backend)/state", "5", in: transaction)
    }
  }

  /// The frontend and blkback have closed: state 6. libxl then runs the script's `remove`.
  package func backendCloses(_ disk: FakeDisk) throws(WireError) {
    try wire.write("\(disk.backend)/state", "6")
  }

  /// libxl deletes the nodes, and every directory above them that is left empty.
  package func finishDetach(_ disk: FakeDisk) throws(WireError) {
    try wire.transaction { transaction throws(WireError) in
      for path in [disk.frontend, disk.backend, disk.libxl] {
        try removeWithEmptyParents(path, transaction)
      }
    }
  }

  /// The disks whose backend nodes are there, as `D/V`, sorted.
  package func backends(of backendDomain: Int = 0) throws(WireError) -> [String] {
    let root = "/local/domain/\(backendDomain)/backend/vbd"
    var found: [String] = []
    for domain in try children(of: root) {
      found += try children(of: "\(root)/\(domain)").map { "\(domain)/\($0)" }
    }
    return found.sorted()
  }

  /// A node's value, nil if it is not there: for what a test expects of the daemon.
  package func read(_ path: String) throws(WireError) -> String? {
    do { return try wire.read(path) } catch { return try absence(error) }
  }

  /// Writes any node: for what the script does, or a hostile guest.
  package func write(_ path: String, _ value: String) throws(WireError) {
    try wire.write(path, value)
  }
}

extension FakeToolstack {
  private func make(
    _ path: String, _ permissions: [String], _ transaction: UInt32
  ) throws(WireError) {
    try wire.makeDirectory(path, in: transaction)
    try wire.setPermissions(permissions, of: path, in: transaction)
  }

  private func writeAll(
    _ values: [(String, String)], below path: String, _ transaction: UInt32
  ) throws(WireError) {
    for (name, value) in values { try wire.write("\(path)/\(name)", value, in: transaction) }
  }

  private func removeWithEmptyParents(
    _ path: String, _ transaction: UInt32
  ) throws(WireError) {
    try wire.remove(path, in: transaction)
    var parent = path[..<(path.lastIndex(of: "/") ?? path.startIndex)]
    while !parent.isEmpty {
      do {
        guard try wire.list(String(parent), in: transaction).isEmpty else { return }
      } catch {
        guard error.name == "ENOENT" else { throw error }
      }
      try wire.remove(String(parent), in: transaction)
      parent = parent[..<(parent.lastIndex(of: "/") ?? parent.startIndex)]
    }
  }

  private func children(of path: String) throws(WireError) -> [String] {
    do { return try wire.list(path) } catch { return try absence(error) ?? [] }
  }

  private func absence<Value>(_ error: WireError) throws(WireError) -> Value? {
    guard error.name == "ENOENT" else { throw error }
    return nil
  }
}
