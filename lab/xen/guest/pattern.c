// SPDX-License-Identifier: Apache-2.0
/*
 * pattern.c: what every sector holds, and what each operation writes. Every sector carries
 * the seed, the number of the operation that wrote it (0: base), its own address, and noise
 * made of all three, so that a sector that is lost, stale, torn or in the wrong place is told
 * from a good one, and by which operation it should have been.
 */
#include "labio.h"
#include <stdio.h>
#include <string.h>

const uint64_t magic = 0x314f4942414c2121;

uint64_t mix(uint64_t x)
{
	x += 0x9e3779b97f4a7c15;
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
	x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
	return x ^ (x >> 31);
}

void fill(struct sector *s, uint32_t seed, uint32_t op, uint64_t lba)
{
	uint64_t x = mix(mix(seed) ^ op) ^ mix(lba);

	*s = (struct sector){ .magic = magic, .lba = lba, .seed = seed, .op = op };
	for (unsigned i = 0; i < sizeof(s->noise) / 8; i++) {
		x ^= x << 13, x ^= x >> 7, x ^= x << 17;
		s->noise[i] = x;
	}
}

bool is_good(const struct sector *s)
{
	struct sector t;

	fill(&t, s->seed, s->op, s->lba);
	return memcmp(s, &t, SECTOR) == 0;
}

/* What operation `op` of `seed` writes. */
struct run run_of(const struct disk *d, uint32_t seed, uint32_t op)
{
	uint64_t x = mix(mix(seed) + op), y = mix(x);
	uint32_t first = y % CHUNK, most = CHUNK - first;
	struct run r = { .chunk = x % d->chunks };

	/* A third are whole chunks, the rest anything from one sector. */
	if ((y >> 32) % 3 == 0)
		first = 0, most = r.count = CHUNK;
	else
		r.count = 1 + (y >> 40) % most;
	r.lba = r.chunk * CHUNK + first;
	return r;
}

/*
 * One sector as it was read against what must be there: operation `due`, or what lay there
 * before any. Returns null or what is wrong.
 */
const char *judge(const struct disk *d, const struct sector *s, uint64_t lba, uint32_t seed,
			 uint32_t due, uint32_t done, const struct options *o)
{
	static const struct sector zero;
	static char text[128];

	if (due == 0 && o->base_zero && memcmp(s, &zero, SECTOR) == 0)
		return NULL;
	if (due == 0 && !o->has_base && !o->base_zero && s->magic != magic)
		return NULL;
	if (s->magic != magic) {
		const char *what = memcmp(s, &zero, SECTOR) ? "something else" : "zeroes";
		snprintf(text, sizeof(text), "holds %s, should hold operation %u", what, due);
		return text;
	}
	if (s->lba != lba || !is_good(s)) {
		snprintf(text, sizeof(text), "holds sector %llu of seed %u operation %u%s",
			 (unsigned long long)s->lba, s->seed, s->op, is_good(s) ? "" : ", torn");
		return text;
	}
	if (s->seed == seed && s->op != 0) {
		struct run r = run_of(d, seed, s->op);
		bool covers = lba >= r.lba && lba < r.lba + r.count;

		if (s->op == due || (o->later && s->op > done && covers))
			return NULL;
	} else if (due == 0 && !o->base_zero && (!o->has_base || (s->seed == o->base && s->op == 0))) {
		return NULL;
	}
	snprintf(text, sizeof(text), "holds seed %u operation %u, should hold operation %u",
		 s->seed, s->op, due);
	return text;
}
