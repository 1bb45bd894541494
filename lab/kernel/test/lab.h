/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the scenarios of the kernel lab are written with: a rig (a store, a base, a dmu
 * device over them, and its node, whose worker the scenario plays), guests (threads that do
 * one request each), and checks that end the scenario with the line that failed.
 */
#ifndef LAB_H
#define LAB_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include "dmu.h"

#define SECTOR 512
#define NODE "/dev/dmu/lab"
#define DISK "/dev/mapper/lab"
#define STOPS "/sys/module/dm_userspace/parameters/stop"	/* of the SMP lab's module */

/* Ends the scenario unless what holds. */
#define CHECK(what, ...) \
	do { \
		if (!(what)) \
			fail(__FILE__, __LINE__, #what, " " __VA_ARGS__); \
	} while (0)

void fail(const char *file, int line, const char *what, const char *format, ...)
	__attribute__((noreturn, format(printf, 4, 5)));

/* Runs a command of the shell; its status, its output kept for said(). */
int run(const char *format, ...) __attribute__((format(printf, 1, 2)));
const char *said(void);

struct rig {
	uint32_t block;		/* sectors of a block */
	uint64_t sectors;	/* of the disk */
	uint64_t base_sectors;	/* of the base, when it differs */
	const char *features;	/* after the devices */
	const char *store_table;	/* a table under the store, %s is its loop device */
	const char *base_table;
	bool quiet;		/* leave the node closed */
	/* made by rig_up() */
	char store[32], base[32];	/* the devices of the table */
	char store_loop[32], base_loop[32];
	int node;		/* the worker's descriptor */
	int disk;		/* opened with O_DIRECT */
};

void rig_up(struct rig *rig);
void rig_down(struct rig *rig);
void rig_down_but_loops(struct rig *rig);

/* What a byte of the base (0) or the store (1) is before anything is written. */
uint8_t pattern(int device, uint64_t offset);

/* The worker's side. */
bool next_message(int node, struct dmu_message *message, int milliseconds);
struct dmu_message expect(int node, uint32_t type);
/* Whether it is not of that type but a flush that no guest waits for, for which a slow machine has time:
 * it commits nothing then. */
bool put_off(int node, const struct dmu_message *message, uint32_t type);
void expect_silence(int node);
int answer(int node, struct dmu_answer a);
int answers(int node, struct dmu_answer *list, uint32_t count);
uint64_t stat_of(const char *name);
uint64_t extents_of(void);		/* of what is mapped and remembered */
void make_forget(uint64_t extents);		/* lets memory be short until no more than so many are */

/* A map of count blocks from block on to sector of device. */
struct dmu_answer map(uint64_t id, uint64_t block, uint64_t count, unsigned int device,
		      uint64_t sector, uint32_t flags);

/* The guest's side: one request, done by a thread of its own. */
enum guest_op { READ_IT, WRITE_IT, WRITE_SYNC, WRITE_NOWAIT, FLUSH_IT, DISCARD_IT, ZERO_IT };

struct guest {
	pthread_t thread;
	enum guest_op op;
	int disk;
	uint64_t sector;
	uint32_t count;
	uint8_t fill;
	uint8_t *data;
	int error;		/* errno, 0 */
	volatile bool done;
};

struct guest *begin(struct rig *rig, enum guest_op op, uint64_t sector, uint32_t count,
		    uint8_t fill);
void end(struct guest *guest, int error);	/* waits for it; it has to end so */
void still_waits(struct guest *guest);
void check_bytes(struct guest *guest, uint64_t from, uint64_t count, int device, uint64_t offset);
void check_fill(struct guest *guest, uint64_t from, uint64_t count, uint8_t fill);

/* Reads straight from a backing device. */
void peek(const char *device, uint64_t sector, uint32_t count, uint8_t *data);

void sleep_ms(int milliseconds);
bool ended(const struct guest *guest);
uint64_t now_ms(void);

struct scenario {
	const char *name;
	void (*body)(void);
};

extern const struct scenario rule_scenarios[], more_rule_scenarios[], life_scenarios[],
	hostile_scenarios[], random_scenarios[], killed_scenarios[], grant_scenarios[],
	layer_scenarios[], failed_scenarios[], bound_scenarios[];

#endif
