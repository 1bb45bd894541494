/* SPDX-License-Identifier: Apache-2.0 */
// libseccomp, loaded when it is wanted: of the programs in cowd's file only cowd confines itself.
// Nothing is linked: the functions are found by name, with the types of the library's own header.
#ifndef DMU_CSECCOMP_H
#define DMU_CSECCOMP_H

#include <dlfcn.h>
#include <seccomp.h>
#include <stddef.h>

#define LIBSECCOMP_FUNCTIONS(each) \
  each(seccomp_attr_set) \
  each(seccomp_init) \
  each(seccomp_load) \
  each(seccomp_release) \
  each(seccomp_rule_add_array) \
  each(seccomp_syscall_resolve_name)

#define LIBSECCOMP_FIELD(name) __typeof__(&name) _Nonnull name;

/// The functions of libseccomp that a filter needs.
struct libseccomp {
  LIBSECCOMP_FUNCTIONS(LIBSECCOMP_FIELD)
};

/// Finds them. Returns NULL, or what the loader says is missing, which stays until the next call.
static inline const char *_Nullable libseccomp_load(struct libseccomp *_Nonnull library) {
  void *handle = dlopen("libseccomp.so.2", RTLD_NOW | RTLD_LOCAL);
  if (!handle) return dlerror();
#define LIBSECCOMP_FIND(name) \
  if (!(library->name = (__typeof__(&name))dlsym(handle, #name))) return dlerror();
  LIBSECCOMP_FUNCTIONS(LIBSECCOMP_FIND)
  return NULL;
}

#endif
