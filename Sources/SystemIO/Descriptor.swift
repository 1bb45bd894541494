// SPDX-License-Identifier: Apache-2.0
// Owned file descriptors. A descriptor has one owner; lending is by `raw`, giving away by
// `release`.

internal import CLinux
import Glibc

/// The owner of a file descriptor: closes it when it goes.
public struct Descriptor: ~Copyable, Sendable {
  /// The number, lent: valid only as long as this owner lives.
  public let raw: Int32

  /// Takes over an open descriptor.
  public init(owning raw: Int32) {
    self.raw = raw
  }

  /// Opens a path, with O_CLOEXEC. Throws: the errno of open(2), with the path.
  public init(path: String, flags: Int32, mode: UInt32 = 0) throws(IOError) {
    var result: Int32
    repeat {
      result = dmu_open(path, flags | O_CLOEXEC, mode)
    } while result < 0 && errno == EINTR
    guard result >= 0 else { throw IOError.last("open", path) }
    self.raw = result
  }

  /// Makes memory of so many bytes as a file that nobody can make longer or shorter. Throws: the
  /// errno of memfd_create(2) or fcntl(2).
  public init(sealedMemory length: UInt64, name: String) throws(IOError) {
    let result = dmu_sealed_memory(name, off_t(length))
    guard result >= 0 else { throw IOError.last("make memory for", name) }
    self.raw = result
  }

  /// A duplicate of a descriptor that is somebody else's. Throws the errno of fcntl(2).
  package init(copying raw: Int32) throws(IOError) {
    let copy = fcntl(raw, F_DUPFD_CLOEXEC, 3)
    guard copy >= 0 else { throw IOError.last("duplicate a descriptor") }
    self.init(owning: copy)
  }

  deinit {
    _ = Glibc.close(raw)
  }

  /// Gives the descriptor away: the caller closes it.
  public consuming func release() -> Int32 {
    let number = raw
    discard self
    return number
  }

  /// Closes, and tells what close(2) said: on some file systems the last word on a write.
  public consuming func close() throws(IOError) {
    let number = release()
    guard Glibc.close(number) == 0 else { throw IOError.last("close") }
  }

  /// A second descriptor of the same open file. Throws: the errno of fcntl(2).
  public func duplicate() throws(IOError) -> Descriptor { try Descriptor(copying: raw) }
}
