// SPDX-License-Identifier: Apache-2.0
// For user space only: DMU_IOC_ANSWER as a function, and its number.
#ifndef DMU_CALL_H
#define DMU_CALL_H

struct dmu_batch;

// Gives the answers of the batch; 0, or -1 with errno. Source: dmu.h, ioctl(2).
int dmu_answer_call(int node, struct dmu_batch *batch);

// The number of that request, for a filter of system calls.
unsigned int dmu_answer_request(void);

#endif
