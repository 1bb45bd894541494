// SPDX-License-Identifier: Apache-2.0
/* off [now]: ends the machine; not every root has a halt(8). Now: also where nothing can be written. */
#include <stdio.h>
#include <sys/reboot.h>
#include <unistd.h>

int main(int count, char **words)
{
	(void)words;
	if (count == 1)
		sync();
	reboot(RB_POWER_OFF);
	perror("off");
	return 1;
}
