// SPDX-License-Identifier: Apache-2.0
// Opening what a path names only when it is a file or a block device. Opening anything else may do
// something (a device), or wait (a pipe).

internal import CLinux
import Glibc

extension Descriptor {
  /// Opens a file or a block device. Without `followsLinks` no component of the path, which is
  /// absolute, may be a symbolic link. Throws: the errno of open(2) or openat2(2); ELOOP for a
  /// link that may not be there; EINVAL for what is neither file nor block device.
  package init(
    imagePath path: String, flags: Int32, followsLinks: Bool = true
  ) throws(IOError) {
    var raw: Int32
    repeat {
      raw = followsLinks ? dmu_find(path) : dmu_find_plain(path)
    } while raw < 0 && (errno == EINTR || errno == EAGAIN)
    guard raw >= 0 else { throw IOError.last("open", path) }
    let found = Descriptor(owning: raw)
    let kind = try CachedStatus(found.raw, name: path).mode & S_IFMT
    guard kind == S_IFREG || kind == S_IFBLK else {
      throw IOError(EINVAL, "open (neither file nor block device)", path)
    }
    do throws(IOError) {
      try self.init(path: "/proc/self/fd/\(found.raw)", flags: flags)
    } catch { throw IOError(error.code, "open", path) }
  }
}
