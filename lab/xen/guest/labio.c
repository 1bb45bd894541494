// SPDX-License-Identifier: Apache-2.0
/*
 * labio: writes patterns that can be told apart and reads them back.
 *
 * It is the only program of the lab's guests (as /init), and a tool with the same orders
 * in dom0. As init it takes its orders from the kernel's command line (`lab=ORDER,...`) and
 * then, line by line, from the console; as a tool from its arguments. Each order ends in
 * exactly one line, `LAB ok ORDER...` or `LAB fail ORDER: REASON`; the first failure makes
 * the tool's exit status 1.
 *
 *   size:DEV                     its size in bytes
 *   wait:DEV[:SECONDS]           until it is there with a size; gone:DEV until it is not
 *   base:DEV:SEED                fill all of it with the pattern of SEED
 *   write:DEV:SEED:COUNT[:OPT]   operations 1 to COUNT of SEED, then fsync
 *   loop:DEV:SEED:COUNT[:OPT]    the same, with reads that are checked among them, telling
 *                                every second how far it got, ended early by a line `stop`
 *   verify:DEV:SEED:DONE[:OPT]   read all of it and check what 1 to DONE have left
 *   count:DEV                    one more in the counter of boots, its last sector; then an
 *                                order that begins with @N: is done in boot N only
 *   flush:DEV  discard:DEV:SECTOR:COUNT  sleep:SECONDS  say:TEXT  poweroff  reboot
 *   boot:DEV                     as a guest: mount it and run boot.sh with it as the root
 *   modules:emulated             as a guest: load the drivers of emulated disks
 *
 *   OPT: depth=N in flight (8); sync=N, fsync after every N operations (0: at the end);
 *        nosync, no fsync at all; cached, through the page cache; ms=N, pause between
 *        operations; base=SEED or base=zero, what sectors that no operation touched must
 *        hold; later, operations after DONE may have left something too.
 *   DEV: a name in /dev, or a path.
 *
 * Every sector carries the seed, the number of the operation that wrote it (0: base), its
 * own address, and noise made of all three, so that a sector that is lost, stale, torn or
 * in the wrong place is told from a good one, and by which operation it should have been.
 * An operation writes a run of sectors inside one chunk. A chunk is 48 sectors, so chunks
 * straddle blocks of 64 KiB. Two operations on one chunk are never in flight together.
 */
#include "labio.h"
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/reboot.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

bool is_init;
char reason[256];
static unsigned boot_number;

int fail(const char *format, ...)
{
	va_list list;

	va_start(list, format);
	vsnprintf(reason, sizeof(reason), format, list);
	va_end(list);
	return -1;
}

double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

void *aligned(size_t size)
{
	void *p = NULL;

	if (posix_memalign(&p, 4096, size)) {
		puts("LAB fail: no memory");
		exit(2);
	}
	return p;
}

static int await(const char *name, double seconds, bool present)
{
	char path[96], text[32];
	double end = now() + seconds;

	snprintf(path, sizeof(path), "/sys/block/%s/size", name);
	do {
		int fd = open(path, O_RDONLY | O_CLOEXEC);
		ssize_t n = fd < 0 ? 0 : read(fd, text, sizeof(text) - 1);

		if (fd >= 0)
			close(fd);
		text[n < 0 ? 0 : n] = 0;
		if ((fd >= 0 && atoll(text) > 0) == present && (present || fd < 0))
			return 0;
		usleep(50000);
	} while (now() < end);
	return fail("still %s after %g s", present ? "not there" : "there", seconds);
}

static int parse_options(char **words, struct options *o)
{
	*o = (struct options){ .depth = 8 };
	for (; *words; words++) {
		char *w = *words;

		if (!strncmp(w, "depth=", 6))
			o->depth = atoi(w + 6);
		else if (!strncmp(w, "sync=", 5))
			o->sync = atoi(w + 5);
		else if (!strncmp(w, "ms=", 3))
			o->ms = atoi(w + 3);
		else if (!strcmp(w, "base=zero"))
			o->base_zero = true;
		else if (!strncmp(w, "base=", 5))
			o->has_base = true, o->base = strtoul(w + 5, NULL, 0);
		else if (!strcmp(w, "nosync"))
			o->nosync = true;
		else if (!strcmp(w, "cached"))
			o->cached = true;
		else if (!strcmp(w, "later"))
			o->later = true;
		else
			return fail("unknown option %s", w);
	}
	if (o->depth < 1 || o->depth > DEPTH_MAX)
		return fail("depth is 1 to %d", DEPTH_MAX);
	return 0;
}

