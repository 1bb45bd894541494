// SPDX-License-Identifier: Apache-2.0
// A worker that is played, for tests of the daemon: it reports of every image that the kernel can
// serve it (of raw ones that it cannot), takes the node, and does nothing with it.
//
// Its size and blocks are made up; a qcow2 store asks for a data file beside it first. The
// environment variable PLAYED makes it a hostile one: see Hostile.swift.

import Glibc
import SystemIO
import WorkerLink

private final class Played {
  private let hostile = Hostile()
  private var store: Descriptor?
  private var base: Descriptor?
  private var pending: Descriptor?
  private var files: [(need: FileNeed, file: PassedDescriptor)] = []
  private var node: Descriptor?
  private var order: StartOrder?
  /// What is asked for before the disk is ready.
  private var wanted: [FileNeed] = []

  private var report: DiskReport {
    var report = DiskReport()
    report.disk = order?.disk ?? ""
    report.format = order?.format ?? ""
    report.pid = getpid()
    report.size = 1 << 20
    report.blockSize = 65536
    report.byNode = order?.byNode == true && order?.format != "raw"
    report.hindrance =
      order?.byNode == true && order?.format == "raw" ? "is only played" : nil
    report.attached = node != nil
    if report.byNode {
      report.parts = [DiskPart(.store, isWritable: true)]
      for index in files.indices where files[index].need.writable {
        report.parts.append(DiskPart(.file(index), isWritable: true))
      }
      if base != nil { report.parts.append(DiskPart(.base, isWritable: false)) }
    }
    return report
  }

  /// Lives until it is told to stop.
  func run() throws {
    let listener = Descriptor(owning: 3)
    while true {
      guard let socket = try UnixSocket.accept(from: listener.raw) else { continue }
      let link = LinkConnection(socket)
      while true {
        switch try link.receive(milliseconds: 1000) {
        case .message(let message, let descriptors):
          try obey(try WorkerOrder(message), descriptors, link)
          continue
        case .none: continue
        case .end: break
        }
        break
      }
    }
  }

  private func obey(
    _ order: WorkerOrder, _ descriptors: LinkDescriptors, _ link: LinkConnection
  ) throws {
    switch order {
    case .start(let start):
      self.order = start
      store = descriptors.take(.store)
      base = descriptors.take(.base)
      pending = descriptors.take(.pending)
      // An image of this kind is any that is not empty.
      if start.create, ftruncate(store?.raw ?? -1, 4096) != 0 { exit(1) }
      wanted = hostile.needs
      if start.format == "qcow2" {
        wanted.append(FileNeed(role: "data-file", path: "data", writable: true))
      }
      try goOn(link)
    case .file:
      if let file = descriptors.take(.file) {
        files.append((wanted.removeFirst(), PassedDescriptor(file)))
      }
      try goOn(link)
    case .attach:
      guard report.byNode else { return }
      node = descriptors.take(.node)
      try link.send(.attached)
      try hostile.act(
        Hostile.Files(store: store?.raw, base: base?.raw, pending: pending?.raw), link)
    case .ping: try link.send(.alive)
    case .status, .clear: try link.send(.status(report))
    case .descriptors(let index): try giveBack(index, link)
    case .refuseFile, .stop: exit(0)
    }
  }

  private func goOn(_ link: LinkConnection) throws {
    try link.send(wanted.first.map { .needFile($0) } ?? .ready(report))
  }

  private func giveBack(_ index: Int, _ link: LinkConnection) throws {
    guard index > 0 else {
      var lent: [LinkRole: Int32] = [:]
      lent[.store] = store?.raw
      lent[.base] = base?.raw
      hostile.exchange(&lent)
      return try link.send(.descriptors(files: files.count, file: nil), lending: lent)
    }
    guard let file = files[index - 1].file.raw else { return }
    try link.send(
      .descriptors(files: files.count, file: files[index - 1].need), lending: [.file: file])
  }
}

/// Becomes the user that the daemon asked for, as the real worker does.
private func dropPrivileges() throws(IOError) {
  func number(_ option: String) -> UInt32? {
    guard let index = CommandLine.arguments.firstIndex(of: option) else { return nil }
    return CommandLine.arguments.indices.contains(index + 1)
      ? UInt32(CommandLine.arguments[index + 1]) : nil
  }
  guard geteuid() == 0, let user = number("--uid"), let group = number("--gid") else { return }
  try Hardening.become(uid: user, gid: group)
}

do {
  try dropPrivileges()
  try Played().run()
} catch {
  print("played-worker: \(error)")
  exit(1)
}
