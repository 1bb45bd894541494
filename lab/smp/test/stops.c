// SPDX-License-Identifier: Apache-2.0
/* See stops.h. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>
#include "stops.h"

#define PATIENCE 20000

static void put(const char *parameter, const char *value)
{
	char path[128];
	int file;

	snprintf(path, sizeof(path), "%.*s/%s", (int)(strrchr(STOPS, '/') - STOPS), STOPS,
		 parameter);
	file = open(path, O_WRONLY | O_CLOEXEC);
	CHECK(file >= 0, "%s: errno %d: the module was built without stop points", path, errno);
	CHECK(write(file, value, strlen(value)) == (ssize_t)strlen(value), "%s: errno %d", value,
	      errno);
	close(file);
}

/* How many wait at a point, how many have passed it. */
static void look(const char *point, int *waiting, int *passed)
{
	char text[4097], *at = text;
	size_t length = strlen(point);
	int file = open(STOPS, O_RDONLY | O_CLOEXEC);
	ssize_t size = read(file, text, sizeof(text) - 1);

	CHECK(size > 0, "errno %d", errno);
	close(file);
	text[size] = 0;
	for (; at; at = strchr(at, '\n'), at = at ? at + 1 : NULL)
		if (!strncmp(at, point, length) && at[length] == ' ' &&
		    sscanf(at + length, "%d %d", waiting, passed) == 2)
			return;
	CHECK(false, "no stop point %s in: %s", point, text);
}

void stop_hold(const char *point, int count)
{
	char text[64];

	snprintf(text, sizeof(text), "hold %s %d", point, count);
	put("stop", text);
}

void stop_hold_later(const char *point, int skip)
{
	char text[64];

	snprintf(text, sizeof(text), "hold %s 1 %d", point, skip);
	put("stop", text);
}

void stop_release(const char *point)
{
	char text[64];

	snprintf(text, sizeof(text), "release %s", point);
	put("stop", text);
}

static void await(const char *point, int waiting, int passed)
{
	uint64_t until = now_ms() + PATIENCE;
	int w, p;

	for (;;) {
		look(point, &w, &p);
		if (w >= waiting && p >= passed)
			return;
		CHECK(now_ms() < until, "%d at the stop point %s, %d past it, not %d and %d", w,
		      point, p, waiting, passed);
		sleep_ms(2);
	}
}

void stop_reached(const char *point, int count)
{
	await(point, count, 0);
}

void stop_passed(const char *point, int count)
{
	await(point, 0, count);
}

void stop_delay(int microseconds, int every)
{
	char text[32];

	snprintf(text, sizeof(text), "%d", every);
	put("stop_every", text);
	snprintf(text, sizeof(text), "%d", microseconds);
	put("stop_delay", text);
}

pid_t start(const char *format, ...)
{
	char command[1024];
	va_list arguments;
	pid_t child;

	va_start(arguments, format);
	vsnprintf(command, sizeof(command), format, arguments);
	va_end(arguments);
	child = fork();
	CHECK(child >= 0, "errno %d", errno);
	if (!child) {
		execl("/bin/sh", "sh", "-c", command, NULL);
		_exit(127);
	}
	return child;
}

bool finished(pid_t child, int milliseconds, int *status)
{
	uint64_t until = now_ms() + milliseconds;
	int raw;

	for (;;) {
		pid_t ended = waitpid(child, &raw, WNOHANG);

		CHECK(ended >= 0, "errno %d", errno);
		if (ended == child) {
			*status = WIFEXITED(raw) ? WEXITSTATUS(raw) : -WTERMSIG(raw);
			return true;
		}
		if (now_ms() >= until)
			return false;
		sleep_ms(2);
	}
}

static void *answer_main(void *argument)
{
	struct answering *answering = argument;

	answers(answering->node, &answering->a, 1);
	answering->done = true;
	return NULL;
}

struct answering *begin_answer(int node, struct dmu_answer a)
{
	struct answering *answering = calloc(1, sizeof(*answering));

	answering->node = node;
	answering->a = a;
	CHECK(pthread_create(&answering->thread, NULL, answer_main, answering) == 0);
	return answering;
}

void end_answer(struct answering *answering, int result)
{
	uint64_t until = now_ms() + PATIENCE;

	while (!answering->done) {
		CHECK(now_ms() < until, "an answer does not end");
		sleep_ms(1);
	}
	pthread_join(answering->thread, NULL);
	CHECK(answering->a.result == result, "the answer's result is %d, not %d",
	      answering->a.result, result);
	free(answering);
}
