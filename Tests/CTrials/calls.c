// SPDX-License-Identifier: Apache-2.0
#define _GNU_SOURCE
#include "CTrials.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/loop.h>
#include <linux/fs.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

static void *idle(void *argument)
{
    return argument;
}

static int thread(void)
{
    pthread_t thread;

    if (pthread_create(&thread, NULL, idle, NULL) != 0)
        return -1;
    return pthread_join(thread, NULL);
}

static long lock(int command)
{
    struct flock whole = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    return syscall(SYS_fcntl, 0, command, &whole);
}

int dmu_trial_call(const char *name)
{
#define TRIAL(word, call)                                                                        \
    if (strcmp(name, word) == 0)                                                             \
    return (int)(call)
    TRIAL("none", 0);
    TRIAL("thread", thread());
    TRIAL("flags", syscall(SYS_fcntl, 0, F_GETFL));
    TRIAL("socket", syscall(SYS_socket, AF_INET, SOCK_STREAM, 0));
    TRIAL("socketpair", syscall(SYS_socketpair, AF_UNIX, SOCK_STREAM, 0, (int[2]){0}));
    TRIAL("connect", syscall(SYS_connect, 0, NULL, 0));
    TRIAL("bind", syscall(SYS_bind, 0, NULL, 0));
    TRIAL("setsockopt", syscall(SYS_setsockopt, 0, SOL_SOCKET, SO_LINGER, NULL, 0));
    TRIAL("open", syscall(SYS_open, "/", O_RDONLY));
    TRIAL("openat", syscall(SYS_openat, AT_FDCWD, "/", O_RDONLY));
    TRIAL("openat-read", syscall(SYS_openat, AT_FDCWD, "/", O_RDONLY | O_CLOEXEC));
    TRIAL("openat2", syscall(437, AT_FDCWD, "/", NULL, 0));
    TRIAL("fork", syscall(SYS_fork));
    TRIAL("vfork", syscall(SYS_vfork));
    TRIAL("clone", syscall(SYS_clone, SIGCHLD, NULL, NULL, NULL, 0));
    TRIAL("execve", syscall(SYS_execve, "/bin/true", NULL, NULL));
    TRIAL("kill", syscall(SYS_kill, -1, 0));
    TRIAL("ptrace", syscall(SYS_ptrace, PTRACE_TRACEME, 0, NULL, NULL));
    TRIAL("process_vm_readv", syscall(SYS_process_vm_readv, 1, NULL, 0, NULL, 0, 0));
    TRIAL("lock-process", lock(F_SETLK));
    TRIAL("lock-file", lock(F_OFD_SETLK));
    TRIAL("lock-wait", lock(F_OFD_SETLKW));
    TRIAL("flock", syscall(SYS_flock, 0, 2));
    TRIAL("lease", syscall(SYS_fcntl, 0, F_SETLEASE, F_WRLCK));
    TRIAL("ioctl-loop", syscall(SYS_ioctl, 0, LOOP_CLR_FD, 0));
    TRIAL("ioctl-freeze", syscall(SYS_ioctl, 0, FIFREEZE, 0));
    TRIAL("mount", syscall(SYS_mount, "none", "/", "tmpfs", 0, NULL));
    TRIAL("unshare", syscall(SYS_unshare, CLONE_NEWUSER));
    TRIAL("setns", syscall(SYS_setns, 0, 0));
    TRIAL("setuid", syscall(SYS_setuid, 0));
    TRIAL("prlimit", syscall(SYS_prlimit64, 0, 7, NULL, NULL));
    TRIAL("io_uring_setup", syscall(SYS_io_uring_setup, 1, NULL));
    TRIAL("bpf", syscall(SYS_bpf, 0, NULL, 0));
    TRIAL("keyctl", syscall(SYS_keyctl, 0, 0));
    TRIAL("unlink", syscall(SYS_unlink, "/x"));
    TRIAL("memory", (long)(mmap(NULL, 5UL << 30, PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0) == MAP_FAILED
                               ? -1 : 0));
    TRIAL("memfd_create", syscall(SYS_memfd_create, "x", 0));
#undef TRIAL
    errno = EINVAL;
    return -1;
}
