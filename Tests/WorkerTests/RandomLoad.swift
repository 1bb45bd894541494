// SPDX-License-Identifier: Apache-2.0
// Random requests against a model: what a guest may see, checked on every reply.

import Glibc
import Testing
import TestSupport

/// A load that goes on over a client that may die and be replaced.
final class RandomLoad {
  private struct Request {
    let kind: TestNBDClient.Kind
    let sectors: Range<Int>
    let stamp: UInt64
    let fua: Bool
    var write: NaiveDisk.Write?
    var flush: Int?

    var data: [UInt8] {
      kind == .write ? Stamp.sectors(sectors.count, stamp) : []
    }
  }

  var model: NaiveDisk
  var random: SplitMix64
  /// Replies so far.
  private(set) var replies = 0
  /// What was wrong, in words; empty when nothing was.
  private(set) var wrongs: [String] = []
  private var underWay: [UInt64: Request] = [:]
  private var lastHandle: UInt64 = 0
  private var lastStamp: UInt64
  private let longest: Int
  private let trims: Bool
  private let overlaps: Bool
  private let stripe: Stripe?

  /// Every so manieth piece of a disk, for one of several loads at once: what another client
  /// is told, and when, says nothing about the order of requests, so each has its own sectors.
  struct Stripe {
    let index: Int
    let count: Int
    /// Sectors of a piece.
    let width: Int

    func contains(_ sector: Int) -> Bool { sector / width % count == index }
  }

  /// `longest` is that of a request in sectors. With `repeats` what is under way may be sent
  /// again after what came later has been answered: then no two requests under way may touch
  /// the same sectors (nor does a kernel's), and nothing is trimmed, so that every answer is
  /// determined.
  init(
    _ model: NaiveDisk, seed: UInt64, longest: Int, repeats: Bool, stripe: Stripe? = nil
  ) {
    self.model = model
    self.stripe = stripe
    lastStamp = UInt64(stripe?.index ?? 0) << 32
    self.longest = longest
    trims = !repeats
    overlaps = !repeats
    random = SplitMix64(seed: seed)
  }

  /// Requests without a reply.
  var outstanding: Int { underWay.count }

  /// Fills the client up to a depth, and takes the replies that come within so long.
  func turn(_ client: TestNBDClient, depth: Int, milliseconds: Int32) throws {
    // A try may find no free place.
    for _ in 0..<depth where underWay.count < depth { begin(client) }
    for reply in try client.turn(milliseconds: milliseconds) { take(reply) }
  }

  /// Goes on without new requests until every reply has come, or the server has gone.
  func drain(_ client: TestNBDClient) throws {
    for _ in 0..<3000 where outstanding > 0 && !client.ended {
      for reply in try client.turn(milliseconds: 10) { take(reply) }
    }
  }

  /// Takes what the dead server had still sent.
  func takeRest(_ client: TestNBDClient) throws {
    for _ in 0..<1000 where !client.ended {
      for reply in try client.turn(milliseconds: 10) { take(reply) }
    }
    if !client.ended { wrongs.append("the connection of a dead server did not end") }
  }

  /// Sends everything without a reply again, as the kernel does.
  func resend(_ client: TestNBDClient) {
    for (handle, request) in underWay.sorted(by: { $0.key < $1.key }) {
      send(client, handle, request)
    }
  }

  /// Forgets what is under way: nobody will answer it.
  func forget() { underWay = [:] }

  /// The whole disk was read: each sector may hold what it holds after a death, and from now
  /// on it does.
  func settle(_ bytes: [UInt8], after event: String) {
    var found: [UInt64] = []
    bytes.withUnsafeBytes { bytes in
      for sector in 0..<model.count {
        let stamp = Stamp.read(bytes, at: sector * 512) ?? .max
        found.append(stamp)
        if let stripe, !stripe.contains(sector) { continue }
        guard !model.mayHold(stamp, sector: sector) else { continue }
        wrongs.append(
          "after \(event) sector \(sector) holds \(stamp), not one of "
            + "\(model.candidates(sector: sector))")
      }
    }
    model.settle(found)
  }

  private func begin(_ client: TestNBDClient) {
    lastHandle += 1
    lastStamp += 1
    let kind: TestNBDClient.Kind =
      switch random.below(100) {
      case 0..<30: .read
      case 30..<80: .write
      case 80..<88: .writeZeroes
      case 88..<94: trims ? .trim : .write
      default: .flush
      }
    let start = random.below(model.count)
    var end = min(model.count, start + 1 + random.below(longest))
    if let stripe {
      guard stripe.contains(start) else { return }
      end = min(end, (start / stripe.width + 1) * stripe.width)
    }
    guard overlaps || !underWay.values.contains(where: { $0.sectors.overlaps(start..<end) }) else {
      return
    }
    var request = Request(
      kind: kind, sectors: start..<end, stamp: lastStamp,
      fua: kind == .write && random.chance(5))
    switch kind {
    case .write: request.write = model.begin(request.sectors, stamp: request.stamp)
    case .writeZeroes: request.write = model.begin(request.sectors, stamp: 0)
    case .trim: request.write = model.beginDiscard(request.sectors)
    case .flush: request.flush = model.beginFlush()
    case .read, .disconnect: break
    }
    underWay[lastHandle] = request
    send(client, lastHandle, request)
  }

  private func send(_ client: TestNBDClient, _ handle: UInt64, _ request: Request) {
    let isFlush = request.kind == .flush
    client.submit(
      request.kind, handle: handle, offset: isFlush ? 0 : UInt64(request.sectors.lowerBound) * 512,
      length: isFlush ? 0 : request.sectors.count * 512, data: request.data, fua: request.fua)
  }

  private func take(_ reply: TestNBDClient.Reply) {
    guard let request = underWay.removeValue(forKey: reply.handle) else {
      wrongs.append("a reply to \(reply.handle), which was not asked or has been answered")
      return
    }
    replies += 1
    guard reply.error == 0 else {
      wrongs.append("\(request.kind) of \(request.sectors) failed with \(reply.error)")
      return
    }
    if let write = request.write { model.end(write) }
    if let flush = request.flush { model.flushed(flush) }
    guard request.kind == .read else { return }
    reply.data.withUnsafeBytes { bytes in
      for (index, sector) in request.sectors.enumerated() {
        let stamp = Stamp.read(bytes, at: index * 512) ?? .max
        guard !model.mayRead(stamp, sector: sector) else { continue }
        wrongs.append(
          "a read of sector \(sector) gave \(stamp), not one of \(model.candidates(sector: sector))"
        )
      }
    }
  }
}

/// Milliseconds of a clock that only goes on.
func milliseconds() -> Int {
  var time = timespec()
  clock_gettime(CLOCK_MONOTONIC, &time)
  return time.tv_sec * 1000 + time.tv_nsec / 1_000_000
}
