// SPDX-License-Identifier: Apache-2.0
// Has the compiler check the layout, and gives Swift the one call that is a macro.
#include "dmu.h"
#include "dmu_call.h"
#include <sys/ioctl.h>

int dmu_answer_call(int node, struct dmu_batch *batch)
{
    return ioctl(node, DMU_IOC_ANSWER, batch);
}

unsigned int dmu_answer_request(void)
{
    return DMU_IOC_ANSWER;
}
