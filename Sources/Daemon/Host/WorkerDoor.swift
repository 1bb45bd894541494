// SPDX-License-Identifier: Apache-2.0
// The door for descriptors that come from a worker. A worker that was taken over may send anything:
// sockets whose close waits, files of file systems of its own, files of others. A descriptor is
// taken only for the file that the daemon remembers, and only with the rights that it gave.
//
// Invariants:
// - Nothing is done with a descriptor before it is known: a file of a strange file system may keep
//   whoever asks for its attributes waiting.
// - What is not taken is closed by the link's closer.

internal import BlockIO
import Glibc
internal import SystemIO
internal import WorkerLink

enum WorkerDoor {
  /// Takes the descriptor of a role if it is that of a file; nil when there is none. Throws EPERM
  /// for one of another file, or opened otherwise than it was given. Blocks.
  static func take(
    _ role: LinkRole, _ handed: LinkDescriptors, of identity: FileIdentity, writable: Bool,
    name: String
  ) throws(IOError) -> FileStore? {
    guard let raw = handed.raw(role) else { return nil }
    guard try FileIdentity(cached: raw, name: name) == identity else {
      throw IOError(EPERM, "take back as the \(role.rawValue)", "another file than \(name)")
    }
    let flags = fcntl(raw, F_GETFL)
    guard flags >= 0 else { throw IOError.last("examine", name) }
    let wanted = writable ? O_RDWR : O_RDONLY
    // Source: asm-generic/fcntl.h, O_PATH.
    let path: Int32 = 0o10000000
    guard flags & O_ACCMODE == wanted, flags & (O_APPEND | path) == 0 else {
      throw IOError(EPERM, "take back as the \(role.rawValue)", "\(name) with other rights")
    }
    guard let descriptor = handed.take(role) else { return nil }
    return try FileStore(descriptor, name: name)
  }
}
