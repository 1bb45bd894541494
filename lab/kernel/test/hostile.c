// SPDX-License-Identifier: Apache-2.0
#include "lab.h"
const struct scenario hostile_scenarios[] = { { 0 } };
