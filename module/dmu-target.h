/* SPDX-License-Identifier: GPL-2.0-only */
/* dmu-target.c: tables, the device behind them, suspend and resume, the module. */
#ifndef DMU_TARGET_H
#define DMU_TARGET_H

#include "dmu-core.h"

/* The list of devices and their minors; see dmu-core.h for its place among the locks. */
extern struct mutex dmu_devices_mutex;

#endif
