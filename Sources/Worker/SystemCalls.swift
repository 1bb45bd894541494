// SPDX-License-Identifier: Apache-2.0
// The system calls that a worker needs once it is in its cage, and the filter that ends it at any
// other. Whoever takes a worker over has these and no more: it can open, connect, start and lock
// nothing. The list is what every format and every order of the link was seen to use, with what
// glibc and Swift's runtime need to allocate and to start threads.

internal import CSeccomp
internal import DMU
import Glibc
import SystemIO

/// What a worker may ask of the kernel. Sources: seccomp(2), seccomp_rule_add(3).
struct SystemCalls {
  private let library: libseccomp

  /// Allowed whatever their arguments are.
  static let allowed = [
    // Waiting and waking.
    "epoll_wait", "epoll_pwait", "epoll_ctl", "epoll_create1", "eventfd2", "futex", "poll", "ppoll",
    "restart_syscall", "clock_gettime", "clock_nanosleep", "nanosleep", "sched_yield",
    // The files of the disk, the link, the socket to the kernel or to a client.
    "read", "write", "readv", "writev", "pread64", "pwrite64", "preadv", "pwritev", "preadv2",
    "pwritev2", "lseek", "fsync", "fdatasync", "fallocate", "ftruncate", "fstat", "fstatfs",
    "sync_file_range", "fadvise64", "close", "dup", "recvmsg", "sendmsg", "recvfrom", "sendto",
    "accept4", "getsockopt", "shutdown", "getpeername", "getsockname",
    // Memory.
    "mmap", "munmap", "mremap", "mprotect", "madvise", "brk", "msync", "getrandom",
    // Threads and signals of its own.
    "exit", "exit_group", "set_robust_list", "rseq", "rt_sigprocmask", "rt_sigaction",
    "rt_sigreturn", "sigaltstack", "getpid", "gettid", "geteuid", "getuid", "sched_getaffinity",
  ]

  /// `fcntl` knows no locks here: those decide who may write, and are the daemon's.
  static let fileControls: [Int32] = [F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD, 1030]

  /// `ioctl`: the length and the sectors of a block device, discarding and zeroing on one, and the
  /// answers of the module's node. Sources: linux/fs.h, dmu.h.
  static let deviceControls: [UInt64] = [
    0x8008_1272, 0x1268, 0x127b, 0x1277, 0x127f, UInt64(Node.answerRequest),
  ]

  /// Loads libseccomp, for which files have to be opened. Throws ELIBACC if it is not installed.
  init() throws(IOError) {
    let library = UnsafeMutablePointer<libseccomp>.allocate(capacity: 1)
    defer { library.deallocate() }
    if let reason = libseccomp_load(library) {
      throw IOError(ELIBACC, "load", "libseccomp (\(String(cString: reason)))")
    }
    self.library = library.pointee
  }

  /// Loads the filter, for this thread and all that it starts. Throws: the errno of the call of
  /// libseccomp that failed.
  func restrict() throws(IOError) {
    let (kill, allow): (UInt32, UInt32) = (0x8000_0000, 0x7fff_0000)
    guard let filter = library.seccomp_init(kill) else { throw IOError(ENOMEM, "make a filter") }
    defer { library.seccomp_release(filter) }
    // A tree, since the calls of the fast path stand anywhere in the list; and no change of how the
    // processor guesses.
    try check(library.seccomp_attr_set(filter, SCMP_FLTATR_CTL_OPTIMIZE, 2), "order the filter")
    try check(library.seccomp_attr_set(filter, SCMP_FLTATR_CTL_SSB, 1), "set up the filter")
    for name in SystemCalls.allowed { try add(filter, allow, name) }
    for control in SystemCalls.fileControls {
      try add(filter, allow, "fcntl", argument: 1, UInt64(control), mask: 0xffff_ffff)
    }
    for request in SystemCalls.deviceControls {
      try add(filter, allow, "ioctl", argument: 1, request, mask: 0xffff_ffff)
    }
    // fstat(3) is this call with an empty path.
    try add(filter, allow, "newfstatat", argument: 3, 0x1000, mask: 0xffff_ffff)
    // A thread: glibc tries clone3 first, whose flags no filter can see.
    try add(filter, 0x0005_0000 | UInt32(ENOSYS), "clone3")
    let thread: UInt64 = 0x0001_0000
    try add(filter, allow, "clone", argument: 0, thread, mask: thread)
    // malloc(3) looks into /proc/sys/vm when it gives memory back, and does without what it cannot
    // open. Nothing is opened; any other kind of opening ends the worker.
    let readOnly = UInt64(O_RDONLY | O_CLOEXEC)
    try add(filter, 0x0005_0000 | UInt32(EACCES), "openat", argument: 2, readOnly, mask: .max)
    try check(library.seccomp_load(filter), "load the filter")
  }

  private func add(
    _ filter: scmp_filter_ctx, _ action: UInt32, _ name: String,
    argument: UInt32? = nil, _ value: UInt64 = 0, mask: UInt64 = 0
  ) throws(IOError) {
    let number = library.seccomp_syscall_resolve_name(name)
    guard number != -1 else { throw IOError(ENOSYS, "find the system call", name) }
    var comparisons: [scmp_arg_cmp] = []
    if let argument {
      comparisons.append(
        scmp_arg_cmp(arg: argument, op: SCMP_CMP_MASKED_EQ, datum_a: mask, datum_b: value))
    }
    try check(
      library.seccomp_rule_add_array(
        filter, action, number, UInt32(comparisons.count), comparisons),
      "allow the system call \(name)")
  }

  private func check(_ result: Int32, _ what: String) throws(IOError) {
    guard result == 0 else { throw IOError(-result, what) }
  }
}
