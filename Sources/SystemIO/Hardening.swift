// SPDX-License-Identifier: Apache-2.0
// What a process gives up and asks for itself before it serves a guest's disk.

internal import CLinux
import Glibc

/// Steps that a worker takes on itself. Each throws alone, so that the caller decides what
/// is fatal.
package enum Hardening {
  /// Keeps every page in memory once it has been touched, so that serving a disk never
  /// waits for swap that may lie on that disk. Lifts the limit on locked memory first, since
  /// after the privileges are gone each new page would count against it.
  /// Throws: the errno of setrlimit(2) or mlockall(2). Source: mlockall(2), MCL_ONFAULT.
  package static func lockMemory() throws(IOError) {
    guard dmu_lift_memory_limit() == 0 else {
      throw IOError.last("lift the limit on locked memory")
    }
    guard dmu_lock_memory() == 0 else { throw IOError.last("lock memory") }
  }

  /// Tells the kernel that this process takes part in writing dirty pages out: its own
  /// allocations then never wait for that. Needs CAP_SYS_RESOURCE. Source: prctl(2),
  /// PR_SET_IO_FLUSHER.
  package static func becomeFlusher() throws(IOError) {
    let setFlusher: Int32 = 57
    guard dmu_prctl(setFlusher, 1) == 0 else { throw IOError.last("become an I/O flusher") }
  }

  /// Becomes this user and group, with no other groups and no way back. Needs root.
  /// Throws: the errno of the call that failed.
  package static func become(uid: UInt32, gid: UInt32) throws(IOError) {
    guard setgroups(0, nil) == 0 else { throw IOError.last("drop the groups") }
    guard dmu_set_user(uid, gid) == 0 else { throw IOError.last("become user", "\(uid)") }
    // What the calls say is looked at.
    guard getuid() == uid, geteuid() == uid, getgid() == gid, getegid() == gid else {
      throw IOError(EPERM, "become user", "\(uid)")
    }
  }

  /// Takes every capability out of the bounding set: no program that is started can get one. Needs
  /// CAP_SETPCAP. Throws: the errno of prctl(2).
  package static func emptyBoundingSet() throws(IOError) {
    guard dmu_empty_bounding_set() == 0 else {
      throw IOError.last("empty the bounding set of capabilities")
    }
  }

  /// Takes every capability out of every other set, lets no program that is started gain any right,
  /// and keeps other processes of the user from looking into this one.
  /// Throws: the errno of the call that failed. Sources: capabilities(7), prctl(2).
  package static func renounceRights() throws(IOError) {
    let (setDumpable, noNewPrivileges): (Int32, Int32) = (4, 38)
    guard dmu_drop_capabilities() == 0, dmu_has_capabilities() == 0 else {
      throw IOError.last("drop the capabilities")
    }
    guard dmu_prctl(noNewPrivileges, 1) == 0 else { throw IOError.last("renounce new rights") }
    guard dmu_prctl(setDumpable, 0) == 0 else { throw IOError.last("hide from other processes") }
  }

  /// Moves into new mount, network, IPC, UTS and cgroup namespaces, and makes the root of the
  /// first an empty file system that nobody can write to. What is open stays open. A process
  /// without root does so in a new user namespace, in which it stays the user that it is. Needs a
  /// single thread. Throws: the errno of the call that failed. Source: user_namespaces(7).
  package static func leaveHost() throws(IOError) {
    let own =
      DMU_NAMESPACE_MOUNT | DMU_NAMESPACE_NETWORK | DMU_NAMESPACE_IPC | DMU_NAMESPACE_UTS
      | DMU_NAMESPACE_CGROUP
    let (uid, gid) = (geteuid(), getegid())
    if uid == 0 {
      guard dmu_unshare(own) == 0 else { throw IOError.last("make namespaces") }
    } else {
      guard dmu_unshare(own | DMU_NAMESPACE_USER) == 0 else {
        throw IOError.last("make a user namespace")
      }
      try write("deny", to: "/proc/self/setgroups")
      try write("\(uid) \(uid) 1", to: "/proc/self/uid_map")
      try write("\(gid) \(gid) 1", to: "/proc/self/gid_map")
    }
    guard dmu_empty_root() == 0 else { throw IOError.last("make an empty root") }
  }

  /// Denies every use of a path, where the kernel has Landlock. Whether it has.
  package static func denyPaths() throws(IOError) -> Bool {
    let result = dmu_deny_paths()
    guard result >= 0 else { throw IOError.last("deny the use of paths") }
    return result > 0
  }

  /// A limit of getrlimit(2).
  package enum Limit: Sendable {
    /// Descriptors, less one.
    case files
    /// Processes and threads of the user.
    case processes
    /// Bytes of a core dump.
    case core
    /// Bytes of locked memory.
    case lockedMemory
    /// Bytes of memory of its own that it may write to, stacks of threads included.
    case memory
  }

  /// Lowers a limit to at most this, for good. Throws: the errno of setrlimit(2).
  package static func limit(_ limit: Limit, to value: UInt64) throws(IOError) {
    let (number, name): (Int32, String) =
      switch limit {
      case .files: (7, "files")
      case .processes: (6, "processes")
      case .core: (4, "core dumps")
      case .lockedMemory: (8, "locked memory")
      case .memory: (2, "memory")
      }
    guard dmu_set_limit(number, value) == 0 else {
      throw IOError.last("limit", name)
    }
  }

  /// Closes whatever whoever started this process has left open in it, but for `kept` and standard
  /// error, and has standard input and output lead nowhere. For a process of one thread. Throws the
  /// errno of opendir(3), open(2) or dup2(2).
  package static func closeOthers(than kept: Set<Int32>) throws(IOError) {
    let null = try Descriptor(path: "/dev/null", flags: O_RDWR)
    for standard in [STDIN_FILENO, STDOUT_FILENO] {
      guard dup2(null.raw, standard) >= 0 else { throw IOError.last("replace", "a descriptor") }
    }
    let open = try Folder.names("/proc/self/fd").compactMap { Int32($0) }
    for raw in open where raw > STDERR_FILENO && raw != null.raw && !kept.contains(raw) {
      // The one by which they were listed is closed already.
      guard close(raw) == 0 || errno == EBADF || errno == EINTR else {
        throw IOError.last("close", "descriptor \(raw)")
      }
    }
  }

  /// Gives up what systemd or an admin has set for whoever started this process: the kernel may
  /// choose it like any other when memory runs out. Source: proc_pid_oom_score_adj(5).
  package static func resetMemoryScore() throws(IOError) {
    try write("0", to: "/proc/self/oom_score_adj")
  }

  private static func write(_ text: String, to path: String) throws(IOError) {
    let file = try Descriptor(path: path, flags: O_WRONLY)
    let bytes = Array(text.utf8)
    guard Glibc.write(file.raw, bytes, bytes.count) == bytes.count else {
      throw IOError.last("write", path)
    }
  }

  private static let memoryPath = "/proc/self/statm"
  /// Opened once and never closed: it is read when there is no /proc any more. -1: not to be had.
  private static let memoryFile = open(memoryPath, O_RDONLY | O_CLOEXEC)

  /// Has `residentMemory` work after `leaveHost`.
  package static func keepMemoryFile() throws(IOError) {
    guard memoryFile >= 0 else { throw IOError.last("open", memoryPath) }
  }

  /// Bytes of this process in memory. Source: proc_pid_statm(5), field 2.
  package static func residentMemory() throws(IOError) -> UInt64 {
    try keepMemoryFile()
    var buffer = [UInt8](repeating: 0, count: 256)
    let count = pread(memoryFile, &buffer, buffer.count, 0)
    guard count > 0 else { throw IOError.last("read", memoryPath) }
    let fields = String(decoding: buffer[..<count], as: UTF8.self).split(separator: " ")
    guard fields.count > 1, let pages = UInt64(fields[1]) else {
      throw IOError(EPROTO, "read", memoryPath)
    }
    return pages * UInt64(sysconf(Int32(_SC_PAGESIZE)))
  }
}
