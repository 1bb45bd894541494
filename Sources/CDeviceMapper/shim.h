/* SPDX-License-Identifier: Apache-2.0 */
// libdevmapper as Swift can call it, loaded when it is wanted: with libselinux, libudev and
// libpcre2 behind it, loading takes a quarter of a program's start, and most of the programs
// in a multi-call file make no request to the device-mapper. Nothing is linked: the functions are
// found by name, with the types that the library's own header gives them.
#ifndef DMU_CDEVICEMAPPER_H
#define DMU_CDEVICEMAPPER_H

#include <dlfcn.h>
#include <libdevmapper.h>
#include <stddef.h>

#define LIBDEVMAPPER_FUNCTIONS(each) \
  each(dm_get_next_target) \
  each(dm_task_add_target) \
  each(dm_task_create) \
  each(dm_task_deferred_remove) \
  each(dm_task_destroy) \
  each(dm_task_get_deps) \
  each(dm_task_get_errno) \
  each(dm_task_get_info) \
  each(dm_task_get_message_response) \
  each(dm_task_get_names) \
  each(dm_task_get_uuid) \
  each(dm_task_get_versions) \
  each(dm_task_no_flush) \
  each(dm_task_retry_remove) \
  each(dm_task_run) \
  each(dm_task_set_add_node) \
  each(dm_task_set_cookie) \
  each(dm_task_set_event_nr) \
  each(dm_task_set_message) \
  each(dm_task_set_name) \
  each(dm_task_set_newname) \
  each(dm_task_set_ro) \
  each(dm_task_set_sector) \
  each(dm_task_set_uuid) \
  each(dm_task_skip_lockfs) \
  each(dm_udev_wait)

#define LIBDEVMAPPER_FIELD(name) __typeof__(&name) _Nonnull name;

/// The functions of libdevmapper that requests need.
struct libdevmapper {
  LIBDEVMAPPER_FUNCTIONS(LIBDEVMAPPER_FIELD)
};

// The library's own words go nowhere: what failed is told by dm_task_get_errno.
static inline void dmu_dm_silence(int level, const char *_Nullable file, int line, int code,
                                  const char *_Nullable format, ...) {
  (void)level, (void)file, (void)line, (void)code, (void)format;
}

/// Finds them and silences the library. Returns NULL, or what the loader says is missing, which
/// stays until the next call.
static inline const char *_Nullable libdevmapper_load(struct libdevmapper *_Nonnull library) {
  void *handle = dlopen("libdevmapper.so.1.02.1", RTLD_NOW | RTLD_LOCAL);
  if (!handle) return dlerror();
#define LIBDEVMAPPER_FIND(name) \
  if (!(library->name = (__typeof__(&name))dlsym(handle, #name))) return dlerror();
  LIBDEVMAPPER_FUNCTIONS(LIBDEVMAPPER_FIND)
  __typeof__(&dm_log_with_errno_init) set_log =
      (__typeof__(&dm_log_with_errno_init))dlsym(handle, "dm_log_with_errno_init");
  if (!set_log) return dlerror();
  set_log(dmu_dm_silence);
  return NULL;
}

#endif
