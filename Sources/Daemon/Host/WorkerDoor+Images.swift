// SPDX-License-Identifier: Apache-2.0
// What a daemon that was started again takes back from a worker: images, with their locks, and the
// pending log.

internal import BlockIO
import Glibc
internal import SystemIO
internal import WorkerLink

extension WorkerDoor {
  /// Takes an image back that a worker has open, as the file that it is known to be, or, of a disk
  /// of an earlier daemon, the one of that name, and locks it. Throws EPERM when there is no
  /// such descriptor, EAGAIN when a stranger has it locked. Blocks.
  static func image(
    _ role: LinkRole, _ handed: LinkDescriptors, of known: FileIdentity?, path: String,
    writable: Bool, isHeld: Bool
  ) throws(IOError) -> OpenImage {
    let identity = if let known { known } else { try identity(path) }
    guard let file = try take(role, handed, of: identity, writable: writable, name: path) else {
      throw IOError(EPERM, "take back", path)
    }
    var image = OpenImage(file: file, identity: identity)
    if writable {
      image.witness = try take(.witness, handed, of: identity, writable: false, name: path)
      try image.addWitness()
    }
    guard try image.lock(exclusive: writable, isHeld: isHeld) else {
      throw IOError(EAGAIN, "lock", path)
    }
    return image
  }

  /// Takes a pending log back; nil when there is none. Where it has lost its name, since the run
  /// directory was changed, it gets it again. Throws ESTALE when another file has the name. Blocks.
  static func log(
    _ handed: LinkDescriptors, _ entry: PendingEntry, _ known: FileIdentity?
  ) throws(IOError) -> FileStore? {
    guard let raw = handed.raw(.pending) else { return nil }
    let status = try CachedStatus(raw, name: entry.path)
    guard let identity = FileIdentity(status) else {
      throw IOError(EPERM, "take back as the pending log", "what is no file")
    }
    if access(entry.path, F_OK) == 0 {
      guard try self.identity(entry.path) == identity else {
        throw IOError(ESTALE, "take over", entry.path)
      }
    } else {
      // Only the daemon makes such files, and gives no worker another one than its own.
      let folder = try CachedStatus(path: entry.registry.directory)
      guard known == nil || known == identity, status.fileSystem == folder.fileSystem,
        status.owner == geteuid(), status.mode == S_IFREG | 0o600, isLogName(raw)
      else { throw IOError(EPERM, "take back as the pending log", "another file") }
    }
    guard
      let log = try take(.pending, handed, of: identity, writable: true, name: entry.path)
    else { return nil }
    try entry.takeOver(log)
    return log
  }

  private static func isLogName(_ raw: Int32) -> Bool {
    let parts = (FileUsers.link("/proc/self/fd/\(raw)") ?? "").split(separator: "/")
    return parts.last == "pending" || parts.dropLast().last == "pending"
  }

  private static func identity(_ path: String) throws(IOError) -> FileIdentity {
    guard let identity = FileIdentity(try CachedStatus(path: path)) else {
      throw IOError(EPERM, "use (neither file nor block device)", path)
    }
    return identity
  }
}
