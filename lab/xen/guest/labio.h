/* SPDX-License-Identifier: Apache-2.0 */
/*
 * labio.h: what labio's files share. pattern.c says what is written, disk.c moves it,
 * labio.c takes orders, init.c is process 1 of a guest.
 */
#define _GNU_SOURCE
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>

enum { SECTOR = 512, CHUNK = 48, DEPTH_MAX = 64, SPAN = 512 };

struct sector {
	uint64_t magic, lba;
	uint32_t seed, op;
	uint64_t noise[(SECTOR - 24) / 8];
};
_Static_assert(sizeof(struct sector) == SECTOR, "a sector is 512 bytes");

struct disk {
	char name[64];
	int fd;
	uint64_t sectors, chunks;
};

struct options {
	unsigned depth, sync, ms;
	bool nosync, cached, later, base_zero, has_base;
	uint32_t base;
};

struct run {
	uint64_t lba;
	uint32_t count;
	uint64_t chunk;
};

extern const uint64_t magic;
extern bool is_init;		/* process 1 of a guest */
extern char reason[256];	/* why the last order failed, or what it found */

/* Sets `reason`; returns -1. */
int fail(const char *format, ...) __attribute__((format(printf, 1, 2)));
double now(void);
void *aligned(size_t size);
int obey(char *order);
_Noreturn void guest_main(void);
/* Loads the modules of /lib/modules/order-NAME. */
int add_modules(const char *name);
/* Boots the root that a disk holds, as far as boot.sh goes. */
int boot_disk(const char *name);

uint64_t mix(uint64_t x);
void fill(struct sector *s, uint32_t seed, uint32_t op, uint64_t lba);
bool is_good(const struct sector *s);
struct run run_of(const struct disk *d, uint32_t seed, uint32_t op);
const char *judge(const struct disk *d, const struct sector *s, uint64_t lba, uint32_t seed,
		  uint32_t due, uint32_t done, const struct options *o);

int open_disk(struct disk *d, const char *name, int flags);
int run_operations(struct disk *d, uint32_t seed, uint32_t count, const struct options *o,
		   bool looping);
int verify(struct disk *d, uint32_t seed, uint32_t done, const struct options *o);
int fill_base(struct disk *d, uint32_t seed);
/* One more in the counter of boots, the last sector; sets `boot`. */
int count_boot(struct disk *d, unsigned *boot);
