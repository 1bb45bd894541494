/* SPDX-License-Identifier: Apache-2.0 */
// Doors to sockets that carry descriptors, to processes by descriptor, and to what a
// process asks of the kernel for itself. As in CLinux.h: bare, -1 and errno on failure.
#ifndef DMU_CLINUX_PROCESS_H
#define DMU_CLINUX_PROCESS_H

#include <signal.h>
#include <spawn.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

// The most descriptors that one message carries when it is sent, and the room for them that a
// receiver needs.
#define DMU_MAX_DESCRIPTORS 8
#define DMU_DESCRIPTOR_ROOM 253

// Sends one message with descriptors, without waiting and without SIGPIPE.
// Source: unix(7), SCM_RIGHTS; cmsg(3).
ssize_t dmu_send_message(int fd, const void *bytes, size_t count, const int *fds,
                         size_t fd_count);

// Receives one message without waiting. `fd_count` holds the room in `fds` on entry (at
// least DMU_DESCRIPTOR_ROOM) and the number received on return; they are close-on-exec. No
// descriptor is closed here unless the process has no number for it (EMFILE): close(2) may wait.
// `truncated` is set to 1 when bytes or descriptors were cut.
ssize_t dmu_receive_message(int fd, void *bytes, size_t count, int *fds, size_t *fd_count,
                            int *truncated);

// Takes a waiting connection, close-on-exec. Source: accept4(2).
int dmu_accept(int fd);

// Pid, user and group of the peer of a connected Unix socket, at the time it connected.
// Source: unix(7), SO_PEERCRED.
int dmu_peer_credentials(int fd, pid_t *pid, uid_t *uid, gid_t *gid);

// In a started process, closes every descriptor from `first` on; and makes it the leader
// of a new session. Source: posix_spawn_file_actions_addclosefrom_np(3), posix_spawn(3).
int dmu_spawn_close_from(posix_spawn_file_actions_t *actions, int first);
#define DMU_SPAWN_SETSID 0x80

// A descriptor for a process. Source: pidfd_open(2).
int dmu_pidfd_open(pid_t pid);

// Sends a signal by descriptor. Source: pidfd_send_signal(2).
int dmu_pidfd_send_signal(int pidfd, int signal);

// Collects a child that has ended, without waiting: 1 with `code` and `status` as in
// siginfo_t, 0 when it still runs. Source: waitid(2), P_PIDFD.
int dmu_pidfd_reap(int pidfd, int *code, int *status);

// Blocks the signals for the calling thread, ignores SIGPIPE and SIGXFSZ, and gives a non-blocking
// descriptor from which they are read. Source: signalfd(2).
int dmu_signal_descriptor(const int *signals, size_t count);

// The next signal's number from such a descriptor. Source: signalfd(2).
int dmu_read_signal(int fd);

// Real, effective and saved group, then user. Source: setresgid(2), setresuid(2).
int dmu_set_user(uid_t uid, gid_t gid);

// Lifts the limit on locked memory; then locks every page, now and later, once it has been
// touched. Source: setrlimit(2); mlockall(2), MCL_ONFAULT.
int dmu_lift_memory_limit(void);
int dmu_lock_memory(void);

// An operation on the calling process. Source: prctl(2).
int dmu_prctl(int option, unsigned long argument);

// The kinds of namespaces, as bits for dmu_unshare. Source: namespaces(7).
#define DMU_NAMESPACE_MOUNT 0x00020000
#define DMU_NAMESPACE_CGROUP 0x02000000
#define DMU_NAMESPACE_UTS 0x04000000
#define DMU_NAMESPACE_IPC 0x08000000
#define DMU_NAMESPACE_USER 0x10000000
#define DMU_NAMESPACE_PID 0x20000000
#define DMU_NAMESPACE_NETWORK 0x40000000

// Moves the calling thread into new namespaces; with DMU_NAMESPACE_PID it is the next process that
// it starts. Source: unshare(2).
int dmu_unshare(int namespaces);

// Makes an empty file system that nobody can write to the root of the calling process's mount
// namespace, and takes everything else out of it. Source: pivot_root(2), section NOTES.
int dmu_empty_root(void);

// Takes every capability out of the bounding set, which needs CAP_SETPCAP; then out of every other
// set of the calling thread, for good. Source: capabilities(7).
int dmu_empty_bounding_set(void);
int dmu_drop_capabilities(void);

// Whether a capability is left in any set: 1, 0.
int dmu_has_capabilities(void);

// Denies the calling process and its children every use of a path, where the kernel has Landlock.
// 1: done; 0: this kernel has none. Source: landlock(7).
int dmu_deny_paths(void);

// Lowers both values of a resource limit, RLIMIT_..., to at most this. Source: setrlimit(2).
int dmu_set_limit(int resource, uint64_t value);

// A datagram netlink socket, bound, whose receive waits at most `timeout_ms`.
// Source: netlink(7).
int dmu_netlink_open(int protocol, int timeout_ms);

#endif
