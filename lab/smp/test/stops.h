/* SPDX-License-Identifier: Apache-2.0 */
/* The stop points of the module's debug build, see module/dmu-stop.c, and commands beside a test. */
#ifndef STOPS_H
#define STOPS_H

#include <sys/types.h>
#include "lab.h"

void stop_hold(const char *point, int count);	/* the next count threads stay there */
void stop_hold_later(const char *point, int skip);	/* one that comes after so many others */
void stop_release(const char *point);
void stop_reached(const char *point, int count);	/* waits until so many are there */
void stop_passed(const char *point, int count);	/* until so many have passed since the release */
void stop_delay(int microseconds, int every);

pid_t start(const char *format, ...) __attribute__((format(printf, 1, 2)));
bool finished(pid_t child, int milliseconds, int *status);	/* false: it runs still */

/* An answer given by a thread of its own. */
struct answering {
	pthread_t thread;
	int node;
	struct dmu_answer a;
	volatile bool done;
};

struct answering *begin_answer(int node, struct dmu_answer a);
void end_answer(struct answering *answering, int result);

#endif
