// SPDX-License-Identifier: Apache-2.0
// The worker's end of a dmu device: reads messages in batches, gives answers in batches.

internal import DMUProtocol
internal import Glibc
public import SystemIO

/// An opened /dev/dmu/NAME, or a descriptor of one that was handed over. One thread.
public final class Node {
  /// The descriptor: readable when there are messages.
  public let descriptor: Descriptor
  private var batch = [dmu_message](repeating: dmu_message(), count: 64)
  private var count = 0
  private var taken = 0

  /// Takes over an open node.
  public init(owning descriptor: consuming Descriptor) throws(IOError) {
    let flags = fcntl(descriptor.raw, F_GETFL)
    let isSet = flags >= 0 && flags & O_NONBLOCK != 0
    guard isSet || flags >= 0 && fcntl(descriptor.raw, F_SETFL, flags | O_NONBLOCK) == 0 else {
      throw IOError.last("set flags", "a dmu node")
    }
    self.descriptor = descriptor
  }

  /// Opens a device's node by the device's NAME. Throws: EPERM without CAP_SYS_ADMIN, EBUSY
  /// when it has an opener, ENOENT when there is no such device.
  public convenience init(name: String) throws(IOError) {
    try self.init(owning: Descriptor(path: "/dev/dmu/" + name, flags: O_RDWR | O_NONBLOCK))
  }

  /// The next message; nil when there is none now. Throws: ENODEV when the device is gone.
  public func next() throws(IOError) -> Message? {
    if taken == count { try refill() }
    guard taken < count else { return nil }
    taken += 1
    return Message(batch[taken - 1])
  }

  /// Waits for the next message for at most so many milliseconds; -1 is for ever.
  public func next(within milliseconds: Int32) throws(IOError) -> Message? {
    if let message = try next() { return message }
    var wait = pollfd(fd: descriptor.raw, events: Int16(POLLIN), revents: 0)
    guard poll(&wait, 1, milliseconds) >= 0 || errno == EINTR else {
      throw IOError.last("wait for", "a dmu node")
    }
    return try next()
  }

  private func refill() throws(IOError) {
    let size = batch.withUnsafeMutableBytes { buffer in
      read(descriptor.raw, buffer.baseAddress, buffer.count)
    }
    taken = 0
    count = 0
    if size < 0 {
      guard errno == EAGAIN || errno == EINTR else { throw IOError.last("read", "a dmu node") }
      return
    }
    count = size / MemoryLayout<dmu_message>.stride
  }

  /// Gives answers, in order; each has its own result: 0, or the errno of its refusal.
  public func answer(_ answers: [Answer]) throws(IOError) -> [Int32] {
    var raw = answers.map(\.raw)
    try raw.withUnsafeMutableBufferPointer { (buffer) throws(IOError) in
      var start = 0
      while start < buffer.count {
        let part = min(buffer.count - start, Int(DMU_MAX_BATCH))
        try call(buffer.baseAddress! + start, part)
        start += part
      }
    }
    return raw.map { -$0.result }
  }

  /// The number of the request by which answers are given, for a filter of system calls.
  public static var answerRequest: UInt32 { dmu_answer_request() }

  private func call(_ answers: UnsafeMutablePointer<dmu_answer>, _ count: Int) throws(IOError) {
    var order = dmu_batch()
    order.answers = UInt64(UInt(bitPattern: answers))
    order.count = UInt32(count)
    guard dmu_answer_call(descriptor.raw, &order) == 0 else {
      throw IOError.last("answer", "a dmu node")
    }
  }

  /// Gives one answer that maps something uncommitted; its mark, which the module gives if it has none,
  /// or the errno of its refusal. Mark 0: nobody waits for it any more, and the placement has come to
  /// nothing, which `Message.mapError` says.
  public func answer(
    marking answer: Answer
  ) throws(IOError) -> (code: Int32, mark: UInt64) {
    var raw = answer.raw
    try withUnsafeMutablePointer(to: &raw) { (one) throws(IOError) in try call(one, 1) }
    return (-raw.result, raw.mark)
  }

  /// Gives one answer; 0, or the errno of its refusal. Needs no memory.
  public func answer(_ answer: Answer) throws(IOError) -> Int32 {
    var raw = answer.raw
    try withUnsafeMutablePointer(to: &raw) { (one) throws(IOError) in try call(one, 1) }
    return -raw.result
  }
}
