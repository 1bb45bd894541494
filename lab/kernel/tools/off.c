// SPDX-License-Identifier: Apache-2.0
/* off: ends the machine; not every root has a halt(8). */
#include <stdio.h>
#include <sys/reboot.h>
#include <unistd.h>

int main(void)
{
	sync();
	reboot(RB_POWER_OFF);
	perror("off");
	return 1;
}
