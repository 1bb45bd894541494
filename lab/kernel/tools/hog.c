// SPDX-License-Identifier: Apache-2.0
/*
 * hog MEGABYTES SEED: fills so much memory with what it can compute again, and compares it,
 * then a part of it in another order.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

static uint64_t word(uint64_t seed, uint64_t at)
{
	uint64_t z = seed * 0x9e3779b97f4a7c15ull + at;

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
	return z ^ (z >> 27);
}

int main(int argc, char **argv)
{
	uint64_t pages, words, seed, i, pass, page;
	uint64_t *memory;

	if (argc != 3) {
		fprintf(stderr, "usage: hog MEGABYTES SEED\n");
		return 2;
	}
	pages = strtoull(argv[1], NULL, 10) << 8;
	words = pages << 9;
	seed = strtoull(argv[2], NULL, 10);
	memory = malloc(words * 8);
	if (!memory)
		return 1;
	for (i = 0; i < words; i++)
		memory[i] = word(seed, i);
	for (pass = 0; pass < 2; pass++) {
		/* From the end, where the newest are; then one in eight, all over the place. */
		for (page = 0; page < pages; page += pass ? 8 : 1) {
			/* 40503 is odd, and so reaches every page of a power of two, most of others. */
			uint64_t at = pass ? page * 40503 % pages : pages - 1 - page;

			for (i = at << 9; i < (at + 1) << 9; i++) {
				if (memory[i] == word(seed, i))
					continue;
				fprintf(stderr, "hog: word %llu is wrong\n", (unsigned long long)i);
				return 1;
			}
		}
	}
	return 0;
}
