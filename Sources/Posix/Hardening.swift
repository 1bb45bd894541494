// What a process gives up and asks for itself before it serves a guest's disk.

internal import CLinux
import Glibc

/// Steps that a worker takes on itself. Each throws alone, so that the caller decides what
/// is fatal.
public enum Hardening {
  /// Keeps every page in memory once it has been touched, so that serving a disk never
  /// waits for swap that may lie on that disk. Lifts the limit on locked memory first, since
  /// after the privileges are gone each new page would count against it.
  /// Throws: the errno of setrlimit(2) or mlockall(2). Source: mlockall(2), MCL_ONFAULT.
  public static func lockMemory() throws(IOError) {
    guard dmu_lift_memory_limit() == 0 else {
      throw IOError.last("lift the limit on locked memory")
    }
    guard dmu_lock_memory() == 0 else { throw IOError.last("lock memory") }
  }

  /// Tells the kernel that this process takes part in writing dirty pages out: its own
  /// allocations then never wait for that. Needs CAP_SYS_RESOURCE. Source: prctl(2),
  /// PR_SET_IO_FLUSHER.
  public static func becomeFlusher() throws(IOError) {
    let setFlusher: Int32 = 57
    guard dmu_prctl(setFlusher, 1) == 0 else { throw IOError.last("become an I/O flusher") }
  }

  /// Gives up root for this user and group, with no other groups and no way back, and lets
  /// no program that is started gain any right. Without root only the latter.
  /// Throws: the errno of the call that failed.
  public static func dropPrivileges(uid: UInt32, gid: UInt32) throws(IOError) {
    let noNewPrivileges: Int32 = 38
    if geteuid() == 0 {
      guard setgroups(0, nil) == 0 else { throw IOError.last("drop the groups") }
      guard dmu_set_user(uid, gid) == 0 else { throw IOError.last("become user", "\(uid)") }
      // What the calls say is looked at.
      guard getuid() == uid, geteuid() == uid, getgid() == gid, getegid() == gid else {
        throw IOError(EPERM, "become user", "\(uid)")
      }
    }
    guard dmu_prctl(noNewPrivileges, 1) == 0 else { throw IOError.last("renounce new rights") }
  }

  /// Bytes of this process in memory. Source: proc_pid_statm(5), field 2.
  public static func residentMemory() throws(IOError) -> UInt64 {
    let path = "/proc/self/statm"
    let file = try Descriptor(path: path, flags: O_RDONLY)
    var buffer = [UInt8](repeating: 0, count: 256)
    let count = Glibc.read(file.raw, &buffer, buffer.count)
    guard count > 0 else { throw IOError.last("read", path) }
    let fields = String(decoding: buffer[..<count], as: UTF8.self).split(separator: " ")
    guard fields.count > 1, let pages = UInt64(fields[1]) else {
      throw IOError(EPROTO, "read", path)
    }
    return pages * UInt64(sysconf(Int32(_SC_PAGESIZE)))
  }
}
