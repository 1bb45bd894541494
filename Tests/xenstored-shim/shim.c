// SPDX-License-Identifier: Apache-2.0
//
// Lets the real C xenstored run on a machine without Xen.
//
// Preloaded into xenstored, this answers for the few functions of libxenctrl, libxengnttab
// and libxenevtchn that it calls, and for the two files of /proc/xen that name its ring with
// domain 0. Every domain id counts as alive; a ring is a page of zeroes that nobody writes to;
// an event channel is an eventfd that never fires. Clients come in by the Unix socket, as domain 0.
//
// With SHIM_DOMAIN=N there is a way in for an unprivileged domain as well: when domain N is
// introduced, SHIM_DOMAIN_PATH becomes a link to a pseudo-terminal, which stands for that domain's
// /dev/xen/xenbus: two threads carry bytes between it and the domain's ring. It is for one
// client at a time, and the watches of one that has gone stay, which the kernel would take back.
//
// With SHIM_LIFELINE=N xenstored also ends when nobody holds the other end of descriptor N open
// any more: it then never outlives the test that started it, however that test ends.
//
// Invariant: no function that xenstored calls blocks, and none fails unless memory or descriptors
// run out.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <termios.h>
#include <unistd.h>

#include <xenctrl.h>
#include <xenevtchn.h>
#include <xengnttab.h>
#include <xen/io/xs_wire.h>

enum { RING_BYTES = 4096 };

static int opaque;  // What the handles of the libraries point to: never looked into.
static int event_fd = -1;
static int next_port = 1;

// The unprivileged domain: its ring, its event channel, the terminal, and what tells its threads
// that xenstored has written or made room.
static struct xenstore_domain_interface *ring;
static int ring_port = -1;
static int terminal = -1;
static int bell = -1;

xc_interface *xc_interface_open(
    struct xentoollog_logger *logger, struct xentoollog_logger *dombuild, unsigned flags) {
  (void)logger, (void)dombuild, (void)flags;
  return (xc_interface *)&opaque;
}

int xc_interface_close(xc_interface *xch) {
  (void)xch;
  return 0;
}

int xc_domain_getinfo(
    xc_interface *xch, uint32_t first, unsigned int most, xc_dominfo_t *info) {
  (void)xch;
  if (most == 0) return 0;
  memset(info, 0, sizeof *info);
  info->domid = first;
  info->running = 1;
  return 1;
}

xengnttab_handle *xengnttab_open(struct xentoollog_logger *logger, unsigned flags) {
  (void)logger, (void)flags;
  return (xengnttab_handle *)&opaque;
}

int xengnttab_close(xengnttab_handle *gnttab) {
  (void)gnttab;
  return 0;
}

int xengnttab_set_max_grants(xengnttab_handle *gnttab, uint32_t count) {
  (void)gnttab, (void)count;
  return 0;
}

// An eventfd counts: a write of one only fails when the counter is full.
static void ring_bell(int fd) {
  uint64_t one = 1;
  if (write(fd, &one, sizeof one) != sizeof one) abort();
}

static void wait_for_bell(void) {
  uint64_t count;
  if (read(bell, &count, sizeof count) != sizeof count) abort();
}

// From the terminal to the ring.
static void *carry_requests(void *nothing) {
  char bytes[XENSTORE_RING_SIZE];
  ssize_t count;
  (void)nothing;
  while ((count = read(terminal, bytes, sizeof bytes)) > 0)
    for (ssize_t done = 0; done < count;) {
      XENSTORE_RING_IDX to = ring->req_prod;
      if (to - __atomic_load_n(&ring->req_cons, __ATOMIC_ACQUIRE) == XENSTORE_RING_SIZE) {
        usleep(200);
        continue;
      }
      ring->req[MASK_XENSTORE_IDX(to)] = bytes[done++];
      __atomic_store_n(&ring->req_prod, to + 1, __ATOMIC_RELEASE);
      if (done == count) ring_bell(event_fd);
    }
  abort();  // This process holds the other end open, too.
}

// From the ring to the terminal.
static void *carry_answers(void *nothing) {
  (void)nothing;
  for (;;) {
    XENSTORE_RING_IDX from = ring->rsp_cons;
    if (from == __atomic_load_n(&ring->rsp_prod, __ATOMIC_ACQUIRE)) {
      wait_for_bell();
      continue;
    }
    char byte = ring->rsp[MASK_XENSTORE_IDX(from)];
    if (write(terminal, &byte, 1) != 1) abort();
    __atomic_store_n(&ring->rsp_cons, from + 1, __ATOMIC_RELEASE);
    ring_bell(event_fd);
  }
}

