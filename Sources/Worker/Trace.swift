// SPDX-License-Identifier: Apache-2.0
// For whoever debugs a file system or a format: every question of the target and every answer
// to it as a line, and writes held at the door of the store until somebody lets them go.

import BlockIO
import DiskModel
import Glibc
import SystemIO
import Target

/// What whoever debugs wants of a disk. What is named is opened at once, while this process can.
final class DiskDebugging {
  let trace: Trace
  private var pipe: Descriptor?
  private var pipeNumber: Int32?
  private let log: Log

  /// A file for a trace, and a named pipe for orders, which is made if it is not there. Held writes
  /// are told in the trace, so that goes to standard error unless it is elsewhere. nil: neither.
  init?(trace: String?, hold: String?, _ log: Log) throws(WorkerError) {
    guard trace != nil || hold != nil else { return nil }
    self.trace = try Trace(path: trace ?? "-", log)
    self.log = log
    guard let hold else { return }
    pipe = try system { () throws(IOError) in
      guard mkfifo(hold, 0o600) == 0 || errno == EEXIST else { throw IOError.last("make", hold) }
      // Open at both ends, so that it does not end with each who has written to it.
      let pipe = try Descriptor(path: hold, flags: O_RDWR | O_NONBLOCK)
      var status = stat()
      guard fstat(pipe.raw, &status) == 0, status.st_mode & S_IFMT == S_IFIFO else {
        throw IOError(EINVAL, "take orders from (it is no named pipe)", hold)
      }
      pipeNumber = pipe.raw
      return pipe
    }
  }

  /// What it has open, lent.
  var descriptors: [Int32] { [trace.raw] + (pipeNumber.map { [$0] } ?? []) }

  /// What holds the writes of an executor, if that was wished. Once.
  func holder(
    _ inner: any IOExecutor, loop: EventLoop
  ) throws(WorkerError) -> HoldingExecutor? {
    guard let pipe = pipe.take() else { return nil }
    return try HoldingExecutor(inner, pipe: pipe, trace, loop: loop, log)
  }
}

/// Writes a line for each fault and each answer.
final class Trace {
  private let file: Descriptor
  private let name: String
  private var failed = false
  private let log: Log

  /// Appends to a file; "-" is standard error.
  init(path: String, _ log: Log) throws(WorkerError) {
    name = path
    self.log = log
    file = try system { () throws(IOError) in
      if path == "-" {
        let copy = fcntl(2, F_DUPFD_CLOEXEC, 3)
        guard copy >= 0 else { throw IOError.last("duplicate standard error") }
        return Descriptor(owning: copy)
      }
      return try Descriptor(path: path, flags: O_WRONLY | O_CREAT | O_APPEND, mode: 0o600)
    }
  }

  /// Where it is written, lent.
  var raw: Int32 { file.raw }

  /// One line, with the time since some start in microseconds before it.
  func line(_ text: String) {
    var now = timespec()
    clock_gettime(CLOCK_MONOTONIC, &now)
    let micros = String(now.tv_nsec / 1000)
    let zeroes = String(repeating: "0", count: 6 - micros.count)
    let bytes = Array("\(now.tv_sec).\(zeroes)\(micros) \(text)\n".utf8)
    guard Glibc.write(file.raw, bytes, bytes.count) != bytes.count, !failed else { return }
    // A disk is not worth less for a trace that is full; it is said once.
    failed = true
    log(.error, "the trace is not complete", ["error": "\(IOError.last("write", name))"])
  }

  func fault(_ fault: Fault) {
    switch fault {
    case .read(let id, let blocks): line("fault \(id) read \(Self.words(blocks))")
    case .write(let id, let blocks, let whole):
      line("fault \(id) write \(Self.words(blocks))\(whole ? " whole" : "")")
    case .flush(let id, let mark): line("fault \(id) flush up to \(mark)")
    case .discard(let id, let blocks, let zeroing):
      line("fault \(id) \(zeroing ? "zero" : "discard") \(Self.words(blocks))")
    case .mapError(let block, let mark, let code):
      line("failed block \(block) mark \(mark) errno \(code)")
    case .placed(let extent): line("placed \(Self.words(Placement(extent)))")
    case .marked(let provisional, let mark):
      line("mark \(provisional) is \(mark)")
    case .invalidateDone(let blocks): line("forgotten \(Self.words(blocks))")
    }
  }

  func answer(_ answer: Answer) {
    switch answer {
    case .map(let id, let placement, _): line("answer \(id) map \(Self.words(placement))")
    case .prime(let extent): line("map \(Self.words(Placement(extent)))")
    case .done(let id, let blocks): line("answer \(id) nothing to do for \(blocks) blocks")
    case .fail(let id, let code): line("answer \(id) fail errno \(code)")
    case .flushDone(let id): line("answer \(id) durable")
    case .invalidate(let blocks): line("forget \(Self.words(blocks))")
    }
  }

