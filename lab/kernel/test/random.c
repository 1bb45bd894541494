// SPDX-License-Identifier: Apache-2.0
#include "lab.h"
const struct scenario random_scenarios[] = { { 0 } };
