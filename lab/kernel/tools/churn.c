// SPDX-License-Identifier: Apache-2.0
/*
 * churn DIR SEED OPERATIONS PROCESSES: random operations on a tree of files, by several
 * processes, each in a folder of its own and in a common one: make, write, append, truncate,
 * punch, allocate, map, rename, link, remove, sync. What an operation meets there (a name that
 * is gone, a full disk) is no failure; EIO and everything odd is.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define NAMES 24
#define LARGEST (512 << 10)

static uint64_t state;
static char own[256], common[256];

static uint32_t chance(uint32_t below)
{
	state = state * 6364136223846793005ull + 1442695040888963407ull;
	return (uint32_t)(state >> 33) % below;
}

static const char *name(char *path)
{
	snprintf(path, 512, "%s/d%u/f%u", chance(4) ? own : common, chance(3), chance(NAMES));
	return path;
}

static void may_fail(int result, const char *what)
{
	if (result >= 0 || errno == ENOENT || errno == EEXIST || errno == ENOSPC ||
	    errno == ELOOP || errno == EOPNOTSUPP || errno == EMLINK)
		return;
	fprintf(stderr, "churn: %s: %s\n", what, strerror(errno));
	_exit(1);
}

static void file_operation(uint32_t which)
{
	static uint8_t data[65536];
	uint32_t offset = chance(LARGEST), size = 1 + chance(sizeof(data));
	char path[512];
	int file = open(name(path), O_RDWR | (which < 4 ? O_CREAT : 0), 0600);
	struct stat status;
	uint8_t *map;

	may_fail(file, "open");
	if (file < 0)
		return;
	memset(data, chance(256), size);
	switch (which) {
	case 0: case 1: case 2:
		may_fail(pwrite(file, data, size, offset), "write");
		break;
	case 3:
		lseek(file, 0, SEEK_END);
		if (lseek(file, 0, SEEK_CUR) < 2 * LARGEST)
			may_fail(write(file, data, size), "append");
		break;
	case 4:
		may_fail(ftruncate(file, offset), "truncate");
		break;
	case 5:
		may_fail(fallocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, size),
			 "punch");
		break;
	case 6:
		may_fail(fallocate(file, chance(2) ? FALLOC_FL_KEEP_SIZE : 0, offset, size), "allocate");
		break;
	case 7:
		may_fail(fsync(file), "fsync");
		break;
	case 8:
		may_fail(pread(file, data, size, offset), "read");
		break;
	case 9:
		if (fstat(file, &status) || status.st_size < 8192)
			break;
		map = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
		if (map == MAP_FAILED)
			break;
		/* Nobody else shortens what is ours; of the common files it is only read. */
		if (!strncmp(path, own, strlen(own)))
			memset(map + chance(4096), chance(256), 64);
		munmap(map, 8192);
		break;
	}
	close(file);
}

static void operation(void)
{
	uint32_t which = chance(16);
	char from[512], to[512];

	if (which < 10) {
		file_operation(which);
	} else if (which < 12) {
		may_fail(rename(name(from), name(to)), "rename");
	} else if (which == 12) {
		may_fail(link(name(from), name(to)), "link");
	} else if (which == 13) {
		may_fail(symlink(name(from), name(to)), "symlink");
	} else {
		may_fail(unlink(name(from)), "unlink");
	}
}

static void make_folders(const char *at)
{
	char path[512];
	int i;

	may_fail(mkdir(at, 0700), "mkdir");
	for (i = 0; i < 3; i++) {
		snprintf(path, sizeof(path), "%s/d%d", at, i);
		may_fail(mkdir(path, 0700), "mkdir");
	}
}

int main(int argc, char **argv)
{
	int processes, operations, i, status, result = 0;

	if (argc != 5) {
		fprintf(stderr, "usage: churn DIR SEED OPERATIONS PROCESSES\n");
		return 2;
	}
	operations = atoi(argv[3]);
	processes = atoi(argv[4]);
	snprintf(common, sizeof(common), "%s/common", argv[1]);
	make_folders(common);
	for (i = 0; i < processes; i++) {
		if (fork())
			continue;
		state = strtoull(argv[2], NULL, 10) * 977 + i;
		snprintf(own, sizeof(own), "%s/p%d", argv[1], i);
		make_folders(own);
		while (operations--)
			operation();
		_exit(0);
	}
	while (wait(&status) > 0)
		result |= status;
	return result != 0;
}
