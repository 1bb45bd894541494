// SPDX-License-Identifier: Apache-2.0
//
// The door to libxenstore: nothing of our own, only its public header.
#include <xenstore.h>