static int leave(int how)
{
	if (!is_init)
		return fail("only a guest can do that");
	sync();
	tcdrain(1);
	usleep(300000);
	return reboot(how) ? fail("%s", strerror(errno)) : 0;
}

static int disk_order(char **w, int n)
{
	struct options o;
	struct disk d = { .fd = -1 };
	bool patterned = !strcmp(w[0], "write") || !strcmp(w[0], "loop") || !strcmp(w[0], "verify");
	bool reading = !strcmp(w[0], "verify") || !strcmp(w[0], "size");
	int status;

	if (n < 2 || (patterned && n < 4) || (!strcmp(w[0], "base") && n < 3))
		return fail("words are missing");
	if (parse_options(patterned ? w + 4 : !strcmp(w[0], "base") ? w + 3 : w + n, &o))
		return -1;
	if (open_disk(&d, w[1], (reading ? O_RDONLY : O_RDWR) | (o.cached ? 0 : O_DIRECT)))
		return -1;
	uint32_t seed = n > 2 ? strtoul(w[2], NULL, 0) : 0;
	uint32_t count = n > 3 ? strtoul(w[3], NULL, 0) : 0;

	if (!strcmp(w[0], "write") || !strcmp(w[0], "loop")) {
		status = run_operations(&d, seed, count, &o, w[0][0] == 'l');
	} else if (!strcmp(w[0], "verify")) {
		status = verify(&d, seed, count, &o);
	} else if (!strcmp(w[0], "base")) {
		status = fill_base(&d, seed);
	} else if (!strcmp(w[0], "count")) {
		status = count_boot(&d, &boot_number);
	} else if (!strcmp(w[0], "flush")) {
		status = fsync(d.fd) ? fail("%s", strerror(errno)) : 0;
	} else if (!strcmp(w[0], "discard")) {
		uint64_t range[2] = { (uint64_t)seed * SECTOR, (uint64_t)count * SECTOR };

		status = ioctl(d.fd, BLKDISCARD, range) ? fail("%s", strerror(errno)) : 0;
	} else {
		snprintf(reason, sizeof(reason), "%llu", (unsigned long long)d.sectors * SECTOR);
		status = strcmp(w[0], "size") ? fail("no such order") : 0;
	}
	close(d.fd);
	return status;
}

int obey(char *order)
{
	char copy[256], *words[16] = { 0 }, *rest = copy;
	int n = 0, status;

	if (order[0] == '@') {
		unsigned wanted = strtoul(order + 1, &order, 10);

		if (wanted != boot_number)
			return 0;
		order++;
	}
	snprintf(copy, sizeof(copy), "%s", order);
	while (n < 15 && (words[n] = strsep(&rest, ":")))
		n++;
	if (!words[0] || !*words[0])
		return 0;
	reason[0] = 0;
	if (!strcmp(words[0], "say"))
		status = 0;
	else if (!strcmp(words[0], "sleep"))
		status = usleep(atof(words[1] ? words[1] : "1") * 1e6);
	else if (!strcmp(words[0], "poweroff"))
		status = leave(RB_POWER_OFF);
	else if (!strcmp(words[0], "reboot"))
		status = leave(RB_AUTOBOOT);
	else if (n > 1 && !strcmp(words[0], "boot"))
		status = is_init ? boot_disk(words[1]) : fail("only a guest can do that");
	else if (n > 1 && !strcmp(words[0], "modules"))
		status = is_init ? add_modules(words[1]) : fail("only a guest can do that");
	else if (n > 1 && (!strcmp(words[0], "wait") || !strcmp(words[0], "gone")))
		status = await(words[1], n > 2 ? atof(words[2]) : 30, words[0][0] == 'w');
	else
		status = disk_order(words, n);
	printf(status ? "LAB fail %s: %s\n" : *reason ? "LAB ok %s = %s\n" : "LAB ok %s\n", order,
	       reason);
	return status;
}

int main(int argc, char **argv)
{
	int status = 0;

	if (getpid() == 1)
		guest_main();
	if (argc < 2) {
		fputs("usage: labio ORDER... (see the head of labio.c)\n", stderr);
		return 2;
	}
	setvbuf(stdout, NULL, _IOLBF, 0);
	for (int i = 1; i < argc; i++)
		status |= obey(argv[i]) != 0;
	return status;
}
