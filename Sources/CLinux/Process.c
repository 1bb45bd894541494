// SPDX-License-Identifier: Apache-2.0
#define _GNU_SOURCE
#include "CLinuxProcess.h"

#include <errno.h>
#include <linux/capability.h>
#include <linux/landlock.h>
#include <linux/netlink.h>
#include <sched.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/pidfd.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

// DMU_DESCRIPTOR_ROOM is the most that the kernel lets one message carry. Source: SCM_MAX_FD in
// net/scm.h.

union control {
    struct cmsghdr align;
    char bytes[CMSG_SPACE(sizeof(int) * DMU_DESCRIPTOR_ROOM)];
};

ssize_t dmu_send_message(int fd, const void *bytes, size_t count, const int *fds,
                         size_t fd_count)
{
    union control control;
    struct iovec vector = {.iov_base = (void *)bytes, .iov_len = count};
    struct msghdr message = {.msg_iov = &vector, .msg_iovlen = 1};

    if (fd_count > DMU_MAX_DESCRIPTORS) {
        errno = EINVAL;
        return -1;
    }
    if (fd_count > 0) {
        memset(&control, 0, sizeof control);
        message.msg_control = control.bytes;
        message.msg_controllen = CMSG_SPACE(sizeof(int) * fd_count);
        struct cmsghdr *header = CMSG_FIRSTHDR(&message);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(sizeof(int) * fd_count);
        memcpy(CMSG_DATA(header), fds, sizeof(int) * fd_count);
    }
    return sendmsg(fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
}

ssize_t dmu_receive_message(int fd, void *bytes, size_t count, int *fds, size_t *fd_count,
                            int *truncated)
{
    union control control;
    struct iovec vector = {.iov_base = bytes, .iov_len = count};
    struct msghdr message = {.msg_iov = &vector,
                             .msg_iovlen = 1,
                             .msg_control = control.bytes,
                             .msg_controllen = sizeof control.bytes};
    size_t room = *fd_count;

    if (room < DMU_DESCRIPTOR_ROOM) {
        errno = EINVAL;
        return -1;
    }
    *fd_count = 0;
    *truncated = 0;
    ssize_t result = recvmsg(fd, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
    if (result < 0)
        return result;
    if (message.msg_flags & (MSG_CTRUNC | MSG_TRUNC))
        *truncated = 1;
    for (struct cmsghdr *header = CMSG_FIRSTHDR(&message); header != NULL;
         header = CMSG_NXTHDR(&message, header)) {
        if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS)
            continue;
        size_t sent = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < sent; i++) {
            int received;
            memcpy(&received, CMSG_DATA(header) + i * sizeof(int), sizeof(int));
            // There is room for every descriptor that a message may carry.
            if (*fd_count < room)
                fds[(*fd_count)++] = received;
        }
    }
    return result;
}

int dmu_accept(int fd)
{
    return accept4(fd, NULL, NULL, SOCK_CLOEXEC);
}

int dmu_peer_credentials(int fd, pid_t *pid, uid_t *uid, gid_t *gid)
{
    struct ucred peer;
    socklen_t length = sizeof peer;
    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &length) != 0)
        return -1;
    *pid = peer.pid;
    *uid = peer.uid;
    *gid = peer.gid;
    return 0;
}

_Static_assert(DMU_SPAWN_SETSID == POSIX_SPAWN_SETSID, "POSIX_SPAWN_SETSID");

int dmu_spawn_close_from(posix_spawn_file_actions_t *actions, int first)
{
    return posix_spawn_file_actions_addclosefrom_np(actions, first);
}

int dmu_pidfd_open(pid_t pid)
{
    return pidfd_open(pid, 0);
}

int dmu_pidfd_send_signal(int pidfd, int signal)
{
    return pidfd_send_signal(pidfd, signal, NULL, 0);
}

int dmu_pidfd_reap(int pidfd, int *code, int *status)
{
    siginfo_t info;
    memset(&info, 0, sizeof info);
    if (waitid(P_PIDFD, (id_t)pidfd, &info, WEXITED | WNOHANG) != 0)
        return -1;
    if (info.si_pid == 0)
        return 0;
    *code = info.si_code;
    *status = info.si_status;
    return 1;
}

int dmu_signal_descriptor(const int *signals, size_t count)
{
    sigset_t set;
    sigemptyset(&set);
    for (size_t i = 0; i < count; i++)
        sigaddset(&set, signals[i]);
    int result = pthread_sigmask(SIG_BLOCK, &set, NULL);
    if (result != 0) {
        errno = result;
        return -1;
    }
    if (signal(SIGPIPE, SIG_IGN) == SIG_ERR || signal(SIGXFSZ, SIG_IGN) == SIG_ERR)
        return -1;
    return signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
}

int dmu_read_signal(int fd)
{
    struct signalfd_siginfo info;
    ssize_t count = read(fd, &info, sizeof info);
    if (count == (ssize_t)sizeof info)
        return (int)info.ssi_signo;
    if (count >= 0)
        errno = EIO;
    return -1;
}

