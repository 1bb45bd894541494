// SPDX-License-Identifier: Apache-2.0
// The daemon's part in a disk that the kernel serves: a worker that is started with
// descriptors, waits for a node, is killed and replaced.

import BlockIO
import Glibc
import LinuxBlock
import SystemIO
import WorkerLink

private let programs = String(cString: getenv("DMU_PROGRAMS"))

func trySupervisedWorker() throws {
  let base = try scratchFile("sup.base", bytes: 4 << 20)
  let path = "/mnt/sup.dscow"
  try run("dscow_tool", ["-c", path, base.name])
  let store = try FileStore(path: path, writable: true)
  let served = ServedDevice(name: "sup", owner: "trial")
  let backings = [
    ServedDevice.Backing(descriptor: store.raw, name: path, readOnly: false),
    ServedDevice.Backing(descriptor: base.raw, name: base.name, readOnly: true),
  ]
  let first = try SupervisedWorker(store, base)
  check(first.report.byNode, "the worker does not wait for a node")
  check(first.report.size == 4 << 20, "the disk has \(first.report.size) bytes")
  _ = try served.make(
    size: first.report.size, blockSize: first.report.blockSize, backings, readOnly: false)
  try first.attach("sup")
  try served.start()
  do {
    let disk = try Sectors(served.device.path)
    try disk.fill(9, 0x21)
    try first.process.send(SIGKILL)
    check(try first.process.wait(milliseconds: 30_000) == .signalled(SIGKILL), "not killed")
    let second = try SupervisedWorker(store, base)
    try second.attach("sup")
    try disk.fill(4097, 0x42)
    check(try disk.byte(9) == 0x21 && disk.byte(4097) == 0x42, "the bytes are others")
    check(try disk.byte(8) == 0, "the base does not shine through")
    let report = try second.status()
    check(report.attached && report.byNode && report.faults > 0, "it tells \(report)")
    try second.link.send(.descriptors(index: 0))
    guard case .descriptors = try second.hear() else { complain("no descriptors") }
    try second.link.send(.stop)
    check(try second.process.wait(milliseconds: 30_000) == .exited(0), "it does not stop")
  }
  let third = try SupervisedWorker(store, base)
  try third.attach("sup")
  try served.device.remove(patient: true)
  // With its device gone there is nothing left for it.
  check(try third.process.wait(milliseconds: 30_000) == .exited(0), "it stays")
  try run("dscow_tool", ["check", path])
  check(unlink(path) == 0 && unlink(base.name) == 0, "unlink")
}

private func run(_ program: String, _ arguments: [String]) throws {
  let process = try Command("\(programs)/\(program)", arguments).start()
  let status = try process.wait(milliseconds: 60_000)
  check(status == .exited(0), "\(program) ended with \(status?.description ?? "nothing")")
}

/// A worker and its link.
private struct SupervisedWorker {
  let process: ProcessHandle
  let link: LinkConnection
  private(set) var report = DiskReport()

  /// Starts one with a dscow store and its base, and waits until the image is open.
  init(_ store: FileStore, _ base: FileStore) throws {
    let path = "/mnt/sup.link"
    _ = unlink(path)
    let listener = try UnixSocket.listen(at: path, kind: .packets)
    // This kernel is built without namespaces. That a caged worker serves a node is for the Xen lab.
    var command = Command(
      "\(programs)/cowd", ["--supervised", "--uid", "0", "--gid", "0", "--no-sandbox"])
    command.descriptors = [3: listener.raw]
    process = try command.start()
    link = try LinkConnection(path: path)
    var order = StartOrder(disk: "trial", format: "dscow")
    order.storePath = store.name
    order.basePath = base.name
    order.byNode = true
    try link.send(.start(order), lending: [.store: store.raw, .base: base.raw])
    guard case .ready(let report) = try hear() else { complain("the worker is not ready") }
    self.report = report
  }

  /// Hands over the node of a device.
  func attach(_ name: String) throws {
    let node = try Descriptor(path: "/dev/dmu/" + name, flags: O_RDWR)
    try link.send(.attach, lending: [.node: node.raw])
    guard case .attached = try hear() else { complain("the node is not served") }
  }

  func status() throws -> DiskReport {
    try link.send(.status)
    guard case .status(let report) = try hear() else { complain("no status") }
    return report
  }

  func hear() throws -> WorkerReport {
    switch try link.receive(milliseconds: 30_000) {
    case .message(let message, _): return try WorkerReport(message)
    case .none: complain("the worker says nothing")
    case .end: complain("the worker has gone")
    }
  }
}
