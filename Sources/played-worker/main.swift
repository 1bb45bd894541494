// A worker that is played, for tests of the daemon: it says of every image that the kernel can
// serve it (of raw ones that it cannot), takes the node, and does nothing with it.
//
// Its size and blocks are made up; a qcow2 store asks for a data file beside it first.

import Glibc
import Posix
import WorkerLink

private final class Played {
  private var store: Descriptor?
  private var base: Descriptor?
  private var file: Descriptor?
  private var node: Descriptor?
  private var order: StartOrder?
  private let need = FileNeed(role: "data-file", path: "data", writable: true)

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
      if file != nil { report.parts.append(DiskPart(.file(0), isWritable: true)) }
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
      // An image of this kind is any that is not empty.
      if start.create, ftruncate(store?.raw ?? -1, 4096) != 0 { exit(1) }
      try link.send(start.format == "qcow2" ? .needFile(need) : .ready(report))
    case .file:
      file = descriptors.take(.file)
      try link.send(.ready(report))
    case .attach:
      guard report.byNode else { return }
      node = descriptors.take(.node)
      try link.send(.attached)
    case .ping: try link.send(.alive)
    case .status, .clear: try link.send(.status(report))
    case .descriptors(let index):
      var lent: [LinkRole: Int32] = [:]
      lent[index == 0 ? .store : .file] = index == 0 ? store?.raw : file?.raw
      if index == 0 { lent[.base] = base?.raw }
      try link.send(
        .descriptors(files: file == nil ? 0 : 1, file: index == 0 ? nil : need), lending: lent)
    case .refuseFile, .stop: exit(0)
    }
  }
}

do { try Played().run() } catch {
  print("played-worker: \(error)")
  exit(1)
}