// Opens the way in for the domain whose ring this is.
static void open_domain(void *page) {
  const char *link = getenv("SHIM_DOMAIN_PATH");
  struct termios raw;
  pthread_t thread;
  int other;
  ring = page;
  if (terminal >= 0) return;
  bell = eventfd(0, EFD_CLOEXEC);
  terminal = posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC);
  if (bell < 0 || terminal < 0 || grantpt(terminal) != 0 || unlockpt(terminal) != 0) abort();
  // Held open, so that a client may go without an end of the terminal.
  other = open(ptsname(terminal), O_RDWR | O_NOCTTY | O_CLOEXEC);
  if (other < 0 || tcgetattr(other, &raw) != 0) abort();
  cfmakeraw(&raw);
  if (tcsetattr(other, TCSANOW, &raw) != 0) abort();
  if (link == NULL) abort();
  unlink(link);
  if (symlink(ptsname(terminal), link) != 0) abort();
  if (pthread_create(&thread, NULL, carry_requests, NULL) != 0) abort();
  pthread_detach(thread);
  if (pthread_create(&thread, NULL, carry_answers, NULL) != 0) abort();
  pthread_detach(thread);
}

static int is_opened(uint32_t domid) {
  const char *wanted = getenv("SHIM_DOMAIN");
  return wanted != NULL && (uint32_t)atoi(wanted) == domid;
}

void *xengnttab_map_grant_ref(
    xengnttab_handle *gnttab, uint32_t domid, uint32_t ref, int prot) {
  (void)gnttab, (void)ref;
  void *page = mmap(NULL, RING_BYTES, prot, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (page == MAP_FAILED) return NULL;
  if (is_opened(domid)) open_domain(page);
  return page;
}

int xengnttab_unmap(xengnttab_handle *gnttab, void *start, uint32_t count) {
  (void)gnttab;
  // The threads of the unprivileged domain may be at work in its ring.
  return start == ring ? 0 : munmap(start, (size_t)count * RING_BYTES);
}

xenevtchn_handle *xenevtchn_open(struct xentoollog_logger *logger, unsigned int flags) {
  (void)logger, (void)flags;
  if (event_fd < 0) event_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  return event_fd < 0 ? NULL : (xenevtchn_handle *)&opaque;
}

xenevtchn_handle *xenevtchn_fdopen(
    struct xentoollog_logger *logger, int fd, unsigned flags) {
  (void)fd;
  return xenevtchn_open(logger, flags);
}

int xenevtchn_fd(xenevtchn_handle *xce) {
  (void)xce;
  return event_fd;
}

int xenevtchn_notify(xenevtchn_handle *xce, evtchn_port_t port) {
  (void)xce;
  if ((int)port == ring_port) ring_bell(bell);
  return 0;
}

xenevtchn_port_or_error_t xenevtchn_bind_interdomain(
    xenevtchn_handle *xce, uint32_t domid, evtchn_port_t remote) {
  (void)xce, (void)remote;
  if (is_opened(domid)) ring_port = next_port;
  return next_port++;
}

xenevtchn_port_or_error_t xenevtchn_bind_virq(xenevtchn_handle *xce, unsigned int virq) {
  (void)xce, (void)virq;
  return next_port++;
}

int xenevtchn_unbind(xenevtchn_handle *xce, evtchn_port_t port) {
  (void)xce, (void)port;
  return 0;
}

// Asked for when the eventfd is readable: only the unprivileged domain makes it so.
xenevtchn_port_or_error_t xenevtchn_pending(xenevtchn_handle *xce) {
  uint64_t count;
  (void)xce;
  return read(event_fd, &count, sizeof count) == sizeof count ? ring_port : -1;
}

int xenevtchn_unmask(xenevtchn_handle *xce, evtchn_port_t port) {
  (void)xce, (void)port;
  return 0;
}

static void *wait_for_the_end(void *lifeline) {
  char byte;
  while (read((int)(intptr_t)lifeline, &byte, 1) > 0) {
  }
  _exit(0);
}

__attribute__((constructor)) static void watch_lifeline(void) {
  const char *number = getenv("SHIM_LIFELINE");
  pthread_t thread;
  if (number == NULL) return;
  if (pthread_create(&thread, NULL, wait_for_the_end, (void *)(intptr_t)atoi(number)) != 0)
    abort();
  pthread_detach(thread);
}

static int memory_file(const char *name, const char *text) {
  int fd = memfd_create(name, MFD_CLOEXEC);
  if (fd < 0) return -1;
  size_t length = strlen(text);
  if ((length != 0 && pwrite(fd, text, length, 0) != (ssize_t)length) ||
      (length == 0 && ftruncate(fd, RING_BYTES) != 0)) {
    close(fd);
    return -1;
  }
  return fd;
}

int open(const char *path, int flags, ...) {
  static int (*real_open)(const char *, int, ...);
  mode_t mode = 0;
  if (flags & (O_CREAT | __O_TMPFILE)) {
    va_list rest;
    va_start(rest, flags);
    mode = va_arg(rest, mode_t);
    va_end(rest);
  }
  if (strcmp(path, "/proc/xen/xsd_port") == 0) return memory_file("xsd_port", "1");
  if (strcmp(path, "/proc/xen/xsd_kva") == 0) return memory_file("xsd_kva", "");
  if (real_open == NULL) *(void **)&real_open = dlsym(RTLD_NEXT, "open");
  return real_open(path, flags, mode);
}
