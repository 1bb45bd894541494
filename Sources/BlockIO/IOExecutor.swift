// SPDX-License-Identifier: Apache-2.0
// How a target moves bytes of its backing devices: at once where nothing has to be waited
// for, else elsewhere with news of the end. The real one is PoolExecutor; tests bring one
// that completes in any order, fails and loses power.

/// One operation on a backing device. The buffer is lent until the operation has ended.
package struct BackingIO {
  /// What is to be done.
  package enum Operation: UInt8, Sendable {
    /// Fill the buffer; past the end of the device, with zeroes.
    case read
    /// Write the buffer.
    case write
    /// Make the range read as zeroes and give its space back.
    case punch
    /// Make the range read as zeroes and keep its space.
    case zero
    /// Make durable whatever was written before.
    case flush
  }

  /// What is to be done.
  package var operation: Operation
  /// The device's number.
  package var device: UInt16
  /// Bytes from the device's start.
  package var offset: UInt64
  /// Bytes of the range.
  package var count: Int
  /// `count` bytes for read and write, else nil.
  package var buffer: UnsafeMutableRawPointer?
  /// What the completion is told by.
  package var token: UInt32

  /// An operation from its parts.
  package init(
    _ operation: Operation, device: UInt16, offset: UInt64 = 0, count: Int = 0,
    buffer: UnsafeMutableRawPointer? = nil, token: UInt32 = 0
  ) {
    self.operation = operation
    self.device = device
    self.offset = offset
    self.count = count
    self.buffer = buffer
    self.token = token
  }
}

/// Does the backing I/O of one target. Called from the target's thread, and calls back there.
package protocol IOExecutor: AnyObject {
  /// Called with the token and the errno, or 0, of each operation that was started; never
  /// from within `start`.
  var completion: ((_ token: UInt32, _ code: Int32) -> Void)? { get set }

  /// How many backing devices there are: 0 the store, 1 the base.
  var deviceCount: Int { get }

  /// Whether a device may be written.
  func isWritable(_ device: UInt16) -> Bool

  /// What messages call a device.
  func name(_ device: UInt16) -> String

  /// The byte from which on a device is known to read as zeroes for ever; UInt64.max when it
  /// may grow.
  func end(_ device: UInt16) -> UInt64

  /// Reads or writes at once what can be done without waiting: how many bytes, at least one,
  /// or minus an errno; -EAGAIN means that it has to be started instead.
  func attempt(_ io: BackingIO) -> Int

  /// Starts an operation that may take its time.
  func start(_ io: BackingIO)

  /// Runs a commit off the loop's thread, then `then` with its result on it.
  func run(
    _ work: @escaping @Sendable () -> CommitFailure?, then: @escaping (CommitFailure?) -> Void
  )

  /// How far the bytes from `offset` on, at most `limit` of them and at least one, are alike
  /// in being known to read as zeroes (a hole) or not.
  func hole(_ device: UInt16, at offset: UInt64, limit: UInt64) -> (isHole: Bool, count: UInt64)
}

extension IOExecutor {
  /// Its number, where nothing better is known.
  package func name(_ device: UInt16) -> String { "device \(device)" }
}
