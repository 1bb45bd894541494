// SPDX-License-Identifier: Apache-2.0
/* dmutest list | NAME: lists the scenarios, or runs one. */
#include <stdio.h>
#include <string.h>
#include "lab.h"

int main(int argc, char **argv)
{
	static const struct scenario *const all[] = {
		rule_scenarios, more_rule_scenarios, life_scenarios, hostile_scenarios, random_scenarios,
		killed_scenarios, grant_scenarios, failed_scenarios,
	};
	bool list = argc == 2 && !strcmp(argv[1], "list");
	size_t i;

	setvbuf(stdout, NULL, _IOLBF, 0);
	for (i = 0; i < sizeof(all) / sizeof(*all); i++) {
		for (const struct scenario *at = all[i]; at->name; at++) {
			if (list) {
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