  private static func words(_ blocks: BlockRange) -> String { "\(blocks.first)+\(blocks.count)" }

  private static func words(_ place: Place) -> String {
    switch place {
    case .zero: "zeroes"
    case .device(let device, let sector): "device \(device) sector \(sector)"
    }
  }

  private static func words(_ placement: Placement) -> String {
    let extent = placement.extent
    var text = "\(words(extent.blocks)) at \(words(extent.place))"
    if extent.writable { text += " writable" }
    if extent.mark != 0 { text += " mark \(extent.mark)" }
    switch placement.preparation {
    case .none: break
    case .zero: text += " filled with zeroes"
    case .copy(let from): text += " copied from \(words(from))"
    }
    return text
  }
}

/// Holds what would change a backing device. Orders come as lines through a named pipe:
///
///     release        the oldest that is held, or with a number that one
///     release all    what is held now
///     go             that, and hold nothing any more
///     hold           hold from now on (as at the start)
final class HoldingExecutor: IOExecutor {
  private let inner: any IOExecutor
  private let trace: Trace
  private let pipe: Descriptor
  private let log: Log
  private var holding = true
  private var held: [(number: Int, io: BackingIO)] = []
  private var last = 0
  private var text: [UInt8] = []

  /// Reads orders from a named pipe that is open at both ends.
  init(
    _ inner: any IOExecutor, pipe: consuming Descriptor, _ trace: Trace, loop: EventLoop, _ log: Log
  ) throws(WorkerError) {
    self.inner = inner
    self.trace = trace
    self.log = log
    let raw = pipe.raw
    self.pipe = pipe
    _ = try system { () throws(IOError) in
      try loop.add(raw, for: .readable) { [unowned self] _ in hear() }
    }
  }

  var completion: ((UInt32, Int32) -> Void)? {
    get { inner.completion }
    set { inner.completion = newValue }
  }
  var deviceCount: Int { inner.deviceCount }
  func isWritable(_ device: UInt16) -> Bool { inner.isWritable(device) }
  func name(_ device: UInt16) -> String { inner.name(device) }
  func end(_ device: UInt16) -> UInt64 { inner.end(device) }

  private func holds(_ io: BackingIO) -> Bool {
    guard holding else { return false }
    switch io.operation {
    case .write, .punch, .zero: return true
    case .read, .flush: return false
    }
  }

  func attempt(_ io: BackingIO) -> Int { holds(io) ? -Int(EAGAIN) : inner.attempt(io) }

  func start(_ io: BackingIO) {
    guard holds(io) else { return inner.start(io) }
    last += 1
    held.append((last, io))
    trace.line(
      "held \(last) \(io.operation) device \(io.device) sector \(io.offset / 512) bytes \(io.count)"
    )
  }

  func run(
    _ work: @escaping @Sendable () -> CommitFailure?, then: @escaping (CommitFailure?) -> Void
  ) {
    inner.run(work, then: then)
  }

  func hole(
    _ device: UInt16, at offset: UInt64, limit: UInt64
  ) -> (isHole: Bool, count: UInt64) {
    inner.hole(device, at: offset, limit: limit)
  }

  /// Lets everything go, now and from now on.
  func go() {
    holding = false
    while !held.isEmpty { release(0) }
  }

  private func release(_ index: Int) {
    let (number, io) = held.remove(at: index)
    trace.line("released \(number)")
    inner.start(io)
  }

  private func hear() {
    var buffer = [UInt8](repeating: 0, count: 512)
    let count = read(pipe.raw, &buffer, buffer.count)
    guard count > 0 else { return }
    text += buffer[..<count]
    while let end = text.firstIndex(of: 0x0a) {
      obey(String(decoding: text[..<end], as: UTF8.self))
      text.removeFirst(end + 1)
    }
    if text.count > 256 { text = [] }
  }

  private func obey(_ order: String) {
    let words = order.split(separator: " ")
    switch (words.first, words.dropFirst().first) {
    case ("release", nil): if !held.isEmpty { release(0) }
    case ("release", "all"):
      let count = held.count
      for _ in 0..<count { release(0) }
    case ("release", let number?):
      guard let index = held.firstIndex(where: { String($0.number) == number }) else {
        return trace.line("nothing is held under \(number)")
      }
      release(index)
    case ("go", nil): go()
    case ("hold", nil): holding = true
    default: log(.warning, "an order is not understood", ["order": order])
    }
  }
}
