// SPDX-License-Identifier: Apache-2.0
/* The header is all there is: this file shows that it stands alone in C. */
#include "dmu_plugin.h"

_Static_assert(DMU_PLUGIN_VERSION == 1, "a new version needs a new loader");
