// SPDX-License-Identifier: Apache-2.0
// One NBD connection: what is received, what is under way, what is to be sent.
//
// Receiving: many requests come with one recv into a slab and are served from there, a
// small write's payload where it lies. A large payload gets a slab of its own and is
// received straight into it. Sending: replies lie in slabs too, read payloads are read right
// behind their header, and one sendmsg takes many replies.
//
// Invariants:
// - Memory is bounded: a connection that holds `maxBytes` of slabs, or `maxRequests`
//   requests, is not listened to until it holds less; one request is always let in.
// - Nothing that a client sends is used before `refusal` has checked it.
// - Once `socket` is closed nothing is sent, and the session ends when its last request has
//   come back from the target, which may write to the slabs until then.

import Glibc
import SystemIO
import Target

/// How a connection came to its end.
package enum NBDEnd: Sendable, Equatable {
  /// The client has said so.
  case disconnected
  /// The client's end was closed without a word.
  case closed
  /// The socket has failed with this errno.
  case failed(Int32)
  /// What the client sent makes no sense; the reason.
  case garbage(String)
  /// It was dropped from this side.
  case dropped
}

/// One connection of an export.
package final class NBDSession: RequestOwner {
  /// Where the conversation stands.
  enum Phase {
    case clientFlags
    case options
    case transmission
    /// Nothing more is taken; what is under way is still answered.
    case ending(NBDEnd)
    /// The socket is closed.
    case closed(NBDEnd)
  }

  /// A request that the target has.
  struct Pending {
    var cookie: UInt64 = 0
    var command: UInt16 = 0
    var slab: Int32 = -1
    var start = 0
    var offset: UInt64 = 0
    var count: UInt32 = 0
    var arrived: UInt64 = 0
  }

  /// Bytes to send.
  struct Outgoing {
    var slab: Int32
    var start: Int
    var count: Int
  }

  unowned let export: NBDExport
  let target: UserTarget
  let options: NBDExport.Options
  private var socket: Descriptor?
  private var registration: EventLoop.Registration?
  private var interest = EventLoop.Readiness.readable
  var phase: Phase
  private let ended: ((NBDEnd) -> Void)?
  let since: Int64
  var owner: Int32 = -1

  // Handshake.
  var noZeroes = false
  var structured = false
  var allocationContext = false

  // Receiving.
  var slabs: NBDSlabs
  private var inSlab: Int32
  private var parsed = 0
  private var received = 0
  /// The write whose payload is being received into a slab of its own, and how much is there.
  private var filling: (request: NBDRequest, slab: Int32, done: Int)?
  /// Bytes of a refused payload still to be thrown away.
  private var skipping = 0
  /// The last write was a large one: receive its header alone, the payload goes elsewhere.
  private var expectsLarge = false
  private var isPaused = false

  // Under way.
  var pending: [Pending] = []
  var pendingFree: [Int32] = []
  var pendingCount = 0
  /// When bytes were received last, in nanoseconds.
  var arrived: UInt64 = 0
  /// Requests whose replies are queued: what they were and when they arrived.
  var answered: [(command: UInt16, arrived: UInt64)] = []
  /// The lists of block status requests, by request.
  var pendingLists: [Int32: UnsafeMutableRawPointer] = [:]

  // Sending.
  private var outSlab: Int32
  private var out: [Outgoing] = []
  private var outFirst = 0
  private var isBlocked = false
  /// The export knows already that it has something to send.
  var isListed = false
  private let vectors = UnsafeMutablePointer<iovec>.allocate(capacity: 64)

  init(
    _ export: NBDExport, _ socket: consuming Descriptor, inTransmission: Bool,
    ended: ((NBDEnd) -> Void)?
  ) throws(IOError) {
    self.export = export
    target = export.target
    options = export.options
    self.ended = ended
    since = NBDExport.now()
    phase = inTransmission ? .transmission : .clientFlags
    slabs = NBDSlabs(export.buffers)
    inSlab = slabs.take(NBDSlabs.ordinary)
    outSlab = slabs.take(NBDSlabs.ordinary)
    let raw = socket.raw
    try UnixSocket.setNonBlocking(raw)
    registration = try export.loop.add(raw, for: .readable) { [unowned self] in ready($0) }
    self.socket = consume socket
    owner = target.enroll(self)
    if !inTransmission { greet() }
  }

  deinit {
    vectors.deallocate()
  }

  /// Whether nothing is left of it but the object.
  var isOver: Bool {
    if case .closed = phase { return pendingCount == 0 }
    return false
  }

  var isInHandshake: Bool {
    switch phase {
    case .clientFlags, .options: true
    default: false
    }
  }

  private var hasOutput: Bool { outFirst < out.count }

  // MARK: Events

  private func ready(_ what: EventLoop.Readiness) {
    if what.contains(.writable) { isBlocked = false }
    if what.contains(.readable), !isPaused { receive() }
    if !what.isDisjoint(with: .hangup) {
      // Nobody is there to take a reply any more.
      if case .ending(let end) = phase {
        close(end)
      } else if isPaused || isBlocked {
        close(.closed)
      }
    }
    settle()
  }

  /// Parses what is there, sends what has gathered, and says what to wait for. True when it
  /// got on with anything.
  @discardableResult
  func settle() -> Bool {
    if case .closed = phase { return false }
    let before = (parsed, received, outFirst, pendingCount)
    if isPaused || parsed < received { parse() }
    send()
    if case .ending(let end) = phase, pendingCount == 0, !hasOutput { close(end) }
    updateInterest()
    return before != (parsed, received, outFirst, pendingCount)
  }

  private func updateInterest() {
    guard let registration else { return }
    var wanted: EventLoop.Readiness = []
    if case .ending = phase {} else if !isPaused { wanted.insert(.readable) }
    if isBlocked { wanted.insert(.writable) }
    if wanted != interest {
      interest = wanted
      export.loop.change(registration, to: wanted)
    }
  }

  /// Ends the conversation; what is under way is still answered.
  func end(_ reason: NBDEnd) {
    switch phase {
    case .ending, .closed: break
    default: phase = .ending(reason)
    }
    // A payload that is incomplete was never a request.
    if let filling {
      slabs.release(filling.slab)
      self.filling = nil
    }
    parsed = received
    isPaused = false
  }

  /// Closes the socket now. The session goes when the target has given everything back.
  func close(_ reason: NBDEnd) {
    if case .closed = phase { return }
    end(reason)
    phase = .closed(reason)
    for entry in out[outFirst...] { slabs.release(entry.slab) }
    out.removeAll()
    outFirst = 0
    if let registration { export.loop.remove(registration) }
    registration = nil
    socket = nil
    export.hasEnded(self)
  }

  /// The last of it: gives the slabs back and tells whoever wants to know.
  func bury() {
    target.dismiss(owner)
    slabs.release(inSlab)
    slabs.release(outSlab)
    if case .closed(let end) = phase { ended?(end) }
  }

  // MARK: Receiving

  private func receive() {
    guard let raw = socket?.raw else { return }
    if let filling {
      fill(raw, filling)
      return
    }
    let room = slabs.size(inSlab) - received
    let wanted = expectsLarge && parsed == received ? min(room, NBD.requestSize) : room
    let count = recv(raw, slabs.pointer(inSlab) + received, wanted, Int32(MSG_DONTWAIT))
    guard count > 0 else {
      receivedNothing(count)
      return
    }
    received += count
    arrived = RequestTimes.now()
    parse()
  }

  private func fill(_ raw: Int32, _ now: (request: NBDRequest, slab: Int32, done: Int)) {
    let rest = Int(now.request.count) - now.done
    let count = recv(raw, slabs.pointer(now.slab) + now.done, rest, Int32(MSG_DONTWAIT))
    guard count > 0 else {
      receivedNothing(count)
      return
    }
    filling?.done += count
    if count == rest {
      filling = nil
      arrived = RequestTimes.now()
      write(now.request, now.slab, 0)
      slabs.release(now.slab)
    }
  }

  private func receivedNothing(_ count: Int) {
    if count == 0 {
      end(.closed)
    } else if errno == ECONNRESET || errno == EPIPE {
      close(.closed)
    } else if errno != EAGAIN && errno != EINTR {
      close(.failed(errno))
    }
  }

  /// Whether another request may be let in that needs a buffer of so many bytes.
  private func hasRoom(for count: Int) -> Bool {
    guard pendingCount < options.maxRequests else { return false }
    return slabs.bytes + count <= options.maxBytes || (pendingCount == 0 && !hasOutput)
  }

  /// Takes every complete message that is there, as long as there is room.
  private func parse() {
    isPaused = false
    loop: while parsed < received {
      switch phase {
      case .ending, .closed: parsed = received
      case .clientFlags, .options:
        let used = negotiate(UnsafeRawPointer(slabs.pointer(inSlab)) + parsed, received - parsed)
        parsed = min(parsed + used, received)
        if used == 0 { break loop }
      case .transmission:
        if skipping > 0 {
          let count = min(skipping, received - parsed)
          skipping -= count
          parsed += count
        } else if !parseRequest() {
          break loop
        }
      }
    }
    compact()
  }

  /// Takes one request; false when it is not all there, or there is no room for it.
  private func parseRequest() -> Bool {
    guard received - parsed >= NBD.requestSize else { return false }
    let from = slabs.pointer(inSlab) + parsed
    guard let request = NBDRequest(UnsafeRawPointer(from)) else {
      end(.garbage("a request without its magic number"))
      return true
    }
    guard request.command == NBD.Command.write else {
      let needs = request.command == NBD.Command.read ? Int(request.count) : 0
      guard hasRoom(for: needs) else {
        isPaused = true
        return false
      }
      parsed += NBD.requestSize
      serve(request)
      return true
    }
    return parseWrite(request, from)
  }

  private func parseWrite(_ request: NBDRequest, _ from: UnsafeMutableRawPointer) -> Bool {
    let count = Int(request.count)
    if request.count > NBD.maximumPayload {
      end(.garbage("a write of \(request.count) bytes"))
      return true
    }
    let code = refusal(request)
    if code != 0 {
      parsed += NBD.requestSize
      skipping = count
      reply(request.cookie, code)
      return true
    }
    let there = received - parsed - NBD.requestSize
    expectsLarge = count > NBDSlabs.ordinary / 2
    if there >= count {
      guard hasRoom(for: 0) else {
        isPaused = true
        return false
      }
      let start = parsed + NBD.requestSize
      parsed = start + count
      write(request, inSlab, start)
      return true
    }
    // A small payload that is not all there is waited for where it is.
    guard expectsLarge else { return false }
    guard hasRoom(for: count) else {
      isPaused = true
      return false
    }
    let slab = slabs.take(count)
    memcpy(slabs.pointer(slab), from + NBD.requestSize, there)
    parsed = received
    filling = (request, slab, there)
    return true
  }

  /// Makes room at the end of the slab for what is to come next.
  private func compact() {
    let rest = received - parsed
    let isShared = slabs.references(inSlab) > 1
    if rest == 0, !isShared {
      parsed = 0
      received = 0
      return
    }
    // The longest message that is waited for in place has to fit.
    let needed = NBDSlabs.ordinary / 2 + NBD.requestSize
    guard slabs.size(inSlab) - parsed < needed else { return }
    if isShared {
      guard !isPaused else { return }
      let fresh = slabs.take(NBDSlabs.ordinary)
      memcpy(slabs.pointer(fresh), slabs.pointer(inSlab) + parsed, rest)
      slabs.release(inSlab)
      inSlab = fresh
    } else {
      memmove(slabs.pointer(inSlab), slabs.pointer(inSlab) + parsed, rest)
    }
    parsed = 0
    received = rest
  }

  // MARK: Sending

  /// Room for bytes to send, with a reference to its slab.
  func room(_ count: Int) -> (slab: Int32, start: Int) {
    if let start = slabs.allot(outSlab, count) { return (outSlab, start) }
    if count > NBDSlabs.ordinary / 2 { return (slabs.take(count), 0) }
    slabs.release(outSlab)
    outSlab = slabs.take(NBDSlabs.ordinary)
    guard let start = slabs.allot(outSlab, count) else {
      preconditionFailure("an empty slab without room")
    }
    return (outSlab, start)
  }

  /// Queues bytes that lie in a slab; their reference goes with them.
  func queue(_ slab: Int32, _ start: Int, _ count: Int) {
    if case .closed = phase {
      slabs.release(slab)
      return
    }
    if hasOutput, let last = out.last, last.slab == slab, last.start + last.count == start {
      out[out.count - 1].count += count
      slabs.release(slab)
      return
    }
    out.append(Outgoing(slab: slab, start: start, count: count))
  }

  /// Queues a few bytes that lie elsewhere.
  func queue(_ bytes: [UInt8]) {
    let (slab, start) = room(bytes.count)
    bytes.withUnsafeBytes { from in
      UnsafeMutableRawBufferPointer(start: slabs.pointer(slab) + start, count: bytes.count)
        .copyMemory(from: from)
    }
    queue(slab, start, bytes.count)
  }

  private func send() {
    guard let raw = socket?.raw else { return }
    if !answered.isEmpty, !isBlocked { measure() }
    while hasOutput, !isBlocked {
      let count = min(out.count - outFirst, 64)
      var bytes = 0
      for index in 0..<count {
        let entry = out[outFirst + index]
        vectors[index] = iovec(
          iov_base: slabs.pointer(entry.slab) + entry.start, iov_len: entry.count)
        bytes += entry.count
      }
      var message = msghdr()
      message.msg_iov = vectors
      message.msg_iovlen = count
      let sent = sendmsg(raw, &message, Int32(MSG_DONTWAIT | MSG_NOSIGNAL))
      if sent < 0 {
        if errno == EINTR { continue }
        guard errno == EAGAIN else {
          close(errno == EPIPE || errno == ECONNRESET ? .closed : .failed(errno))
          return
        }
        isBlocked = true
        return
      }
      take(sent)
      if sent < bytes { isBlocked = true }
    }
  }

  /// Counts the requests whose replies are about to be sent.
  private func measure() {
    let now = RequestTimes.now()
    for done in answered { export.times.add(command: done.command, now &- done.arrived) }
    answered.removeAll(keepingCapacity: true)
  }

  /// So many bytes have been sent.
  private func take(_ sent: Int) {
    var sent = sent
    while sent > 0 {
      let entry = out[outFirst]
      if sent < entry.count {
        out[outFirst].start += sent
        out[outFirst].count -= sent
        return
      }
      sent -= entry.count
      slabs.release(entry.slab)
      outFirst += 1
    }
    if outFirst == out.count {
      out.removeAll(keepingCapacity: true)
      outFirst = 0
    }
  }
}
