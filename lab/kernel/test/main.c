// SPDX-License-Identifier: Apache-2.0
/* dmutest list [smp] | NAME: lists the scenarios, or those of the SMP lab; or runs one. */
#include <stdio.h>
#include <string.h>
#include "lab.h"

/* Only where they are linked in. */
extern const struct scenario stop_scenarios[] __attribute__((weak));
extern const struct scenario race_scenarios[] __attribute__((weak));

int main(int argc, char **argv)
{
	static const struct scenario *const all[] = {
		rule_scenarios, more_rule_scenarios, life_scenarios, hostile_scenarios, random_scenarios,
		killed_scenarios, grant_scenarios, layer_scenarios, failed_scenarios,
		bound_scenarios,
		stop_scenarios, race_scenarios,
	};
	const size_t smp = 10;
	bool list = argc >= 2 && !strcmp(argv[1], "list");
	bool group = argc == 3 && !strcmp(argv[2], "smp");
	size_t i;

	setvbuf(stdout, NULL, _IOLBF, 0);
	for (i = 0; i < sizeof(all) / sizeof(*all); i++) {
		for (const struct scenario *at = all[i]; at && at->name; at++) {
			if (list) {
				if (group == (i >= smp))
					puts(at->name);
			} else if (argc == 2 && !strcmp(argv[1], at->name)) {
				at->body();
				return 0;
			}
		}
	}
	if (!list)
		fprintf(stderr, "dmutest: no such scenario: dmutest list names them\n");
	return !list;
}
