// SPDX-License-Identifier: Apache-2.0
// The fixed newstyle handshake.

import Target

extension NBDSession {
  /// No option has more data than this to say.
  private static let longestOption: UInt32 = 16 << 10

  /// The server speaks first.
  func greet() {
    var bytes: [UInt8] = []
    bytes.put(NBD.magic)
    bytes.put(NBD.optionMagic)
    bytes.put(NBD.fixedNewstyle | NBD.noZeroes)
    queue(bytes)
    export.hasOutput(self)
  }

  /// Takes one message of the handshake and returns its length, 0 when it is not all there.
  func negotiate(_ from: UnsafeRawPointer, _ count: Int) -> Int {
    if case .clientFlags = phase {
      guard count >= 4 else { return 0 }
      let flags = from.bigEndian(0, UInt32.self)
      guard flags & ~3 == 0, flags & 1 != 0 else {
        end(.garbage("a client that does not speak fixed newstyle"))
        return 4
      }
      noZeroes = flags & 2 != 0
      phase = .options
      return 4
    }
    guard count >= 16 else { return 0 }
    let option = from.bigEndian(8, UInt32.self)
    let length = from.bigEndian(12, UInt32.self)
    guard from.bigEndian(0, UInt64.self) == NBD.optionMagic else {
      end(.garbage("an option without its magic number"))
      return count
    }
    guard length <= NBDSession.longestOption else {
      answer(option, NBD.Reply.errorTooBig)
      end(.garbage("an option with \(length) bytes"))
      return count
    }
    guard count >= 16 + Int(length) else { return 0 }
    take(option, UnsafeRawBufferPointer(start: from + 16, count: Int(length)))
    return 16 + Int(length)
  }

  private func take(_ option: UInt32, _ data: UnsafeRawBufferPointer) {
    switch option {
    case NBD.Option.exportName: exportName(data)
    case NBD.Option.abort:
      answer(option, NBD.Reply.ack)
      end(.disconnected)
    case NBD.Option.list: list(data)
    case NBD.Option.info, NBD.Option.go: info(option, data)
    case NBD.Option.structuredReply:
      guard data.isEmpty else { return answer(option, NBD.Reply.errorInvalid) }
      structured = true
      answer(option, NBD.Reply.ack)
    case NBD.Option.listMetaContext, NBD.Option.setMetaContext: metaContext(option, data)
    case NBD.Option.startTLS: answer(option, NBD.Reply.errorPolicy)
    default: answer(option, NBD.Reply.errorUnsupported)
    }
  }

  private func answer(_ option: UInt32, _ reply: UInt32, _ data: [UInt8] = []) {
    var bytes: [UInt8] = []
    bytes.put(NBD.optionReplyMagic)
    bytes.put(option)
    bytes.put(reply)
    bytes.put(UInt32(data.count))
    bytes += data
    queue(bytes)
  }

  private func isOurs(_ name: some Sequence<UInt8>) -> Bool {
    let name = Array(name)
    return name.isEmpty || name == Array(options.name.utf8)
  }

  private var transmissionFlags: UInt16 {
    NBDExport.transmissionFlags(readOnly: options.readOnly)
      | (structured ? NBD.Flag.sendDontFragment : 0)
  }

  private func exportName(_ data: UnsafeRawBufferPointer) {
    // This option has no way to say no.
    guard isOurs(data) else { return end(.garbage("an unknown export")) }
    var bytes: [UInt8] = []
    bytes.put(target.size)
    bytes.put(transmissionFlags)
    if !noZeroes { bytes += [UInt8](repeating: 0, count: 124) }
    queue(bytes)
    phase = .transmission
  }

  private func list(_ data: UnsafeRawBufferPointer) {
    guard data.isEmpty else { return answer(NBD.Option.list, NBD.Reply.errorInvalid) }
    var entry: [UInt8] = []
    entry.put(UInt32(options.name.utf8.count))
    entry += options.name.utf8
    entry += options.description.utf8
    answer(NBD.Option.list, NBD.Reply.server, entry)
    answer(NBD.Option.list, NBD.Reply.ack)
  }

  /// Reads a counted string at an offset, and moves the offset past it.
  private func string(_ data: UnsafeRawBufferPointer, _ at: inout Int) -> UnsafeRawBufferPointer? {
    guard let base = data.baseAddress, data.count - at >= 4 else { return nil }
    let length = Int((base + at).bigEndian(0, UInt32.self))
    at += 4
    guard length <= 4096, data.count - at >= length else { return nil }
    defer { at += length }
    return UnsafeRawBufferPointer(rebasing: data[at..<at + length])
  }

  private func info(_ option: UInt32, _ data: UnsafeRawBufferPointer) {
    var at = 0
    guard let base = data.baseAddress, let name = string(data, &at), data.count - at >= 2,
      data.count - at - 2 == 2 * Int((base + at).bigEndian(0, UInt16.self))
    else { return answer(option, NBD.Reply.errorInvalid) }
    guard isOurs(name) else { return answer(option, NBD.Reply.errorUnknown) }
    let wanted = stride(from: at + 2, to: data.count, by: 2).map {
      (base + $0).bigEndian(0, UInt16.self)
    }
    func tell(_ kind: UInt16, _ body: [UInt8]) {
      var bytes: [UInt8] = []
      bytes.put(kind)
      answer(option, NBD.Reply.info, bytes + body)
    }
    if wanted.contains(NBD.Info.name) { tell(NBD.Info.name, Array(options.name.utf8)) }
    if wanted.contains(NBD.Info.description), !options.description.isEmpty {
      tell(NBD.Info.description, Array(options.description.utf8))
    }
    var sizes: [UInt8] = []
    sizes.put(UInt32(1))
    sizes.put(UInt32(4096))
    sizes.put(NBD.maximumPayload)
    tell(NBD.Info.blockSize, sizes)
    var export: [UInt8] = []
    export.put(target.size)
    export.put(transmissionFlags)
    tell(NBD.Info.export, export)
    answer(option, NBD.Reply.ack)
    if option == NBD.Option.go { phase = .transmission }
  }

  private func metaContext(_ option: UInt32, _ data: UnsafeRawBufferPointer) {
    let sets = option == NBD.Option.setMetaContext
    if sets { allocationContext = false }
    var at = 0
    guard structured, let base = data.baseAddress, let name = string(data, &at),
      data.count - at >= 4
    else { return answer(option, NBD.Reply.errorInvalid) }
    guard isOurs(name) else { return answer(option, NBD.Reply.errorUnknown) }
    let count = Int((base + at).bigEndian(0, UInt32.self))
    at += 4
    var wanted = !sets && count == 0
    for _ in 0..<count {
      guard let query = string(data, &at) else { return answer(option, NBD.Reply.errorInvalid) }
      let text = String(decoding: query, as: UTF8.self)
      if text == NBD.allocationContext || (!sets && text == "base:") { wanted = true }
    }
    guard at == data.count else { return answer(option, NBD.Reply.errorInvalid) }
    if wanted {
      if sets { allocationContext = true }
      var bytes: [UInt8] = []
      bytes.put(sets ? NBD.allocationID : 0)
      bytes += NBD.allocationContext.utf8
      answer(option, NBD.Reply.metaContext, bytes)
    }
    answer(option, NBD.Reply.ack)
  }
}
