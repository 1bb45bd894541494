// SPDX-License-Identifier: Apache-2.0
// The smallest worker in Swift: every block lives where it is, on device 0; each fault is
// logged. It is linear.c over the library DMU.
//
//   dmsetup create toy --table '0 LEN userspace toy 128 1 /dev/loop0'
//   swift run linear toy
//
// It remembers nothing: mappings are told as they are asked for, and because none is
// uncommitted no flush ever comes here. When it ends the device goes on with what it knows.

import DMU
import Glibc
import SystemIO

/// Writes a line at once.
func say(_ line: String) {
  let bytes = Array((line + "\n").utf8)
  // Nobody may be listening; that is no reason not to serve.
  _ = write(1, bytes, bytes.count)
}

/// Answers what is asked until the device goes.
func serve(_ node: Node) throws {
  _ = try node.answer(.getVersion)
  guard case .version(let geometry)? = try node.next(within: 10_000), geometry.version == 1 else {
    throw IOError(EPROTO, "speak with", "the node")
  }
  let sectors = UInt64(geometry.blockSectors)
  while true {
    guard let message = try node.next(within: -1) else { continue }
    let answer: Answer
    switch message {
    case .fault(let id, let block, let count, let write, _, _):
      say("fault \(id): \(write ? "write" : "read") block \(block)")
      let place = Answer.Place(device: 0, sector: block * sectors)
      answer = .map(id: id, block: block, count: count, at: place, writable: true)
    case .discard(let id, let block, let count, let zeroing):
      say("fault \(id): discard block \(block)")
      let place = Answer.Place(device: 0, sector: block * sectors)
      answer =
        zeroing
        ? .map(id: id, block: block, count: count, at: place, writable: true)
        : .done(id: id, count: count)
    default: continue
    }
    let refusal = try node.answer(answer)
    if refusal != 0 { say("refused: \(String(cString: strerror(refusal)))") }
  }
}

guard CommandLine.arguments.count == 2 else {
  say("usage: linear NAME")
  exit(2)
}
do {
  try serve(try Node(name: CommandLine.arguments[1]))
} catch let error as IOError where error.code == ENODEV {
  say("the device is gone")
} catch {
  say("linear: \(error)")
  exit(1)
}
