// SPDX-License-Identifier: GPL-2.0-only
/* Makes the tracepoints. */
#include <linux/types.h>
#define CREATE_TRACE_POINTS
#include "dmu-trace.h"
