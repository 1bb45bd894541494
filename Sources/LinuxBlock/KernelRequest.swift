// SPDX-License-Identifier: Apache-2.0
// One request to the kernel through libdevmapper.
//
// Invariants:
// - libdevmapper is loaded with the first request. A failure to load it is that request's; the next
//   one tries again.
// - The library keeps a queue of nodes to make and remove, and is not made for threads: what
//   touches it happens under `gate`. Waiting for an event does not touch it and holds nothing.
// - A request that makes udev act ends only when udev is done with it, as for dmsetup.

internal import CDeviceMapper
import Glibc
import Synchronization

/// A request being put together and run.
struct KernelRequest: ~Copyable {
  private static let gate = Mutex(())
  private static let loaded = Mutex<libdevmapper?>(nil)

  let library: libdevmapper
  let raw: OpaquePointer
  private let operation: String
  private let subject: String

  /// Does one request. `body` fills it in, `run`s it and reads what came of it.
  static func perform<R: Sendable>(
    _ type: Int, _ operation: String, _ subject: String,
    _ body: (borrowing KernelRequest) throws(DeviceMapperError) -> R
  ) throws(DeviceMapperError) -> R {
    try gate.withLock { _ in attempt(type, operation, subject, body) }.get()
  }

  /// The same without keeping others from theirs: for what waits and touches no node.
  static func performApart<R: Sendable>(
    _ type: Int, _ operation: String, _ subject: String,
    _ body: (borrowing KernelRequest) throws(DeviceMapperError) -> R
  ) throws(DeviceMapperError) -> R {
    try attempt(type, operation, subject, body).get()
  }

  private static func attempt<R: Sendable>(
    _ type: Int, _ operation: String, _ subject: String,
    _ body: (borrowing KernelRequest) throws(DeviceMapperError) -> R
  ) -> Result<R, DeviceMapperError> {
    do throws(DeviceMapperError) {
      let task = try KernelRequest(type, operation, subject)
      return .success(try body(task))
    } catch { return .failure(error) }
  }

  private init(
    _ type: Int, _ operation: String, _ subject: String
  ) throws(DeviceMapperError) {
    let library = try KernelRequest.load(operation, subject)
    guard let raw = library.dm_task_create(Int32(type)) else {
      throw DeviceMapperError(ENOMEM, operation, subject)
    }
    self.library = library
    self.raw = raw
    self.operation = operation
    self.subject = subject
  }

  /// The library's functions. Throws ELIBACC, with the loader's words, if it is not installed.
  private static func load(
    _ operation: String, _ subject: String
  ) throws(DeviceMapperError) -> libdevmapper {
    let result: Result<libdevmapper, DeviceMapperError> = loaded.withLock { loaded in
      if let library = loaded { return .success(library) }
      let library = UnsafeMutablePointer<libdevmapper>.allocate(capacity: 1)
      defer { library.deallocate() }
      if let reason = libdevmapper_load(library) {
        let words = "libdevmapper is needed for this: \(String(cString: reason))"
        return .failure(DeviceMapperError(ELIBACC, operation, subject, explanation: words))
      }
      loaded = library.pointee
      return .success(library.pointee)
    }
    return try result.get()
  }

  deinit { library.dm_task_destroy(raw) }

  /// Throws when the library did not take a part of the request.
  borrowing func set(_ result: Int32) throws(DeviceMapperError) {
    guard result == 0 else { return }
    throw DeviceMapperError(EINVAL, operation, subject)
  }

  /// Names the device that the request is about.
  borrowing func name(_ name: String) throws(DeviceMapperError) {
    try set(library.dm_task_set_name(raw, name))
  }

  /// Runs it. With a log, the kernel's words of the device go into the error.
  borrowing func run() throws(DeviceMapperError) {
    let log = KernelLog.open()
    guard library.dm_task_run(raw) == 0 else { return }
    throw failure(log?.explanation(of: nil))
  }

  /// Runs what makes udev act, and waits for udev. Unless `probed`, udev's rules do not look
  /// into the device.
  borrowing func runWithNodes(probed: Bool = true) throws(DeviceMapperError) {
    var cookie: UInt32 = 0
    let blind =
      DM_UDEV_DISABLE_SUBSYSTEM_RULES_FLAG | DM_UDEV_DISABLE_DISK_RULES_FLAG
      | DM_UDEV_DISABLE_OTHER_RULES_FLAG
    try set(library.dm_task_set_cookie(raw, &cookie, UInt16(probed ? 0 : blind)))
    let log = KernelLog.open()
    let done = library.dm_task_run(raw) != 0
    let error = done ? nil : failure(log?.explanation(of: nil))
    let waited = library.dm_udev_wait(cookie) != 0
    if let error { throw error }
    guard waited else { throw DeviceMapperError(EIO, "wait for udev to see", subject) }
  }

  private borrowing func failure(_ explanation: String?) -> DeviceMapperError {
    let code = library.dm_task_get_errno(raw)
    return DeviceMapperError(
      code > 0 ? code : EIO, operation, subject, explanation: explanation)
  }

  /// The answer's head.
  borrowing func information() throws(DeviceMapperError) -> dm_info {
    var info = dm_info()
    try set(library.dm_task_get_info(raw, &info))
    return info
  }

  /// The answer's lines.
  borrowing func lines() -> [KernelLine] {
    var lines: [KernelLine] = []
    var next: UnsafeMutableRawPointer?
    repeat {
      var start: UInt64 = 0
      var length: UInt64 = 0
      var target: UnsafeMutablePointer<CChar>?
      var words: UnsafeMutablePointer<CChar>?
      next = library.dm_get_next_target(raw, next, &start, &length, &target, &words)
      guard let target else { break }
      lines.append(
        KernelLine(
          start: start, length: length, target: String(cString: target),
          words: words.map { String(cString: $0) } ?? ""))
    } while next != nil
    return lines
  }
}