int dmu_set_user(uid_t uid, gid_t gid)
{
    if (setresgid(gid, gid, gid) != 0)
        return -1;
    return setresuid(uid, uid, uid);
}

int dmu_lift_memory_limit(void)
{
    struct rlimit limit = {.rlim_cur = RLIM_INFINITY, .rlim_max = RLIM_INFINITY};
    return setrlimit(RLIMIT_MEMLOCK, &limit);
}

int dmu_lock_memory(void)
{
    return mlockall(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT);
}

int dmu_prctl(int option, unsigned long argument)
{
    return prctl(option, argument, 0UL, 0UL, 0UL);
}

_Static_assert(DMU_NAMESPACE_MOUNT == CLONE_NEWNS, "CLONE_NEWNS");
_Static_assert(DMU_NAMESPACE_CGROUP == CLONE_NEWCGROUP, "CLONE_NEWCGROUP");
_Static_assert(DMU_NAMESPACE_UTS == CLONE_NEWUTS, "CLONE_NEWUTS");
_Static_assert(DMU_NAMESPACE_IPC == CLONE_NEWIPC, "CLONE_NEWIPC");
_Static_assert(DMU_NAMESPACE_USER == CLONE_NEWUSER, "CLONE_NEWUSER");
_Static_assert(DMU_NAMESPACE_PID == CLONE_NEWPID, "CLONE_NEWPID");
_Static_assert(DMU_NAMESPACE_NETWORK == CLONE_NEWNET, "CLONE_NEWNET");

int dmu_unshare(int namespaces)
{
    return unshare(namespaces);
}

int dmu_empty_root(void)
{
    const unsigned long flags = MS_NOSUID | MS_NODEV | MS_NOEXEC;

    // Nothing of this is to be seen outside, and nothing from outside comes in later.
    if (mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) != 0)
        return -1;
    // Any directory will do to mount on; this one is everywhere.
    if (mount("none", "/proc", "tmpfs", flags, "size=4k,nr_inodes=1,mode=0555") != 0 ||
        chdir("/proc") != 0)
        return -1;
    // The old root comes to lie on the new one, from where it is taken.
    if (syscall(SYS_pivot_root, ".", ".") != 0 || umount2(".", MNT_DETACH) != 0 ||
        chdir("/") != 0)
        return -1;
    return mount(NULL, "/", NULL, MS_REMOUNT | MS_BIND | MS_RDONLY | flags, NULL);
}

int dmu_empty_bounding_set(void)
{
    for (unsigned long capability = 0; capability < 64; capability++) {
        int has = prctl(PR_CAPBSET_READ, capability, 0UL, 0UL, 0UL);
        if (has < 0)
            break;
        if (has > 0 && prctl(PR_CAPBSET_DROP, capability, 0UL, 0UL, 0UL) != 0)
            return -1;
    }
    return 0;
}

int dmu_drop_capabilities(void)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct none[_LINUX_CAPABILITY_U32S_3] = {{0}};

    if (prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0UL, 0UL, 0UL) != 0)
        return -1;
    return (int)syscall(SYS_capset, &header, none);
}

int dmu_has_capabilities(void)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct sets[_LINUX_CAPABILITY_U32S_3];

    if (syscall(SYS_capget, &header, sets) != 0)
        return 1;
    for (int i = 0; i < _LINUX_CAPABILITY_U32S_3; i++) {
        if (sets[i].effective != 0 || sets[i].permitted != 0 || sets[i].inheritable != 0)
            return 1;
    }
    return 0;
}

int dmu_deny_paths(void)
{
    // What the first version of the interface knows, which every kernel that has it takes.
    struct landlock_ruleset_attr all = {.handled_access_fs = (1ULL << 13) - 1};

    int rules = (int)syscall(SYS_landlock_create_ruleset, &all, sizeof all, 0U);
    if (rules < 0)
        return errno == ENOSYS || errno == EOPNOTSUPP ? 0 : -1;
    int result = (int)syscall(SYS_landlock_restrict_self, rules, 0U);
    int saved = errno;
    close(rules);
    errno = saved;
    return result == 0 ? 1 : -1;
}

int dmu_set_limit(int resource, uint64_t value)
{
    struct rlimit limit;

    if (getrlimit(resource, &limit) != 0)
        return -1;
    if (limit.rlim_max > value)
        limit.rlim_max = value;
    limit.rlim_cur = limit.rlim_max;
    return setrlimit(resource, &limit);
}

int dmu_netlink_open(int protocol, int timeout_ms)
{
    struct sockaddr_nl address = {.nl_family = AF_NETLINK};
    struct timeval timeout = {.tv_sec = timeout_ms / 1000,
                              .tv_usec = (timeout_ms % 1000) * 1000};
    int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, protocol);
    if (fd < 0)
        return -1;
    if (setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout) != 0 ||
        bind(fd, (struct sockaddr *)&address, sizeof address) != 0) {
        int saved = errno;
        close(fd);
        errno = saved;
        return -1;
    }
    return fd;
}
