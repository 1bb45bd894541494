/* SPDX-License-Identifier: Apache-2.0 */
// libdevmapper as Swift can call it.
#ifndef DMU_CDEVICEMAPPER_H
#define DMU_CDEVICEMAPPER_H

#include <libdevmapper.h>

// The library's own words go nowhere: what failed is told by dm_task_get_errno.
static inline void dmu_dm_silence(int level, const char *file, int line, int code,
                                  const char *format, ...) {
  (void)level, (void)file, (void)line, (void)code, (void)format;
}

static inline void dmu_dm_be_silent(void) { dm_log_with_errno_init(dmu_dm_silence); }

#endif
